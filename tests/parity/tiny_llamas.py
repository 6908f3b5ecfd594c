"""Llamas of a few thousand weights and pairs of a few tokens, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.model.attention import ATTENTION, register
from dpo_scale.model.log_probs import CompletionLogProbs

VOCABULARY = 97
LENGTHS = [(5, 7, 3), (1, 1, 9), (12, 4, 4), (3, 1, 1), (2, 15, 6), (8, 2, 11), (4, 6, 6), (20, 3, 8)]
"""Tokens of prompt, chosen and rejected of 8 pairs: single tokens, equal and very unequal ones among them."""


def tiny_llama(
    seed: int,
    *,
    attention: str,
    tied: bool = False,
    biased_head: bool = False,
    dtype: torch.dtype = torch.float64,
    vocabulary: int = VOCABULARY,
) -> LlamaForCausalLM:
    """Two layers with grouped key-value heads; weights so large that attention is far from uniform."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if biased_head:
        model.lm_head = nn.Linear(config.hidden_size, vocabulary, bias=True)
        nn.init.normal_(model.lm_head.bias)
    return model.to(dtype)


def plain_llama(seed: int, **settings: object) -> LlamaForCausalLM:
    """The model of a seed with the library's plain attention, and nothing of ours.

    Its norms are written out: the library computes them in fp32, even in a float64 model.
    """
    model = tiny_llama(seed, attention="eager", **settings)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
    return model


def _norm(module: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    mean_of_squares = hidden.square().mean(-1, keepdim=True)
    return module.weight * hidden / (mean_of_squares + module.variance_epsilon).sqrt()


def plain_mixture(seed: int) -> MixtralForCausalLM:
    """A small mixture of experts in fp32 with the library's plain attention; tokens differ in their experts."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM(config)


def our_llama(seed: int, **settings: object) -> CompletionLogProbs:
    """The same model as it is trained: segment attention and the chunked head."""
    register("sdpa")
    return CompletionLogProbs(tiny_llama(seed, attention=ATTENTION, **settings))  # type: ignore[arg-type]


def random_pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0) -> TokenPairs:
    """Pairs of random tokens with these numbers of prompt, chosen and rejected tokens."""
    random = np.random.default_rng(seed)
    return TokenPairs.from_pairs(
        TokenPair(*(random.integers(1, VOCABULARY, n).astype(np.int32) for n in row), row=f"made:{number}")
        for number, row in enumerate(lengths, start=1)
    )
