"""A base model for the village: a SentencePiece tokenizer and a small Llama that has read the corpus."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_scale.files import write_whole

VOCABULARY = 900
STEPS = 320
LINES_PER_STEP = 48
CORPUS_LINES = STEPS * LINES_PER_STEP
"""Lines that the training reads, each once."""
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
_PADDING = -100


def make_base_model(corpus: Sequence[str], folder: Path, seed: int, on_step: Callable[[float], None]) -> None:
    """Train tokenizer and model on the corpus and save both as a Hugging Face folder.

    `on_step` is told the mean next-token loss of each step, in nats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, folder / "tokenizer.model")
    rows = [torch.tensor([tokenizer.bos_id(), *ids, tokenizer.eos_id()]) for ids in tokenizer.encode(list(corpus))]
    torch.set_num_threads(1)  # the same model on every machine; so small a one gains little from more
    model = _new_model(tokenizer, seed)
    _train(model, rows, on_step)
    model.config.save_pretrained(folder)
    # Not save_pretrained: that imports DeepSpeed, which has much to say where no GPU is. Nor save_file: whatever the
    # umask, nobody else may read what that writes.
    write_whole(folder / "model.safetensors", save(model.state_dict(), metadata={"format": "pt"}))


def train_tokenizer(corpus: Sequence[str], file: Path) -> sentencepiece.SentencePieceProcessor:
    """A bare SentencePiece model: BPE with byte fallback, as Llama's first generations have it."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",  # others turn the line break into a space
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    file.write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def _new_model(tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size(),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.06,  # near 1/sqrt(hidden_size): the usual 0.02 costs hundreds of steps at this width
            bos_token_id=tokenizer.bos_id(),
            eos_token_id=tokenizer.eos_id(),
            tie_word_embeddings=False,
        )
    )


def _train(model: LlamaForCausalLM, rows: Sequence[Tensor], on_step: Callable[[float], None]) -> None:
    """One pass of next-token training in fp32 over the rows of token ids."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _share_of_peak(step)
        lines = rows[step * LINES_PER_STEP : (step + 1) * LINES_PER_STEP]
        ids = pad_sequence(list(lines), batch_first=True, padding_value=_PADDING)
        logits = model(input_ids=ids[:, :-1].clamp_min(0)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=_PADDING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(loss.item())


def _share_of_peak(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))
