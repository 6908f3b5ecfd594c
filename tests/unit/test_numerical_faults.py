"""Numbers that are not finite: who is told what, and that a skipped step is no step.

The engine is a fake, because CPUs of today do not train in float16.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import on_ranks, snapshot_of

from dpo_scale.console import Console
from dpo_scale.data.layouts import MicroBatch
from dpo_scale.data.planning import CostModel, Schedule, layout_costs, plan_step
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.recipe import LossSection, Recipe
from dpo_scale.training import loop
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.guards import NumericalError, explain_non_finite
from dpo_scale.training.loop import Run
from dpo_scale.training.metrics import MetricsFile, MetricSums
from dpo_scale.training.optimizer import learning_rate
from dpo_scale.training.records import Records
from dpo_scale.training.status import StatusFile
from dpo_scale.training.step import StepOutput, pair_batches, run_step

STEPS, PAIRS_A_STEP = 3, 2


def make_pairs(count: int) -> TokenPairs:
    ids = np.arange(3, 9, dtype=np.int32)
    return TokenPairs.from_pairs(TokenPair(ids[:2], ids[2:4], ids[4:6], f"pairs.jsonl:{i + 1}") for i in range(count))


class FakePolicy:
    """An engine that applies or skips its steps as it is told, and notes what it was asked to do."""

    def __init__(self, applied: Sequence[bool], losses: float = 0.0) -> None:
        self._applied, self._losses = iter(applied), losses
        self.param_groups: list[dict[str, Any]] = [{"lr": -1.0}]
        self.asked: list[tuple[float, int]] = []
        """Learning rate and completion tokens of each step that the engine saw."""
        self.last: list[bool] = []
        """Whether each micro-batch was the last one of its step."""
        self._tokens = 0

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        tokens = int(batch.lengths.sum())
        self._tokens += tokens
        return torch.full((tokens,), self._losses, requires_grad=True)

    def backward(self, loss_sum: torch.Tensor, *, global_pairs: int, is_last: bool) -> None:
        self.last.append(is_last)

    def step(self) -> bool:
        self.asked.append((self.param_groups[0]["lr"], self._tokens))
        self._tokens = 0
        return next(self._applied)

    def loss_scales_left(self) -> int:
        return 17

    def grad_norm(self) -> float:
        return 1.0


def make_run(policy: FakePolicy, dtype: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Run, list[int]]:
    """A run of three steps of two pairs, and the steps that it commits."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": "base", "dtype": dtype},
            "data": {"train": "pairs.jsonl"},
            "batch": {"global_pairs": PAIRS_A_STEP, "rank_tokens": 64},
            "loss": {"beta": 0.1},
            "track": {"every_steps": 1},
            "run": {"output_dir": str(folder)},
        }
    )
    pairs = make_pairs(STEPS * PAIRS_A_STEP)
    empty = TokenPairs.from_pairs([])
    nothing: Any = SimpleNamespace(
        schedule="upfront",
        is_the_policys_start=False,
        train_rows=None,
        evaluate_rows=None,
        rows_cached=0,
        rows_computed=0,
        logps=lambda rows, indices: np.zeros((len(indices), 2)),
        moved=lambda doing: None,
        rest=lambda: None,
        log=lambda values, step: None,
    )
    runtime: Any = SimpleNamespace(ranks=OneProcess(), accelerator=nothing)
    data: Any = SimpleNamespace(
        train=pairs,
        evaluate=empty,
        costs=lambda pairs, layout: layout_costs(pairs.lengths, layout, CostModel()),
        pad_id=0,
        forward_macs=lambda pairs, layout: 0.0,
    )
    run = Run(
        recipe=recipe,
        runtime=runtime,
        console=Console(io.StringIO()),  # type: ignore[arg-type]
        data=data,
        reference=nothing,
        policy=policy,  # type: ignore[arg-type]
        layout="packed",
        schedule=Schedule(len(pairs), PAIRS_A_STEP, seed=0, epochs=1),
        costs=layout_costs(pairs.lengths, "packed", CostModel()),
        trajectory={},
        state=RunState(),
        folder=None,
        watch=nothing,
        between_batches=lambda: None,
    )
    commits: list[int] = []

    def commit(status: StatusFile) -> None:
        commits.append(run.state.step)
        run.committed_step = run.state.step

    monkeypatch.setattr(run, "commit", commit)
    return run, commits


def test_no_progress_is_expected_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    happened: list[str] = []
    policy: Any = FakePolicy([])
    run: Any = make_run(policy, "float32", monkeypatch, tmp_path)[0]
    policy.engine, run.data.model_folder = None, tmp_path
    run.reference.commit = lambda: happened.append("reference rows")
    run.watch.rest = lambda: happened.append("rest")
    monkeypatch.setattr(loop.guards, "check_weights", lambda *arguments: None)
    monkeypatch.setattr(loop.engine_state, "non_finite", lambda engine: {})
    monkeypatch.setattr(loop.engine_state, "snapshot", lambda engine: snapshot_of({}, 0, 1))
    monkeypatch.setattr(loop, "save", lambda *arguments, **settings: happened.append("checkpoint"))
    Run.commit(run, StatusFile(None, "train"))
    assert happened == ["rest", "reference rows", "checkpoint"]


