"""The first step, where policy and reference are equal, and completions of which nothing is left."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from one_process_policy import OneProcessPolicy, reference_of
from tiny_llamas import our_llama, random_pairs

from dpo_scale.data.layouts import Layout, PromptCompletions, collate
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.recipe import LossSection
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.step import PairBatch, StepOutput, run_step

CPU = torch.device("cpu")
LAYOUTS = ["shared", "packed", "padded"]
OBJECTIVES = [LossSection(beta=0.1, reduction="sum"), LossSection(beta=10.0, reduction="mean")]


def first_step(
    lengths: list[tuple[int, int, int]], layout: Layout, loss: LossSection, dtype: torch.dtype
) -> tuple[StepOutput, OneProcessPolicy, dict[str, float]]:
    """One step of a policy that equals its reference, on pairs of these lengths."""
    model, pairs = our_llama(1, dtype=dtype), random_pairs(lengths)
    batch = collate([PromptCompletions.of_pair(pair) for pair in pairs], layout)
    policy, sums = OneProcessPolicy(model), MetricSums(CPU)
    item = PairBatch(batch, np.arange(len(pairs)), 1.0)
    reference = reference_of(model, pairs, loss.reduction)
    output = run_step(policy, [item], reference, sums, loss, global_pairs=len(pairs), device=CPU)
    return output, policy, sums.reduce(OneProcess())


@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: loss.reduction)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_models_lose_ln_2_a_pair_and_earn_nothing(layout: Layout, loss: LossSection) -> None:
    lengths = [(5, 7, 3), (1, 1, 9), (12, 4, 4)]
    _, policy, metrics = first_step(lengths, layout, loss, torch.float64)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["rewards/rejected"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["rewards/margin"] == pytest.approx(0.0, abs=1e-9)
    assert policy.grad_norm() > 1e-3, "the gradient is that of a pair, not of nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: loss.reduction)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "lengths",
    [[(4, 0, 3)], [(4, 3, 0)], [(4, 0, 0)], [(1, 0, 1), (6, 5, 4)], [(6, 5, 4), (3, 0, 0), (2, 1, 0)]],
    ids=["chosen", "rejected", "both", "beside a whole pair", "last"],
)
def test_an_empty_completion_gives_no_nan(
    lengths: list[tuple[int, int, int]], layout: Layout, loss: LossSection, dtype: torch.dtype
) -> None:
    output, policy, metrics = first_step(lengths, layout, loss, dtype)
    assert math.isfinite(policy.grad_norm())
    assert all(gradient.isfinite().all() for gradient in policy.gradients.values())
    assert output.first_token_logps.isfinite().all()
    # Equal models lose ln 2 on every pair: an empty side adds 0 to both.
    assert output.micro_losses[0].item() == pytest.approx(len(lengths) * math.log(2), rel=0.01)
    assert all(math.isfinite(value) for value in metrics.values())
