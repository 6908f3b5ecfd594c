"""One run, one folder, one recipe: the lock, the comparison, the records."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from dpo_scale import locks
from dpo_scale.distributed.parameter_slices import EngineCounters
from dpo_scale.errors import RecipeError, UserError
from dpo_scale.files import write_json
from dpo_scale.recipe import Recipe, load_recipe
from dpo_scale.reference.fingerprint import ReferenceFingerprint, read_fingerprint, settings_digest
from dpo_scale.training import run_folder
from dpo_scale.training.checkpoints import Commit, RunState, digest_of
from dpo_scale.training.run_folder import (
    RunFolder,
    changed_settings,
    compare_with_stored,
    differences,
    flatten,
    take_lock,
    trajectory_of,
    what_matters,
)
from dpo_scale.training.status import StatusFile


def _recipe(folder: Path, **changes: Any) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "base"},
        "data": {"train": ["pairs.jsonl"]},
        "batch": {"global_pairs": 8},
        "loss": {"beta": 0.1},
        "run": {"output_dir": str(folder)},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return Recipe.model_validate(values)


def _reference(**weights: str) -> ReferenceFingerprint:
    return ReferenceFingerprint(1, "float32", weights or {"model.safetensors": "0" * 64}, {}, {}, "org/base")


def commit(folder: RunFolder, step: int = 4) -> Path:
    """What looks like a checkpoint from outside."""
    path = folder.checkpoints / f"step-{step:08d}"
    write_json(path / "commit.json", {})
    return path


def commit_of(folder: RunFolder, trajectory: dict[str, Any]) -> None:
    """A commit record that can be read."""
    run, counters = RunState(step=4), EngineCounters(4, 4, 0, None)
    record = Commit(run, 1, trajectory, "base", "LlamaForCausalLM", "float32", {}, counters, ())
    write_json(folder.checkpoints / "step-00000004" / "commit.json", record.to_json())


HOLDER = """
import sys, time
from dpo_scale.recipe import load_recipe
from dpo_scale.training.run_folder import RunFolder

