"""The work of a model's forward, against the weights of tiny models counted one by one."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import COMMON, SERVED
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_scale.model.loading import cost_model

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
