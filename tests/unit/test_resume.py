"""Which checkpoint a run goes on from, and what it refuses to go on from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from fake_engine import TRAJECTORY, make_parameters, on_ranks, snapshot_of

from dpo_scale.console import Console
from dpo_scale.distributed import engine_state
from dpo_scale.errors import UserError
from dpo_scale.recipe import Recipe
from dpo_scale.reference.fingerprint import ReferenceFingerprint
from dpo_scale.training import checkpoints
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.resume import _find, resume
from dpo_scale.training.run_folder import RunFolder, what_matters
from dpo_scale.training.status import StatusFile


def recipe(folder: Path, wanted: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "base"},
            "data": {"train": "pairs.jsonl"},
            "batch": {"global_pairs": 8},
            "loss": {"beta": 0.1},
            "run": {"output_dir": str(folder), "resume": wanted},
        }
    )


def commit(folder: Path, step: int, origin: str = "") -> Path:
    def save(ranks: Any) -> Path:
        return checkpoints.save(
            folder / "checkpoints",
            snapshot_of(make_parameters({"weight": (3, 4)}), ranks.rank, ranks.world_size),
            RunState(step=step, origin=origin, unlogged=(0.5, 2.0)),
            ranks,
            trajectory=TRAJECTORY,
            source_model="/models/source",
            keep_last=9,
        )

    path = on_ranks(1, save)[0]
    assert isinstance(path, Path), path
    return path


def found(folder: Path, wanted: str) -> Path | None:
    def find(ranks: Any) -> Any:
        return _find(recipe(folder, wanted), ranks, Console(io.StringIO()))  # type: ignore[arg-type]

    answer = on_ranks(1, find)[0]
    if isinstance(answer, Exception):
        raise answer
    return None if answer is None else answer.path


def resumed(folder: Path, wanted: str, engine: Any) -> Any:
    def go_on(ranks: Any) -> Any:
        trajectory = what_matters(TRAJECTORY)
        return resume(recipe(folder, wanted), ranks, Console(io.StringIO()), engine, trajectory)  # type: ignore[arg-type]

    return on_ranks(1, go_on)[0]


def refused(folder: Path, trajectory: dict[str, Any]) -> Exception:
    def go_on(ranks: Any) -> Any:
        return resume(recipe(folder, "auto"), ranks, Console(io.StringIO()), None, trajectory)  # type: ignore[arg-type]

    error = on_ranks(1, go_on)[0]
    assert isinstance(error, UserError), error
    return error


def test_a_checkpoint_named_by_path_is_where_to_start_and_not_where_each_preemption_leads_back_to(
    tmp_path: Path,
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    named = str(commit(other, step=3))
    commit(run, step=9)  # of an attempt that did not start there
    assert found(run, named) == Path(named)
    further = commit(run, step=5, origin=named)  # and has not got as far yet
    assert found(run, named) == further
    assert found(run, "auto") == run / "checkpoints" / "step-00000009"
    further = commit(run, step=11, origin=named)
    assert found(run, named) == further
    assert found(run, "auto") == further
    assert found(run, "never") is None


def test_a_checkpoint_is_the_same_however_its_path_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    named = commit(other, step=3)
    (tmp_path / "link").symlink_to(named)
    monkeypatch.chdir(tmp_path)
    spellings = [str(named), f"{named}/", str(named.relative_to(tmp_path)), "link"]
    for step, before in enumerate(spellings, 5):
        further = commit(run, step, origin=before)  # as earlier versions noted it too
        assert [found(run, spelling) for spelling in spellings] == [further] * 4
    further = commit(run, step=9, origin=str(named))
    commit(run, step=10)  # of an attempt that no path led to
    monkeypatch.chdir(named)
    assert found(run, ".") == further


def test_a_resumed_run_counts_its_resumes_and_knows_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = commit(tmp_path, step=3)
    restored = []
    monkeypatch.setattr(engine_state, "restore", lambda engine, *state: restored.append(engine))
    engine = snapshot_of(make_parameters({"weight": (3, 4)}), 0, 1)
    monkeypatch.setattr(engine_state, "snapshot", lambda engine: engine)
    for wanted, origin in (("auto", ""), (f"{path}/", str(path))):
        state = resumed(tmp_path, wanted, engine)
        assert state == RunState(step=3, resumes=1, origin=origin, unlogged=(0.5, 2.0))
    commit(tmp_path, step=4, origin="/from")
    assert resumed(tmp_path, "auto", engine).origin == "/from"
    assert restored == [engine] * 3
    another = snapshot_of(make_parameters({"weight": (3, 5)}), 0, 1)
    assert "1 parameters differ; weight: (3, 4) stored, (3, 5) in the model" in str(resumed(tmp_path, "auto", another))
    assert restored == [engine] * 3


def test_damage_everywhere_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    path = commit(tmp_path, step=3)
    (path / "rank-00000-of-00001.safetensors").write_bytes(b"rotten")
    with pytest.raises(UserError, match="no checkpoint is whole, and starting anew would overwrite"):
        found(tmp_path, "auto")


def test_checkpoints_that_are_away_are_no_reason_to_start_anew(tmp_path: Path) -> None:
    StatusFile(tmp_path, "train").advance(2)
    assert found(tmp_path, "auto") is None  # nothing was committed
    status = StatusFile(tmp_path, "train")
    commit(tmp_path, step=3)
    status.committed(3)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    StatusFile(tmp_path, "train")
    for make in (lambda: None, (tmp_path / "checkpoints").mkdir):
        make()
        with pytest.raises(UserError, match=r"no checkpoint is there, and step 3 was committed; .* run\.resume=never"):
            found(tmp_path, "auto")
        assert found(tmp_path, "never") is None
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    assert found(tmp_path, "auto") == tmp_path / "checkpoints" / "step-00000003"


def test_what_differs_from_the_run_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    """Where its files lay does not count, though earlier versions noted it."""
    path = commit(tmp_path, step=3)
    error = refused(tmp_path, {"data.train": [{}], "loss.beta": 0.7, "files of the reference": "abc"})
    assert str(error).splitlines() == [
        f"{path}: the checkpoint of another run",
        "  files of the reference: was None, is 'abc'",
        "  loss.beta: was 0.5, is 0.7",
        "choose another run.output_dir, or restore what changed",
    ]


def test_a_run_on_other_pairs_is_refused_before_they_are_scored(tmp_path: Path) -> None:
    reference = ReferenceFingerprint(1, "float32", {"model.safetensors": "0" * 64}, {}, {}, "org/base")
    before = RunFolder(recipe(tmp_path, "auto"))
    before.claim(reference, TRAJECTORY)
    before._lock.close()
    (commit(tmp_path, step=3) / "commit.json").rename(tmp_path / "away")
    commit(tmp_path, step=1)
    path = commit(tmp_path, step=2)  # the newest that is one
    other = {**what_matters(TRAJECTORY), "tokens of the training pairs": "abc"}
    folder = RunFolder(recipe(tmp_path, "auto"))
    with pytest.raises(UserError, match=f"{path}: the checkpoint of another run\n  tokens of the training pairs: was"):
        folder.claim(reference, other)
    folder.claim(reference, what_matters(TRAJECTORY))
    folder._lock.close()
    RunFolder(recipe(tmp_path, "never")).claim(reference, other)


def test_the_open_log_interval_comes_back(tmp_path: Path) -> None:
    path = commit(tmp_path, step=3)
    assert checkpoints.open_checkpoint(path).commit.run == RunState(step=3, unlogged=(0.5, 2.0))