folder = RunFolder(load_recipe(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that works in the folder `run`."""
    RunFolder(_recipe(tmp_path / "run"))._lock.close()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "recipe.yaml")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_with_its_holder_until_that_is_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    recipe = _recipe(tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        RunFolder(recipe)
    assert str(caught.value) == (
        f"run.output_dir: {tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}; "
        "stop that run, or choose another folder"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert RunFolder(recipe).path == tmp_path / "run"


@pytest.fixture
def lock_of_node17(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """The lock of `run`, which a file server keeps for a process on another host."""
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX)
        file.write("process 4242 on node17\n")
        file.flush()
        yield file


def test_a_holder_on_another_host_is_waited_for_and_may_be_gone_later(tmp_path: Path, lock_of_node17: TextIO) -> None:
    said: list[str] = []
    lock = tmp_path / "run" / ".lock"
    with pytest.raises(RecipeError) as caught:
        take_lock(lock, said.append, lease_s=0.06)
    assert str(caught.value) == (
        f"run.output_dir: {tmp_path / 'run'} is in use by process 4242 on node17; stop that run, or choose another "
        f"folder. If that host is lost and stays away, remove {lock}"
    )
    assert caught.value.may_pass  # a batch script tries once more
    assert said == [
        f"{lock} is held by process 4242 on node17: waiting up to 0.001 minutes, in which the lock of a host that was "
        "lost runs out"
    ]


@pytest.mark.parametrize("how", ["runs out", "is removed"])
def test_a_lock_that_ends_while_it_is_waited_for_is_taken(how: str, tmp_path: Path, lock_of_node17: TextIO) -> None:
    lock = tmp_path / "run" / ".lock"
    end = lock_of_node17.close if how == "runs out" else lock.unlink
    with take_lock(lock, lambda _: end(), lease_s=60):
        assert locks.is_held_by(lock, locks.this_process())


def test_a_holder_on_this_host_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    said: list[str] = []
    with take_lock(tmp_path / ".lock"), pytest.raises(RecipeError, match="is in use by process") as caught:
        take_lock(tmp_path / ".lock", said.append, lease_s=60)
    assert not caught.value.may_pass
    assert not said


def test_a_lock_that_is_removed_is_put_back_with_the_next_note(tmp_path: Path) -> None:
    """A purge of old files; the run goes on, and nobody else may come into its folder."""
    status = RunFolder(_recipe(tmp_path)).open_status()
    lock = tmp_path / ".lock"
    for _ in range(2):
        lock.unlink()
        status.enter("training")
        assert locks.is_held_by(lock, locks.this_process())
    with pytest.raises(RecipeError, match="is in use by process"):
        take_lock(lock)


def test_a_note_keeps_the_lock_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_scale.training.status.SECONDS_BETWEEN_STEPS", -1.0)
    status = StatusFile(tmp_path, "score", take_lock(tmp_path / ".score.lock"))
    os.utime(tmp_path / ".score.lock", (0, 0))
    status.go_on()
    assert (tmp_path / ".score.lock").stat().st_mtime > 0


def test_a_run_whose_lock_was_removed_and_taken_by_another_ends_with_its_name_and_notes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    status = RunFolder(_recipe(tmp_path)).open_status()
    before = (tmp_path / "status.json").read_bytes()
    (tmp_path / ".lock").unlink()
    with open(tmp_path / ".lock", "w") as other:
        locks.fcntl.flock(other, locks.fcntl.LOCK_EX)
        other.write("process 4242 on node17\n")
        other.flush()
        with pytest.raises(UserError) as caught:
            status.enter("training")
    assert str(caught.value) == (
        f"{tmp_path / '.lock'} was removed while this run held it, and process 4242 on node17 has taken it since: this "
        "run ends, for two must not write into one folder"
    )
    assert (tmp_path / "status.json").read_bytes() == before


def test_a_lock_that_cannot_be_put_back_for_now_is_put_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = take_lock(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()

    def fail(file: TextIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(locks, "_sign", fail)
        lock.renew()
    assert not locks.is_held_by(tmp_path / ".lock", locks.this_process())
    lock.renew()
    assert locks.is_held_by(tmp_path / ".lock", locks.this_process())


def test_the_resolved_recipe_is_written_and_reads_back(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path / "deep" / "run")
    RunFolder(recipe)
    assert load_recipe(tmp_path / "deep" / "run" / "recipe.yaml") == recipe


def test_changed_settings_are_refused_by_name_once_there_are_checkpoints(tmp_path: Path) -> None:
    first = RunFolder(_recipe(tmp_path))
    commit(first)
    first._lock.close()
    with pytest.raises(RecipeError) as caught:
        RunFolder(_recipe(tmp_path, loss__beta=0.2, run__seed=3, track__every_steps=1))
    assert str(caught.value).splitlines() == [
        f"run.output_dir: {tmp_path} holds a run of another recipe",
        "  loss.beta: was 0.1, is 0.2",
        "  run.seed: was 0, is 3",
        "choose another folder, or restore these settings",
    ]
    assert load_recipe(tmp_path / "recipe.yaml") == _recipe(tmp_path)  # the refused one left no trace


@pytest.mark.parametrize(
    "text", ["", "- flour\n", "flour: 500 g\n", "model:\n", "model: [\n", "# the third try\nloss:\n  beta: 0.2\n"]
)
def test_a_recipe_that_no_run_wrote_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"holds a recipe\.yaml that no run wrote"):
        RunFolder(_recipe(tmp_path))
    assert (tmp_path / "recipe.yaml").read_text() == text


@pytest.mark.parametrize("damage", [b"", b"loss:\n  beta: 0.\xff\n", b"loss: [", b"- flour\n"])
def test_a_recipe_that_cannot_be_read_does_not_stop_a_run_with_checkpoints(damage: bytes, tmp_path: Path) -> None:
    first = RunFolder(_recipe(tmp_path))
    first._lock.close()
    (tmp_path / "recipe.yaml").write_bytes(damage)
    with pytest.raises(RecipeError, match=r"holds a recipe\.yaml that no run wrote"):
        RunFolder(_recipe(tmp_path))
    commit(first)
    assert compare_with_stored(_recipe(tmp_path)) == ["recipe.yaml: cannot be read"]
    assert RunFolder(_recipe(tmp_path)).harmless_changes == [
        "recipe.yaml: could not be read, and begins anew; the old one is recipe.yaml.unreadable"
    ]
    assert (tmp_path / "recipe.yaml.unreadable").read_bytes() == damage
    assert load_recipe(tmp_path / "recipe.yaml") == _recipe(tmp_path)


@pytest.mark.parametrize("damage", [b"", b'{"state": "runn', b'{"state": "\xff"}'])
def test_a_status_that_cannot_be_read_does_not_stop_a_run_with_checkpoints(damage: bytes, tmp_path: Path) -> None:
    first = RunFolder(_recipe(tmp_path))
    commit(first)
    first._lock.close()
    (tmp_path / "status.json").write_bytes(damage)
    assert RunFolder(_recipe(tmp_path)).harmless_changes == [
        "status.json: could not be read, and begins anew; the old one is status.json.unreadable"
    ]
    StatusFile(tmp_path, "train")
    assert (tmp_path / "status.json.unreadable").read_bytes() == damage


def test_a_comment_in_the_recipe_of_a_run_does_not_keep_it_from_going_on(tmp_path: Path) -> None:
    RunFolder(_recipe(tmp_path))._lock.close()
    with open(tmp_path / "recipe.yaml", "a") as file:
        file.write("# preempted twice\n")
    with pytest.raises(RecipeError, match=r"holds a recipe\.yaml that no run wrote"):
        RunFolder(_recipe(tmp_path))
    (tmp_path / "status.json").write_text("{}")
    assert RunFolder(_recipe(tmp_path)).harmless_changes == []


def test_a_run_whose_checkpoints_are_away_takes_no_other_recipe_and_does_not_start_anew(tmp_path: Path) -> None:
    first = RunFolder(_recipe(tmp_path))
    commit(first)
    StatusFile(tmp_path, "train")
    first._lock.close()
    first.checkpoints.rename(tmp_path / "away")
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        RunFolder(_recipe(tmp_path, loss__beta=0.2))
    second = RunFolder(_recipe(tmp_path))
    StatusFile(tmp_path, "train")  # of the attempt that finds nothing
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint is there, and step 4 was committed; bring the folder back"):
            second.claim(_reference(), {})
    write_json(second.checkpoints / ".step-00000004.partial" / "commit.json", {})
    second.claim(_reference(), {})  # the commit only lacks its name
    second._lock.close()
    shutil.rmtree(second.checkpoints)
    RunFolder(_recipe(tmp_path, run__resume="never")).claim(_reference(), {})


def test_a_run_that_has_committed_nothing_may_change(tmp_path: Path) -> None:
    RunFolder(_recipe(tmp_path))._lock.close()
    RunFolder(_recipe(tmp_path, loss__beta=0.2))
    assert load_recipe(tmp_path / "recipe.yaml").loss.beta == 0.2


@pytest.mark.parametrize("has_committed", [False, True])
def test_whoever_only_evaluates_leaves_the_recipe_that_the_run_was_trained_with(
    has_committed: bool, tmp_path: Path
) -> None:
    first = RunFolder(_recipe(tmp_path, data__evaluate=["held.jsonl"]))
    first.claim(_reference(), {})
    write_json(tmp_path / "data_report.json", {})
    if has_committed:
        commit(first)
    first._lock.close()
    RunFolder(_recipe(tmp_path, data__evaluate=["held2.jsonl"]))._lock.close()
    assert load_recipe(tmp_path / "recipe.yaml").data.evaluate[0].path == "held.jsonl"


def test_harmless_changes_are_taken_and_told(tmp_path: Path) -> None:
    first = RunFolder(_recipe(tmp_path))
    commit(first)
    first._lock.close()
    second = RunFolder(_recipe(tmp_path, batch__rank_tokens=64, checkpoint__keep_last=9))
    assert second.harmless_changes == [
        "batch.rank_tokens: was 16384, is 64",
        "checkpoint.keep_last: was 2, is 9",
    ]
    shutil.rmtree(second.checkpoints / "step-00000004")
    commit_of(second, {})
    second.claim(_reference(), {})
    assert load_recipe(tmp_path / "recipe.yaml").batch.rank_tokens == 64


def test_a_start_that_is_refused_late_leaves_the_recipe_of_the_run(tmp_path: Path) -> None:
    """An export would take its tokenizer from there."""
    first = RunFolder(_recipe(tmp_path))
    commit_of(first, {"tokens of the training pairs": "a"})
    first._lock.close()
    before = (tmp_path / "recipe.yaml").read_bytes()
    second = RunFolder(_recipe(tmp_path, model__tokenizer="another"))
    assert second.harmless_changes == ["model.tokenizer: was None, is 'another'"]
    with pytest.raises(UserError, match="the checkpoint of another run"):
        second.claim(_reference(), {"tokens of the training pairs": "b"})
    assert (tmp_path / "recipe.yaml").read_bytes() == before
    second.claim(_reference(), {"tokens of the training pairs": "a"})
    assert load_recipe(tmp_path / "recipe.yaml").model.tokenizer == "another"


TRAJECTORY = {
    "model": {"path", "revision", "dtype", "dropout", "trust_remote_code"},
    "data": {
        "train",
        "max_length",
        "max_prompt_length",
        "max_completion_length",
        "truncation",
        "chat_template",
        "on_bad_row",
        "on_no_preference",
        "completion_pairs",
        "completion_margin",
    },
    "batch": {"global_pairs"},
    "loss": {"type", "beta", "reduction", "label_smoothing"},
    "optim": {
        "learning_rate",
        "schedule",
        "warmup_ratio",
        "weight_decay",
        "betas",
        "eps",
        "max_grad_norm",
    },
    "run": {"seed", "epochs", "max_steps"},
}
"""Every setting that changes what is trained; a new setting must be put on one side or the other."""
HASHED = {"model.path", "model.revision"}
"""Of these, what does not where the policy starts as the reference, whose files are hashed."""


@pytest.mark.parametrize("reference", [None, "elsewhere"])
def test_what_matters_is_exactly_what_changes_the_trajectory(reference: str | None, tmp_path: Path) -> None:
    names = flatten(_recipe(tmp_path)).keys()
    before, after = (dict.fromkeys(names, value) | {"reference.path": reference} for value in (1, 2))
    matters, harmless = changed_settings(before, after)
    expected = {f"{section}.{field}" for section, fields in TRAJECTORY.items() for field in fields}
    expected -= set() if reference else HASHED
    names -= {"reference.path"}
    assert {line.partition(":")[0] for line in matters} == expected
    assert {line.partition(":")[0] for line in harmless} == set(names) - expected


def test_a_trajectory_follows_from_settings_tokens_and_the_reference(tmp_path: Path) -> None:
    expected = trajectory_of(_recipe(tmp_path), "tokens", "reference")
    elsewhere = _recipe(tmp_path / "elsewhere", batch__rank_tokens=64)
    assert differences(expected, trajectory_of(elsewhere, "tokens", "reference")) == []
    other = trajectory_of(_recipe(tmp_path, loss__beta=0.2), "other tokens", "another")
    assert differences(expected, other) == [
        "files of the reference: was 'reference', is 'another'",
        "loss.beta: was 0.1, is 0.2",
        "tokens of the training pairs: was 'tokens', is 'other tokens'",
    ]


def test_files_may_move(tmp_path: Path) -> None:
    """What they hold is compared by its digests, once it is read."""
    first = RunFolder(_recipe(tmp_path, data__train=[{"path": "a.jsonl", "rows": 5}, {"path": "b.jsonl"}]))
    commit(first)
    first._lock.close()
    moved = _recipe(
        tmp_path, model__path="/new/model", data__train=[{"path": "/new/a.jsonl", "rows": 5}, {"path": "b.jsonl"}]
    )
    second = RunFolder(moved)
    second._lock.close()
    assert second.harmless_changes == [
        "data.train.path: was ['a.jsonl', 'b.jsonl'], is ['/new/a.jsonl', 'b.jsonl']",
        f"model.path: was {_recipe(tmp_path).model.path!r}, is '/new/model'",
    ]
    expected = trajectory_of(_recipe(tmp_path, data__train=[{"path": "a", "rows": 5}]), "tokens", "reference")
    elsewhere = _recipe(tmp_path, model__path="/new", data__train=[{"path": "b", "rows": 5}])
    assert trajectory_of(elsewhere, "tokens", "reference") == expected
    with pytest.raises(RecipeError, match=r"data\.train: was .*'rows': 5.* is .*'rows': 6"):
        RunFolder(_recipe(tmp_path, data__train=[{"path": "/new/a.jsonl", "rows": 6}, {"path": "b.jsonl"}]))


@pytest.mark.parametrize(("before", "after"), [("a", "a"), (None, "base"), ("a", None)])
def test_a_policy_that_is_not_the_reference_may_not_move(before: str | None, after: str | None, tmp_path: Path) -> None:
    """Nobody hashes its weights: another start under the same name as the old one would go unseen."""
    first = RunFolder(_recipe(tmp_path, reference__path=before))
    commit(first)
    first._lock.close()
    moved = _recipe(tmp_path, model__path="another", reference__path=after)
    with pytest.raises(RecipeError, match=r"model\.path: was 'base', is 'another'"):
        RunFolder(moved)
    of_an_older_version = flatten(_recipe(tmp_path, reference__path=before))
    for stored in (of_an_older_version, what_matters(of_an_older_version)):
        lines = differences(what_matters(stored), trajectory_of(moved, "tokens", "reference"))
        assert any(line.startswith("model.path: was ") for line in lines)


def test_a_policy_that_is_not_the_reference_is_known_by_its_settings(tmp_path: Path) -> None:
    """Its weights come from the checkpoint; what its config.json says of rotations or norms does not."""
    recipe = _recipe(tmp_path)
    before = trajectory_of(recipe, "tokens", "reference", settings_digest(_model(tmp_path / "a", rope_theta=10000)))
    same = settings_digest(_model(tmp_path / "b", rope_theta=10000, transformers_version="9"))
    assert differences(before, trajectory_of(recipe, "tokens", "reference", same)) == []
    other = settings_digest(_model(tmp_path / "c", rope_theta=100))
    (line,) = differences(before, trajectory_of(recipe, "tokens", "reference", other))
    assert line.startswith("config.json of the policy: was ")


def _model(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_that_holds_another_model_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    folder, trajectory = RunFolder(_recipe(tmp_path / "run")), {"loss.beta": 0.1}
    folder.claim(_reference(), trajectory)
    write_json(folder.path / "model" / "provenance.json", {"trajectory_digest": digest_of(trajectory)})
    folder.claim(_reference(), trajectory)
    with pytest.raises(UserError, match="run/model holds something else than an export of this run"):
        folder.claim(_reference(), {"loss.beta": 0.2})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"run\.output_dir: .*file/run: Not a directory"):
        RunFolder(_recipe(tmp_path / "file" / "run"))


def test_checkpoints_that_could_not_be_written_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "run" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "scratch")
    with pytest.raises(RecipeError, match=r"run/checkpoints: a link to .*/scratch, which is not there; checkpoints"):
        RunFolder(_recipe(tmp_path / "run"))
    (tmp_path / "scratch").mkdir()
    folder = RunFolder(_recipe(tmp_path / "run"))
    folder._lock.close()
    assert list(link.iterdir()) == []

    def fail(dir: Path) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", fail)
    with pytest.raises(RecipeError, match="run/checkpoints: Read-only file system; checkpoints are to be written"):
        RunFolder(_recipe(tmp_path / "run"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(
        RecipeError, match=rf"run\.output_dir: {tmp_path}: its file system locks no files \({os.strerror(code)}\)"
    ):
        RunFolder(_recipe(tmp_path))
    assert not locks.is_held_by(tmp_path / ".lock", locks.this_process())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RecipeError, match=rf"run\.output_dir: {tmp_path}/runs/one: Not a directory\Z"):
        RunFolder(_recipe(tmp_path / "runs" / "one"))


def test_a_checkout_without_git_beside_it_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(_recipe(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    folder.write_environment(world_size=1, device="cpu")
    assert json.loads((tmp_path / "environment.json").read_text())["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_of_another_user_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "dpo_scale" / "training" / "run_folder.py"))
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    ours = run_folder._commit()
    assert ours is not None
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert run_folder._commit() == ours


def test_the_environment_is_recorded(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.write_environment(world_size=4, device="cpu")
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["world_size"] == 4
    assert written["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert set(written["packages"]) >= {"torch", "deepspeed", "dpo_scale"}


def test_other_versions_than_at_the_last_start_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder, versions = RunFolder(_recipe(tmp_path)), {"torch": "2.11.0", "deepspeed": "0.19.8", "transformers": "5.17"}

    def start(commit: str | None, **changed: str) -> None:
        monkeypatch.setattr(run_folder, "package_versions", lambda: versions | changed)
        monkeypatch.setattr(run_folder, "_commit", lambda: commit)
        folder.write_environment(1, "cpu", said.append)

    start("a" * 40)
    start("a" * 40)
    assert not said
    start("b" * 40, torch="2.13.0", deepspeed="0.19.9")
    start(None, torch="2.13.0", deepspeed="0.19.9")
    assert said == [
        "Changed since the last start: torch 2.11.0 -> 2.13.0, deepspeed 0.19.8 -> 0.19.9, "
        "dpo_scale's commit aaaaaaaaaaaa -> bbbbbbbbbbbb"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"python": 3, "packages": null, "commit": 7}'])
def test_an_environment_that_cannot_be_read_is_written_anew(text: str, tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    (tmp_path / "environment.json").write_text(text)
    folder.write_environment(world_size=1, device="cpu")
    assert json.loads((tmp_path / "environment.json").read_text())["world_size"] == 1


def test_a_run_with_checkpoints_refuses_a_reference_whose_files_were_replaced(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path / "run"))
    folder.keep_reference(_reference())
    folder.keep_reference(_reference(**{"model.safetensors": "1" * 64}))  # nothing is trained yet
    commit(folder)
    folder.keep_reference(_reference(**{"model.safetensors": "1" * 64}))
    with pytest.raises(RecipeError, match=r"another reference\n  weights differ in model.safetensors\n.* org/base"):
        folder.keep_reference(_reference())
    assert read_fingerprint(folder.path) == _reference(**{"model.safetensors": "1" * 64})
