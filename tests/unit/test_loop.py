"""What a stage leaves in its folder beside its checkpoints, and whom it ends with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_numerical_faults import FakePolicy, make_run

from dpo_scale import stages
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.files import write_json
from dpo_scale.locks import is_held_by, this_process
from dpo_scale.training import interruption, loop
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.loop import Run
from dpo_scale.training.run_folder import RunFolder, take_lock
from dpo_scale.training.status import FILES, UNFINISHED, StatusFile, read_status


def test_a_commit_is_told_to_the_status_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checkpoints may be on a disk that is away when the run is next looked at."""
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    run.policy, run.reference = SimpleNamespace(engine=None), SimpleNamespace(commit=lambda: None)
    run.state = RunState(step=7)
    run.records.go_on(run.state)
    snapshot: Any = SimpleNamespace(stored_bytes=0, watched=lambda progress: None)
    monkeypatch.setattr(loop.engine_state, "snapshot", lambda engine: snapshot)
    monkeypatch.setattr(loop.engine_state, "non_finite", lambda engine: {})
    monkeypatch.setattr(loop.guards, "check_weights", lambda *arguments: None)
    monkeypatch.setattr(loop, "save", lambda *arguments, **settings: tmp_path / "elsewhere")
    run.data.model_folder = "base"
    status = StatusFile(tmp_path, "train")
    Run.commit(run, status)
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert noted.committed_step == 7


@pytest.fixture
def _no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave those of this process alone."""
    monkeypatch.setattr(interruption, "SIGNALS", ())
    monkeypatch.setattr(interruption.signal, "set_wakeup_fd", lambda told, warn_on_full_buffer: None)


@pytest.mark.usefixtures("_no_signals")
def test_a_stop_file_that_comes_too_late_goes_with_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the next command in the folder would stop at once."""
    made: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    monkeypatch.setattr(made, "train", lambda interruption, status: True)
    monkeypatch.setattr(made, "start_trackers", lambda: None)
    monkeypatch.setattr(made, "export", (tmp_path / "STOP").touch)
    for name in ("prepare_data", "Reference", "_trajectory", "check_budgets"):
        monkeypatch.setattr(loop, name, lambda *arguments: made.reference)
    made.reference.score_all = lambda *rows: None
    monkeypatch.setattr(loop, "_start", lambda *arguments: made)
    watch: Any = SimpleNamespace(started=0.0)
    status = StatusFile(tmp_path, "train")
    assert loop.train(made.recipe, made.runtime, made.console, None, status, watch) == 0
    assert not (tmp_path / "STOP").exists()


@pytest.mark.usefixtures("_no_signals")
def test_a_stop_file_that_comes_too_late_goes_with_a_scoring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    scored: Any = SimpleNamespace(
        train_rows=None,
        evaluate_rows=None,
        score_all=lambda *rows: (tmp_path / "STOP").touch(),
        rows_computed=0,
        store=SimpleNamespace(folder=tmp_path),
    )
    monkeypatch.setattr(stages.runtime, "start", lambda *arguments: SimpleNamespace(ranks=OneProcess()))
    for name in ("prepare_data", "agreed_digest", "Reference"):
        monkeypatch.setattr(stages, name, lambda *arguments: scored)
    watch: Any = SimpleNamespace(started=0.0, outlive_launcher=lambda: None)
    assert stages.score(run.recipe, run.console, watch) == 0
    assert not (tmp_path / "STOP").exists()


@pytest.mark.usefixtures("_no_signals")
@pytest.mark.parametrize("stage", ["train", "score"])
def test_a_lock_that_is_removed_in_a_scoring_of_days_is_put_back(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    lock = tmp_path / FILES[stage][1]
    held: list[bool] = []

    def score(between_batches: Callable[[], None]) -> None:
        lock.unlink()
        between_batches()
        held.append(is_held_by(lock, this_process()))
        raise interruption.StopRequestedError

    def reference(*arguments: Any) -> Any:
        return SimpleNamespace(
            train_rows=None,
            evaluate_rows=None,
            fingerprint=None,
            score_all=lambda *rows: score(arguments[-1]),
            release=lambda: None,
        )

    monkeypatch.setattr("dpo_scale.training.status.SECONDS_BETWEEN_STEPS", -1.0)
    monkeypatch.setattr(stages.runtime, "start", lambda *arguments: SimpleNamespace(ranks=OneProcess()))
    for name in ("prepare_data", "agreed_digest", "_trajectory", "check_budgets"):
        for module in (loop, stages):
            monkeypatch.setattr(module, name, lambda *arguments: None, raising=False)
    for module in (loop, stages):
        monkeypatch.setattr(module, "Reference", reference)
    watch: Any = SimpleNamespace(started=0.0, outlive_launcher=lambda: None, moved=lambda what: None)
    if stage == "score":
        assert stages.score(run.recipe, run.console, watch) == UNFINISHED
    else:
        status = StatusFile(tmp_path, stage, take_lock(lock))
        assert loop.train(run.recipe, run.runtime, run.console, None, status, watch) == UNFINISHED
    assert held == [True]


def test_only_an_evaluation_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others hear of its end, and stop in their own time."""
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"evaluate": ["held_out.jsonl"]})})
    outliving: list[str] = []
    for name in ("train", "score", "evaluate"):
        watch: Any = SimpleNamespace(outlive_launcher=partial(outliving.append, name))
        monkeypatch.setattr(stages.runtime, "start", lambda *arguments: SimpleNamespace(ranks=OneProcess()))
        monkeypatch.setattr(stages, "by_main", lambda *arguments: pytest.fail("begins"))
        with pytest.raises(pytest.fail.Exception, match="begins"):
            getattr(stages, name)(recipe, run.console, watch)
    assert outliving == ["train", "score"]


def test_an_evaluation_leaves_the_recipe_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its held-out pairs need not be those that the run was trained beside."""
    run: Any = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)[0]
    monkeypatch.setattr(run, "evaluate", lambda: None)
    for name in ("prepare_data", "Reference", "_trajectory", "check_budgets"):
        monkeypatch.setattr(loop, name, lambda *arguments: run.reference)
    run.reference.score_all = lambda *rows: None
    monkeypatch.setattr(loop, "_start", lambda *arguments: run)
    write_json(tmp_path / "data_report.json", {})
    (tmp_path / "recipe.yaml").write_text("model: {path: base}\n")
    write_json(tmp_path / "status.json", {"state": "stopped"})
    folder = RunFolder(run.recipe)
    loop.evaluate_only(run.recipe, run.runtime, run.console, folder, run.watch)
    assert (tmp_path / "recipe.yaml").read_text() == "model: {path: base}\n"