def test_a_held_out_line_says_of_which_pairs_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file gets it all, the trackers the numbers alone: not all of them take text."""
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    metrics = {"eval/loss": 0.5, "eval/rewards/accuracy": 0.5}
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, **settings: metrics)
    monkeypatch.setattr(loop, "describe", lambda metrics: "")
    run.data.evaluate = make_pairs(2)
    tracked: list[dict[str, Any]] = []
    file = MetricsFile(tmp_path / "metrics.jsonl")
    run.records = Records(OneProcess(), run.console, file, lambda values, step: tracked.append(values))
    run.evaluate()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["eval/pairs"], line["eval/data"]) == (2, make_pairs(2).digest()[:12])
    assert tracked == [{name: value for name, value in line.items() if name not in ("eval/data", "step", "time")}]


def test_the_best_values_are_of_one_set_of_held_out_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    held_out: Any = run.data

    def best_after(loss: float, pairs: TokenPairs) -> float:
        metrics = dict.fromkeys(loop.best_of({}, defaultdict(float)), loss) | {"eval/loss": loss}
        monkeypatch.setattr(loop, "evaluate", lambda *arguments, **settings: metrics)
        monkeypatch.setattr(loop, "describe", lambda metrics: "")
        held_out.evaluate = pairs
        run.evaluate()
        return run.state.best["eval/loss"]

    assert [best_after(loss, make_pairs(2)) for loss in (0.3, 0.5)] == [0.3, 0.3]
    assert [best_after(loss, make_pairs(3)) for loss in (0.6, 0.4)] == [0.6, 0.4]
    run.state = replace(run.state, held_out="")  # of a checkpoint that did not note it
    assert best_after(0.5, make_pairs(3)) == 0.4


UNDISTURBED: Any = SimpleNamespace(reason=lambda needed_seconds=0.0: "")


def test_steps_that_overflow_float16_are_counted_and_move_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = FakePolicy([False, False, True, True, False, True])
    run, commits = make_run(policy, "float16", monkeypatch, tmp_path)
    assert run.train(UNDISTURBED, StatusFile(None, "train"))
    rates = [learning_rate(step, STEPS, run.recipe.optim) for step in range(STEPS)]
    assert [rate for rate, _ in policy.asked] == [rates[i] for i in (0, 0, 0, 1, 2, 2)]
    tokens = PAIRS_A_STEP * 4
    assert [seen for _, seen in policy.asked] == [tokens] * 6  # each try has the whole step
    assert run.state.skipped_steps == 3
    assert (run.state.step, run.state.pairs) == (STEPS, STEPS * PAIRS_A_STEP)
    assert run.state.completion_tokens == STEPS * tokens
    assert commits == [STEPS]


def test_only_the_last_micro_batch_of_a_step_is_called_the_last() -> None:
    """There the engine reduces what it has summed: earlier, gradients would be exchanged for nothing."""
    pairs, policy = make_pairs(3), FakePolicy([True])
    costs = layout_costs(pairs.lengths, "packed", CostModel())
    plan = plan_step(np.arange(3), costs, world_size=1, rank_tokens=int(costs.tokens[0]), step=0)
    run_step(
        policy,
        list(pair_batches(plan, 0, pairs, "packed", 0)),
        lambda indices: np.zeros((len(indices), 2)),
        MetricSums(torch.device("cpu")),
        LossSection(beta=0.1),
        global_pairs=3,
        device=torch.device("cpu"),
    )
    assert policy.last == [False, False, True]


def test_float16_that_overflows_at_every_scale_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = FakePolicy([True] + [False] * 100)
    run, commits = make_run(policy, "float16", monkeypatch, tmp_path)
    with pytest.raises(NumericalError, match="step 2: the gradient overflows float16 at every loss scale"):
        run.train(UNDISTURBED, StatusFile(None, "train"))
    assert (run.state.step, commits) == (1, [])
    assert len(policy.asked) == 1 + policy.loss_scales_left()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_that_the_engine_skips_in_another_precision_stops_the_run(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, commits = make_run(FakePolicy([True, False]), dtype, monkeypatch, tmp_path)
    with pytest.raises(NumericalError, match="step 2: not a finite number") as caught:
        run.train(UNDISTURBED, StatusFile(None, "train"))
    assert "every loss is finite; the gradient of the step is not" in str(caught.value)
    assert (run.state.step, commits) == (1, [])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_loss_that_is_no_number_is_not_tried_again(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = FakePolicy([False], losses=float("nan"))
    run, commits = make_run(policy, dtype, monkeypatch, tmp_path)
    with pytest.raises(NumericalError) as caught:
        run.train(UNDISTURBED, StatusFile(None, "train"))
    expected = sorted(run.data.train.rows[int(index)] for index in run.schedule.pairs_of(0))
    first, rank = str(caught.value).splitlines()[:2]
    assert first.startswith("step 1: not a finite number")
    assert sorted(rank.removeprefix("  rank 0: ").split(", ")) == expected
    assert "The last checkpoint is untouched" in str(caught.value)
    assert (len(policy.asked), commits) == (1, [])


def test_the_rank_and_the_rows_of_its_micro_batch_are_named_on_every_rank() -> None:
    pairs = make_pairs(8)
    batches: Any = [SimpleNamespace(pairs=np.array([2, 5])), SimpleNamespace(pairs=np.array([1, 3]))]

    def attempt(ranks: Any) -> None:
        second = torch.tensor(float("inf")) if ranks.rank == 1 else torch.tensor(0.7)
        output = StepOutput(True, float("nan"), (torch.tensor(0.6), second), torch.zeros(1))
        explain_non_finite(7, batches, output, pairs, ranks, may_rescale=False)

    errors = on_ranks(2, attempt)
    assert all(isinstance(error, NumericalError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).splitlines()[:2] == [
        "step 7: not a finite number (gradient norm nan)",
        "  rank 1: pairs.jsonl:2, pairs.jsonl:4",
    ]
