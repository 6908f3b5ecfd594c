"""The held-out pass, with a fake engine."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_scale.console import Console
from dpo_scale.data.layouts import MicroBatch
from dpo_scale.data.planning import CostModel, layout_costs, plan_pass
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.recipe import LossSection
from dpo_scale.training.evaluation import evaluate
from dpo_scale.training.interruption import StopRequestedError


class FakePolicy:
    """An engine that finds every token equally likely, and notes its modes."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> None:
        self.modes.append(mode)

    def __call__(self, batch: MicroBatch) -> Tensor:
        return torch.zeros(int(batch.lengths.sum()))


@pytest.mark.parametrize("stopped_at", [None, 2])
def test_a_pass_that_is_stopped_half_way_leaves_the_engine_in_training(stopped_at: int | None) -> None:
    """A commit follows, and what evaluation fetched ahead must have come home."""
    ids = np.arange(3, 9, dtype=np.int32)
    pairs = TokenPairs.from_pairs(TokenPair(ids[:2], ids[2:4], ids[4:6], f"row {n}") for n in range(4))
    policy, passed = FakePolicy(), 0

    def between_batches() -> None:
        nonlocal passed
        passed += 1
        if passed == stopped_at:
            raise StopRequestedError

    def run() -> dict[str, float]:
        return evaluate(
            policy,
            plan_pass(layout_costs(pairs.lengths, "shared", CostModel()), world_size=1, rank_tokens=6),
            pairs,
            lambda indices: np.zeros((len(indices), 2)),
            OneProcess(),
            Console(io.StringIO()),  # type: ignore[arg-type]
            LossSection(beta=1.0),
            layout="shared",
            pad_id=0,
            between_batches=between_batches,
        )

    if stopped_at is None:
        assert run()["eval/loss"] == pytest.approx(np.log(2))
        assert passed == 4
    else:
        with pytest.raises(StopRequestedError):
            run()
    assert policy.modes == [False, True]
