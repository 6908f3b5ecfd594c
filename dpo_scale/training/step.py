"""One optimizer step: its micro-batches, the objective on them, and what went wrong if a number is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate, to_device
from dpo_scale.data.planning import Indices, StepPlan
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.objectives import PairLogProbs, preference_loss, reduce_log_probs
from dpo_scale.recipe import LossSection
from dpo_scale.training.metrics import MetricSums

ReferenceLogps = Callable[[Indices], npt.NDArray[np.float64]]
"""Pairs [P] -> reduced reference log-probs [P, 2], chosen and rejected."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A micro-batch of pairs on one rank."""

    batch: MicroBatch
    pairs: Indices
    """int64 [P], which pairs."""
    weight: float
    """1, or 0 for a filler that only keeps this rank in step with the others."""


def pair_batches(plan: StepPlan, rank: int, pairs: TokenPairs, layout: Layout, pad_id: int) -> Iterator[PairBatch]:
    """The micro-batches of one rank, equally many on every rank, on the CPU."""
    for round_ in plan.micro_batches:
        indices = round_[rank]
        filler = len(indices) == 0
        if filler:  # the shortest pair of this round: cheap, and not longer than what runs beside it
            others = np.concatenate(round_)
            indices = others[[int(np.argmin(pairs.lengths[others].sum(axis=1)))]]
        groups = [PromptCompletions.of_pair(pairs[int(index)]) for index in indices]
        yield PairBatch(collate(groups, layout, pad_id), indices, 0.0 if filler else 1.0)


def pair_losses(
    policy: Callable[[MicroBatch], Tensor],
    item: PairBatch,
    reference_logps: ReferenceLogps,
    sums: MetricSums,
    loss: LossSection,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The recipe's loss of each pair of a micro-batch, [P], counted in the metrics, and its token log-probs, [C]."""
    batch = item.batch.to(device)
    token_logps_C = policy(batch)
    policy_S = reduce_log_probs(token_logps_C, batch.sequence_of_target, batch.lengths, loss.reduction)
    reference_P2 = to_device(torch.from_numpy(reference_logps(item.pairs)).to(policy_S.dtype), device)
    logps = PairLogProbs(policy_S[0::2], policy_S[1::2], reference_P2[:, 0], reference_P2[:, 1])
    losses_P = preference_loss(*logps, beta=loss.beta, label_smoothing=loss.label_smoothing)
    sums.add(losses_P, logps, beta=loss.beta, weight=item.weight)
    return losses_P, token_logps_C


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one optimizer step gave."""

    applied: bool
    grad_norm: float
    micro_losses: tuple[Tensor, ...]
    """Summed loss of each of this rank's micro-batches, on the device."""
    first_token_logps: Tensor
    """Completion log-probs, fp32 [C], of this rank's first micro-batch, detached."""


class Policy(Protocol):
    """What a step needs of the policy engine; see `distributed.engines.PolicyEngine`."""

    def __call__(self, batch: MicroBatch) -> Tensor: ...
    def backward(self, loss_sum: Tensor, *, global_pairs: int, is_last: bool) -> None: ...
    def step(self) -> bool: ...
    def grad_norm(self) -> float: ...


def run_step(
    policy: Policy,
    batches: Sequence[PairBatch],
    reference_logps: ReferenceLogps,
    sums: MetricSums,
    loss: LossSection,
    *,
    global_pairs: int,
    device: torch.device,
) -> StepOutput:
    """Forward and backward of every micro-batch, then one optimizer step.

    The gradient is that of the mean loss over the step's `global_pairs` pairs: each micro-batch contributes a sum, and
    the division happens once.
    """
    micro_losses: list[Tensor] = []
    first: Tensor | None = None
    for number, item in enumerate(batches, start=1):
        losses_P, token_logps_C = pair_losses(policy, item, reference_logps, sums, loss, device)
        loss_sum = (losses_P * item.weight).sum()
        policy.backward(loss_sum, global_pairs=global_pairs, is_last=number == len(batches))
        micro_losses.append(loss_sum.detach())
        first = token_logps_C.detach() if first is None else first
    applied = policy.step()
    assert first is not None
    return StepOutput(applied, policy.grad_norm(), tuple(micro_losses), first)


def non_finite_rows(output: StepOutput, batches: Sequence[PairBatch], pairs: TokenPairs) -> list[str]:
    """Rows of the pairs in this rank's micro-batches whose loss is not finite."""
    return [
        pairs[int(index)].row
        for loss, item in zip(output.micro_losses, batches, strict=True)
        if not torch.isfinite(loss)
        for index in item.pairs
    ]
