"""What stops a run before it is lost: on every rank, and with a name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import on_ranks

from dpo_scale.training.guards import (
    NumericalError,
    WrongReferenceError,
    check_first_step,
    check_held_out,
    check_weights,
    explain_non_finite,
    first_step_gap,
)


def test_weights_that_are_not_finite_on_one_rank_stop_all() -> None:
    assert on_ranks(2, lambda ranks: check_weights(7, None, ranks)) == [None, None]
    first, second = on_ranks(2, lambda ranks: check_weights(7, "head" if ranks.rank else None, ranks))
    assert isinstance(first, NumericalError)
    assert str(first) == str(second)
    assert str(first).startswith("step 7: the weights are not finite any more (head), and nothing is committed")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_though_the_scale_may_be_lowered() -> None:
    pairs: Any = [SimpleNamespace(row="pairs.jsonl:1"), SimpleNamespace(row="pairs.jsonl:2")]
    batches: Any = [SimpleNamespace(pairs=[0]), SimpleNamespace(pairs=[1])]

    def explain(ranks: Any) -> None:
        losses = torch.tensor([1.0, float("nan") if ranks.rank == faulty else 1.0])
        output: Any = SimpleNamespace(micro_losses=tuple(losses), grad_norm=float("nan"))
        explain_non_finite(7, batches, output, pairs, ranks, may_rescale=True)

    faulty = 1
    first, second = on_ranks(2, explain)
    assert isinstance(first, NumericalError)
    assert str(first) == str(second)
    assert "\n  rank 1: pairs.jsonl:2\n" in str(first)
    faulty = -1
    assert on_ranks(2, explain) == [None, None]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(loss: float) -> None:
    check_held_out(3, 0.7)
    with pytest.raises(NumericalError, match=f"step 3: the held-out loss is {loss}"):
        check_held_out(3, loss)


def test_the_largest_gap_of_all_ranks_is_every_ranks_gap() -> None:
    def gap(ranks: Any) -> float:
        output: Any = SimpleNamespace(first_token_logps=torch.tensor([-1.0, -2.0]))
        return first_step_gap(output, torch.tensor([-1.0, -2.0 - ranks.rank]), ranks)

    assert on_ranks(3, gap) == [2.0] * 3


@pytest.mark.parametrize("gap", [0.1, float("nan"), float("inf")])
def test_a_reference_that_is_not_the_policys_start_is_refused(gap: float) -> None:
    check_first_step(1e-5, torch.float32, Path("model"), Path("store"))
    with pytest.raises(WrongReferenceError, match="store"):
        check_first_step(gap, torch.float32, Path("model"), Path("store"))
