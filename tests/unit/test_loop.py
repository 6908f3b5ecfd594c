"""What a run leaves in its folder beside its checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_numerical_faults import FakePolicy, make_run

from dpo_scale.training import loop
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.loop import Run
from dpo_scale.training.status import StatusFile, read_status


def test_a_commit_is_told_to_the_status_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checkpoints may be on a disk that is away when the run is next looked at."""
    run, _ = make_run(FakePolicy([]), "float32", monkeypatch, tmp_path)
    run.policy, run.reference = SimpleNamespace(engine=None), SimpleNamespace(commit=lambda: None)  # type: ignore[assignment]
    run.state = RunState(step=7)
    run.records.go_on(run.state)
    snapshot: Any = SimpleNamespace(stored_bytes=0, watched=lambda progress: None)
    monkeypatch.setattr(loop.engine_state, "snapshot", lambda engine: snapshot)
    monkeypatch.setattr(loop.engine_state, "non_finite", lambda engine: {})
    monkeypatch.setattr(loop.guards, "check_weights", lambda *arguments: None)
    monkeypatch.setattr(loop, "save", lambda *arguments, **settings: tmp_path / "elsewhere")
    monkeypatch.setattr(run.data, "model_folder", "base", raising=False)
    status = StatusFile(tmp_path, "train")
    Run.commit(run, status)
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert noted.committed_step == 7
