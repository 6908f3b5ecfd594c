"""What stops a run: a number that is not finite, and a reference that is not the policy's start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.errors import UserError
from dpo_scale.model.layout_check import TOLERANCE
from dpo_scale.training.step import PairBatch, StepOutput, non_finite_rows


class NumericalError(UserError):
    """A loss or gradient that is not finite."""


class WrongReferenceError(UserError):
    """Policy and reference start equal and yet disagree."""


def explain_non_finite(
    step: int, batches: Sequence[PairBatch], output: StepOutput, pairs: TokenPairs, ranks: Ranks, *, may_rescale: bool
) -> None:
    """Raise NumericalError on every rank, naming step, rank and rows; collective.

    Returns only where `may_rescale` (fp16) and every loss is finite: then a lower loss scale may be tried.
    """
    found = ranks.gather_objects(non_finite_rows(output, batches, pairs))
    if may_rescale and not any(found):
        return
    lines = [f"  rank {rank}: {', '.join(rows)}" for rank, rows in enumerate(found) if rows]
    where = "\n".join(lines) or "  every loss is finite; the gradient of the step is not"
    raise NumericalError(
        f"step {step}: not a finite number (gradient norm {output.grad_norm})\n{where}\n"
        "The last checkpoint is untouched. Look at these rows, or lower optim.learning_rate."
    )


def check_weights(step: int, not_finite: str | None, ranks: Ranks) -> None:
    """Raise NumericalError on every rank before weights that are not finite are committed; collective.

    Args:
        not_finite: name of a parameter of which this rank's shard is not.
    """
    found = [name for name in ranks.gather_objects(not_finite) if name]
    if found:
        raise NumericalError(
            f"step {step}: the weights are not finite any more ({found[0]}), and nothing is committed. "
            "The last checkpoint is untouched. Lower optim.learning_rate."
        )


def check_held_out(step: int, loss: float) -> None:
    """Raise NumericalError where the held-out loss, the same on all ranks, is not finite."""
    if not math.isfinite(loss):
        raise NumericalError(
            f"step {step}: the held-out loss is {loss}, and nothing is committed. "
            "The last checkpoint is untouched. Lower optim.learning_rate."
        )


def first_step_gap(output: StepOutput, reference_token_logps: Tensor, ranks: Ranks) -> float:
    """Largest difference of policy and reference on one completion token, in nats, over all ranks; collective.

    Args:
        output: of the first step; its first micro-batch is compared.
        reference_token_logps: fp32 [C], the reference's log-probs of the same tokens.
    """
    gaps = (output.first_token_logps.cpu() - reference_token_logps).abs()
    return ranks.max(torch.tensor([gaps.max().item()], device=ranks.device)).item()


def check_first_step(gap: float, dtype: torch.dtype, model: Path, store: Path) -> None:
    """Raise WrongReferenceError if policy and reference, which start equal, differ by more than rounding.

    A cache of other weights, another template or another precision shows here and nowhere else.
    """
    if not gap <= TOLERANCE[dtype]:  # true for NaN
        raise WrongReferenceError(
            f"step 1: policy and reference start from {model} and differ by {gap:.3g} nats on one token, more than "
            f"{TOLERANCE[dtype]} in {str(dtype).removeprefix('torch.')}; the reference log-probs in {store} are not "
            "this model's (run `dpo-scale cache verify` or remove that folder), or it computes otherwise in training"
        )
