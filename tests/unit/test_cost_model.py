"""The work of a model's forward, against the weights of tiny models counted one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import COMMON, SERVED
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.inputs import Data
from dpo_scale.model.last_layer import decoder_layers
from dpo_scale.model.loading import WITHOUT_GATE, cost_model

ROUTERS = ("gate.weight", "shared_expert_gate.weight")
"""What sends a token to its experts is left out: a vector an expert."""

MORE = {
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2", "mixtral", "qwen3_moe", *MORE])
def test_work_a_token_is_that_of_the_weights_it_passes(model_type: str) -> None:
    settings = {**COMMON, **SERVED.get(model_type, {}), **MORE.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    passed = 0.0
    for name, parameter in model.base_model.layers.named_parameters():
        if parameter.ndim > 1 and not name.endswith(ROUTERS):
            in_experts = ".experts." in name
            share = config.num_experts_per_tok / getattr(config, "num_experts", 4) if in_experts else 1
            passed += share * math.prod(parameter.shape)
    assert cost_model(config).per_token == pytest.approx(passed)


UNGATED: dict[str, dict[str, Any]] = {
    "biogpt": {"intermediate_size": 128},
    "falcon": {"multi_query": False},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "opt": {"ffn_dim": 128},
    "xglm": {"ffn_dim": 128},
}
"""What a tiny configuration needs beside the usual."""


@pytest.mark.parametrize("model_type", sorted(WITHOUT_GATE & set(CONFIG_MAPPING)))
def test_feed_forwards_without_a_gate_have_two_matrices(model_type: str) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(model_type, **size, **UNGATED.get(model_type, {})).get_text_config()
    with torch.device("meta"):
        layers = decoder_layers(AutoModelForCausalLM.from_config(config))
    assert layers is not None
    passed = sum(math.prod(p.shape) for p in layers.parameters() if p.ndim > 1)
    assert cost_model(config).per_token == passed


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "gemma3n_text", "gemma4_text", "jamba"])
def test_models_of_other_forms_have_a_cost_too(model_type: str) -> None:
    """It only balances ranks: recurrent layers, layers that differ and lists of widths must not end a run."""
    cost = cost_model(CONFIG_MAPPING[model_type]())
    assert cost.per_token > 1e6
    assert cost.per_scored_token > 1e6
    assert (cost.per_attended_position > 0) == ("mamba" not in model_type)


def test_a_steps_work_is_that_of_its_pairs_and_not_of_the_time_their_attention_takes() -> None:
    """MFU counts multiply-accumulates: 16 tokens, of which 9 are scored, and attention to what is before each."""
    config = AutoConfig.for_model("llama", **COMMON)
    ids = np.arange(7, dtype=np.int32)
    pairs = TokenPairs.from_pairs([TokenPair(ids, ids[:5], ids[:4], row) for row in ("a", "b")])
    nothing: Any = None
    data = Data(pairs, pairs, nothing, 0, nothing, config, {})
    cost = cost_model(config)
    attended = 7**2 / 2 + 7 * 5 + 5**2 / 2 + 7 * 4 + 4**2 / 2
    one = 16 * cost.per_token + 9 * cost.per_scored_token + attended * cost.per_attended_position
    assert data.forward_macs(np.array([1]), "shared") == pytest.approx(one)
    assert data.forward_macs(np.array([0, 1]), "shared") == pytest.approx(2 * one)
