"""How a step's pairs fall into micro-batches and ranks does not show in its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from one_process_policy import OneProcessPolicy, reference_of
from plain_dpo import assert_same_gradients, gradients, plain_losses
from tiny_llamas import LENGTHS, our_llama, plain_llama, random_pairs
from torch import Tensor, nn

from dpo_scale.data.layouts import Layout, PromptCompletions, collate
from dpo_scale.data.planning import CostModel, Schedule, StepPlan, layout_costs, plan_step
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.recipe import LossSection
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.step import PairBatch, pair_batches, run_step

CPU = torch.device("cpu")
POLICY, REFERENCE = 1, 2
LOSS = LossSection(beta=2.0, reduction="mean", label_smoothing=0.01)


def batches_of(pairs: TokenPairs, sizes: Sequence[int], layout: Layout = "shared") -> list[PairBatch]:
    """Micro-batches of these many pairs, in order."""
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return [
        PairBatch(collate([PromptCompletions.of_pair(pairs[int(i)]) for i in part], layout), part, 1.0)
        for part in parts
    ]


def gradients_of(
    pairs: TokenPairs, batches: Sequence[PairBatch], global_pairs: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of one step."""
    policy, sums = OneProcessPolicy(our_llama(POLICY)), MetricSums(CPU)
    reference = reference_of(our_llama(REFERENCE), pairs, LOSS.reduction)
    run_step(policy, batches, reference, sums, LOSS, global_pairs=global_pairs, device=CPU)
    return policy.gradients, sums.reduce(OneProcess())


def plain_loss(policy: nn.Module, pairs: Iterable[TokenPair]) -> Tensor:
    """The mean loss of the pairs in its plain form."""
    return plain_losses(
        policy,
        plain_llama(REFERENCE),
        pairs,
        beta=LOSS.beta,
        reduction=LOSS.reduction,
        label_smoothing=LOSS.label_smoothing,
    ).mean()


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [5, 1, 2]], ids=str)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_unequal_micro_batches_give_the_mean_over_all_pairs(sizes: list[int], layout: Layout) -> None:
    pairs = random_pairs()
    actual, metrics = gradients_of(pairs, batches_of(pairs, sizes, layout), len(pairs))

    policy = plain_llama(POLICY)
    expected = plain_loss(policy, pairs)
    expected.backward()
    assert_same_gradients(actual, gradients(policy), 1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_filler_of_weight_zero_changes_nothing() -> None:
    pairs = random_pairs()
    batches = batches_of(pairs, [4, 4])
    filler = PairBatch(batches_of(pairs, [3])[0].batch, np.arange(3), 0.0)
    expected_gradients, expected_metrics = gradients_of(pairs, batches, len(pairs))
    actual_gradients, actual_metrics = gradients_of(pairs, [batches[0], filler, batches[1], filler], len(pairs))
    assert_same_gradients(actual_gradients, expected_gradients, 0.0)
    assert actual_metrics == expected_metrics


def test_a_filler_is_the_shortest_pair_of_its_round_and_looked_for_in_that_alone() -> None:
    """There may be millions of others."""
    pairs = random_pairs()
    plan = StepPlan(0, 3, (tuple(np.array(indices, np.int64) for indices in ([1, 3], [], [2], [])),))
    totals = pairs.lengths.sum(axis=1)
    looked_at: list[int] = []

    class Lengths(np.ndarray):
        def sum(self, *arguments: Any, **settings: Any) -> Any:
            looked_at.append(len(self))
            return super().sum(*arguments, **settings)

    pairs.lengths = pairs.lengths.view(Lengths)
    fillers = [item for rank in (1, 3) for item in pair_batches(plan, rank, pairs, "shared", pad_id=0)]
    assert [item.weight for item in fillers] == [0.0, 0.0]
    assert {int(index) for item in fillers for index in item.pairs} == {min((1, 2, 3), key=totals.__getitem__)}
    assert max(looked_at) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rank_tokens", [60, 400])
@pytest.mark.parametrize("step", [0, 1], ids=["full", "partial"])
def test_ranks_and_token_budgets_give_the_mean_over_the_steps_true_pairs(
    world_size: int, rank_tokens: int, step: int
) -> None:
    """Planned as in training: 5 pairs and then the last 3, over ranks whose gradients are added here."""
    pairs = random_pairs()
    schedule = Schedule(num_pairs=len(LENGTHS), global_pairs=5, seed=0, epochs=1)
    members = schedule.pairs_of(step)
    assert len(members) == [5, 3][step]
    plan = plan_step(
        members,
        layout_costs(pairs.lengths, "shared", CostModel()),
        world_size=world_size,
        rank_tokens=rank_tokens,
        step=step,
    )
    by_rank = [list(pair_batches(plan, rank, pairs, "shared", pad_id=0)) for rank in range(world_size)]
    assert len({len(batches) for batches in by_rank}) == 1, "ranks in lockstep"
    fillers = sum(item.weight == 0 for batches in by_rank for item in batches)
    assert fillers > 0 or world_size <= len(members)
    parts = [gradients_of(pairs, batches, plan.num_pairs)[0] for batches in by_rank]
    actual = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}

    policy = plain_llama(POLICY)
    plain_loss(policy, [pairs[int(index)] for index in members]).backward()
    assert_same_gradients(actual, gradients(policy), 1e-6)
