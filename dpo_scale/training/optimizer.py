"""Parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dpo_scale.recipe import OptimSection


def learning_rate(step: int, num_steps: int, optim: OptimSection) -> float:
    """Learning rate of a step counted from 0.

    It rises linearly to the peak, which the last warm-up step reaches, and falls so that a step after the last would
    get 0; no step is wasted on a rate of 0.
    """
    warmup = math.ceil(optim.warmup_ratio * num_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = (step - warmup) / (num_steps - warmup)
    if optim.schedule == "linear":
        return optim.learning_rate * (1 - progress)
    return optim.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, of which those of experts are stacked.

    The true shape of a parameter that ZeRO-3 has sharded is its `ds_shape`.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith("bias")


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101) in two groups."""
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in parameters if is_decayed(name, p) == decayed],
            "weight_decay": optim.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def set_learning_rate(groups: list[dict[str, Any]], value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in groups:
        group["lr"] = value
