"""The learning rate by hand, and who is decayed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpo_scale.recipe import OptimSection
from dpo_scale.training.optimizer import build_optimizer, learning_rate, set_learning_rate


def _rates(num_steps: int, **settings: object) -> list[float]:
    optim = OptimSection.model_validate({"learning_rate": 1.0, **settings})
    return [learning_rate(step, num_steps, optim) for step in range(num_steps)]


def test_linear_warms_up_to_the_peak_and_falls_towards_zero() -> None:
    actual = _rates(10, schedule="linear", warmup_ratio=0.2)
    assert actual == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_falls_along_half_a_wave() -> None:
    actual = _rates(5, schedule="cosine", warmup_ratio=0.2)
    assert actual == pytest.approx([1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    assert _rates(5, schedule="constant", warmup_ratio=0.4) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_warm_up_of_a_broken_number_of_steps_takes_the_whole_last_one() -> None:
    assert _rates(5, schedule="constant", warmup_ratio=0.3) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert _rates(4, warmup_ratio=0.0) == [1.0, 0.75, 0.5, 0.25]


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert _rates(4, warmup_ratio=1.0) == [0.25, 0.5, 0.75, 1.0]


def test_a_run_of_one_step_is_not_wasted() -> None:
    for schedule in ("linear", "cosine", "constant"):
        assert _rates(1, schedule=schedule) == [1.0]


def test_no_step_has_a_rate_of_zero() -> None:
    for schedule in ("linear", "cosine", "constant"):
        for num_steps in (1, 2, 7, 100):
            assert min(_rates(num_steps, schedule=schedule)) > 0


def _model() -> nn.Module:
    return nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(3), "embedding": nn.Embedding(4, 3)})


def _decay_of_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


EXPECTED_DECAY = {
    "linear.weight": 0.1,
    "linear.bias": 0.0,
    "norm.weight": 0.0,
    "norm.bias": 0.0,
    "embedding.weight": 0.1,
}


def test_decay_spares_norms_and_biases() -> None:
    model = _model()
    optimizer = build_optimizer(model, OptimSection(weight_decay=0.1))
    assert _decay_of_names(model, optimizer) == EXPECTED_DECAY


def test_decay_spares_the_stacked_biases_of_experts() -> None:
    """A row an expert, as gpt-oss has them."""
    experts = nn.ParameterDict({"gate_up_proj": torch.ones(2, 3, 4), "gate_up_proj_bias": torch.ones(2, 4)})
    optimizer = build_optimizer(experts, OptimSection(weight_decay=0.1))
    assert _decay_of_names(experts, optimizer) == {"gate_up_proj": 0.1, "gate_up_proj_bias": 0.0}


def test_decay_goes_by_the_true_shape_of_a_sharded_parameter() -> None:
    """ZeRO-3 leaves an empty vector in its place."""
    model = _model()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    optimizer = build_optimizer(model, OptimSection(weight_decay=0.1))
    assert _decay_of_names(model, optimizer) == EXPECTED_DECAY


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = _model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "linear.weight")
    optimizer = build_optimizer(model, OptimSection(weight_decay=0.1))
    assert _decay_of_names(model, optimizer) == {"linear.weight": 0.1}
    assert len(optimizer.param_groups) == 1


def test_the_optimizer_is_adamw_with_the_recipes_numbers() -> None:
    optim = OptimSection(learning_rate=1e-3, weight_decay=0.1, betas=(0.8, 0.9), eps=0.5)
    parameter = nn.Parameter(torch.tensor([[2.0]]))
    holder = nn.ParameterList([parameter])
    optimizer = build_optimizer(holder, optim)
    set_learning_rate(optimizer.param_groups, 0.5)
    parameter.grad = torch.tensor([[3.0]])
    optimizer.step()
    # arXiv 1711.05101, algorithm 2; after one step both moments, corrected, are the gradient and its square
    assert parameter.item() == pytest.approx(2.0 - 0.5 * 0.1 * 2.0 - 0.5 * 3.0 / (3.0 + 0.5))
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_the_rate_is_set_in_every_group() -> None:
    optimizer = build_optimizer(_model(), OptimSection())
    set_learning_rate(optimizer.param_groups, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
