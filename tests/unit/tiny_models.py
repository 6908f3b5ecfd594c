"""Tiny random models of many architectures, written to folders as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Wide initial weights make logits that differ as much between tokens as a trained model's do."""

WINDOW = 6

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": True},
    "phi": {},
}
"""Architectures of the shared layout: model type -> what its configuration adds to the common part."""


def save_tiny_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """A random model in fp32, the same each time."""
    config = AutoConfig.for_model(model_type, **{**COMMON, **SERVED.get(model_type, {}), **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # they start at zero, and would prove nothing
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder
