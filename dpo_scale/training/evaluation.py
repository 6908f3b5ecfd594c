"""The held-out pass: the same log-probs, the same loss, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout, MicroBatch
from dpo_scale.data.planning import StepPlan
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.recipe import LossSection
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.step import ReferenceLogps, pair_batches, pair_losses


class Evaluated(Protocol):
    """The policy engine."""

    def train(self, mode: bool = True) -> None: ...
    def __call__(self, batch: MicroBatch) -> Tensor: ...


@torch.no_grad()
def evaluate(
    policy: Evaluated,
    plan: StepPlan,
    pairs: TokenPairs,
    reference_logps: ReferenceLogps,
    ranks: Ranks,
    console: Console,
    loss: LossSection,
    *,
    layout: Layout,
    pad_id: int,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics over all held-out pairs, each counted once, under keys `eval/...`. Collective.

    All ranks call `between_batches` between two micro-batches; what it raises ends the pass.
    """
    sums = MetricSums(ranks.device)
    policy.train(False)
    try:
        with console.progress("Held-out pairs", len(plan.micro_batches), "micro-batches") as bar:
            for item in pair_batches(plan, ranks.rank, pairs, layout, pad_id):
                between_batches()
                pair_losses(policy, item, reference_logps, sums, loss, ranks.device)
                bar.advance(1)
    finally:  # a pass that is stopped half-way is followed by a commit
        policy.train(True)
    return sums.reduce(ranks, prefix="eval/")


BEST: dict[str, Callable[[float, float], float]] = {"eval/loss": min, "eval/rewards/accuracy": max}
"""Metrics whose best value is kept over a run, and which of two is better."""


def best_of(before: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """The best values so far, a further held-out pass included."""
    return {name: better(before.get(name, metrics[name]), metrics[name]) for name, better in BEST.items()}


def describe(metrics: dict[str, float]) -> str:
    """One line for the console."""
    return (
        f"held-out loss {metrics['eval/loss']:.4f}, margin {metrics['eval/rewards/margin']:+.4f}, "
        f"accuracy {metrics['eval/rewards/accuracy']:.3f}, "
        f"policy prefers chosen {metrics['eval/logps/accuracy']:.3f}"
    )
