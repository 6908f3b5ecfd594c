"""What became of a run must be right for a person and for a script, also where nothing could be written down."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_scale import locks
from dpo_scale.cli import main
from dpo_scale.recipe import load_recipe
from dpo_scale.training import status
from dpo_scale.training.run_folder import RunFolder
from dpo_scale.training.status import (
    FAILED_TWICE,
    FINISHED,
    RUNNING,
    UNFINISHED,
    USER_ERROR,
    Status,
    StatusFile,
    committed_step,
    judge,
    read_status,
    record_failure,
)

RUN = """
import sys, time
from pathlib import Path
from dpo_scale import locks
from dpo_scale.training.status import StatusFile

folder = Path(sys.argv[1])
lock = locks.take(folder / ".lock")
status = StatusFile(folder, "train")
status.enter("training", 7)
print("training", flush=True)
time.sleep(60)
"""


def _commit(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "commit.json").write_text("{}")


def _code(folder: Path, *options: str) -> int:
    return main(["status", str(folder), *options])


@pytest.fixture(autouse=True)
def _one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")


def _another_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "2")


@pytest.mark.parametrize(
    ("status", "alive", "code", "line"),
    [
        (None, False, UNFINISHED, "not started; step 5 is committed"),
        (Status("finished"), False, FINISHED, "finished; step 5 is committed"),
        (Status("finished"), True, FINISHED, "finished"),  # its process is just leaving
        (Status("running", "training", 6), True, RUNNING, "running: training, step 6; step 5 is committed"),
        (Status("running", "training", 6), False, UNFINISHED, r"failed \(training, step 6\): .* killed or lost"),
        (Status("stopped", "training", 5, "SIGTERM"), False, UNFINISHED, "stopped by SIGTERM .* start it again"),
        (Status("failed", reason="CUDA out of memory"), False, UNFINISHED, "CUDA out of memory; .* start it again"),
        (Status("failed", reason="no such file", users_mistake=True), False, USER_ERROR, "no such file; mend this"),
        (Status("failed", failed_at=5, failures=1), False, UNFINISHED, "start it again"),
        (Status("failed", failed_at=5, failures=2), False, FAILED_TWICE, "failed twice without a new checkpoint"),
        (Status("running", failed_at=5, failures=3), False, FAILED_TWICE, "failed 3 times without a new checkpoint"),
        (Status("failed", failed_at=4, failures=2), False, UNFINISHED, "start it again"),
        (Status("stopped", failed_at=5, failures=2), False, UNFINISHED, "stopped"),
    ],
)
def test_a_status_is_judged(status: Status | None, alive: bool, code: int, line: str) -> None:
    verdict = judge(status, alive=alive, committed=5)
    assert verdict.code == code
    assert re.search(line, verdict.line), verdict.line


def test_a_killed_run_is_told_from_a_running_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    assert _code(tmp_path) == RUNNING
    assert f"running: training, step 7; no checkpoint yet; process {process.pid} on " in capsys.readouterr().out
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _code(tmp_path) == UNFINISHED
    assert "failed (training, step 7): its process was killed" in capsys.readouterr().out


def test_another_process_in_the_folder_does_not_bring_a_dead_run_to_life(tmp_path: Path) -> None:
    StatusFile(tmp_path, "train")._write(Status("running", process="process 1 on elsewhere"))
    with locks.take(tmp_path / ".lock"):  # an evaluation
        assert _code(tmp_path) == UNFINISHED


def test_looking_at_a_lock_does_not_keep_its_taker_out(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as looking:
        assert locks.try_lock(looking, locks.fcntl.LOCK_SH)

        threading.Timer(0.3, looking.close).start()
        locks.take(tmp_path / ".lock").close()


def test_the_first_failure_of_a_launch_is_believed(tmp_path: Path) -> None:
    with locks.take(tmp_path / ".lock"):
        StatusFile(tmp_path, "train").enter("training", 3)
        record_failure(tmp_path, "train", "CUDA out of memory")
        record_failure(tmp_path, "train", "connection reset by peer")
    status = read_status(tmp_path, "train")
    assert status is not None
    assert (status.state, status.reason, status.users_mistake) == ("failed", "CUDA out of memory", False)
    assert (status.stage, status.step) == ("training", 3)


def test_a_launch_that_is_refused_leaves_the_status_of_the_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.take(tmp_path / ".lock"):
        StatusFile(tmp_path, "train")
        before = (tmp_path / "status.json").read_bytes()
        _another_launch(monkeypatch)
        record_failure(tmp_path, "train", "in use", users_mistake=True)
        assert (tmp_path / "status.json").read_bytes() == before
    record_failure(tmp_path, "train", "another mistake", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR


def test_a_lock_that_outlives_an_earlier_start_of_the_job_keeps_no_later_one_from_being_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job lost its node, and the file server keeps the lock: SLURM starts it elsewhere."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with locks.take(tmp_path / ".lock"):
        StatusFile(tmp_path, "train").enter("training", 3)
        assert _code(tmp_path, "--count-failure") == RUNNING  # its own start
        monkeypatch.setattr(status, "this_process", lambda: "process 1 on node18")
        codes = []
        for restarts in ("1", "2"):
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            record_failure(tmp_path, "train", "in use by process 4242 on node17")
            codes.append(_code(tmp_path, "--count-failure"))
        assert codes == [UNFINISHED, FAILED_TWICE]
        assert "in use by process 4242 on node17" in capsys.readouterr().out


@pytest.mark.parametrize(("job", "restarts"), [("7", "1"), ("8", "3"), (None, None)])
def test_a_run_at_work_is_running_for_its_own_start_an_outlived_one_and_others(
    job: str | None, restarts: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with locks.take(tmp_path / ".lock"):
        StatusFile(tmp_path, "train").enter("training", 3)
        assert _code(tmp_path) == RUNNING
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        assert _code(tmp_path, "--count-failure") == RUNNING


def test_a_mistaken_start_leaves_a_finished_run_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StatusFile(tmp_path, "train").finish()
    _another_launch(monkeypatch)
    record_failure(tmp_path, "train", "the folder holds a run of another recipe", users_mistake=True)
    assert _code(tmp_path) == FINISHED


def test_a_later_launch_on_the_same_port_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports that are given by hand come again; then the launcher tells launches apart."""
    StatusFile(tmp_path, "train").stop("SIGTERM")
    record_failure(tmp_path, "train", "follows from the stop")
    assert _code(tmp_path) == UNFINISHED
    node, parent, began = status._launcher().split()
    monkeypatch.setattr(status, "_launcher", lambda: f"{node} {parent} {int(began) + 1}")
    record_failure(tmp_path, "train", "no such file", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR


def test_a_failure_on_another_node_is_of_the_same_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StatusFile(tmp_path, "train").enter("training", 3)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(status, "_launcher", lambda: "1 4242 77")
        record_failure(tmp_path, "train", "CUDA out of memory")
    record_failure(tmp_path, "train", "connection reset by peer")
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert (noted.reason, noted.step) == ("CUDA out of memory", 3)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_while_a_run_goes_loses_no_failure(
    hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells when a process began as seconds before now."""
    now, began = time.time, psutil.Process.create_time
    with locks.take(tmp_path / ".lock"):
        StatusFile(tmp_path, "train").enter("training", 3)
        monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) + 3600 * hours)
        record_failure(tmp_path, "train", "a mistake in row 7", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR


def test_a_status_of_an_earlier_version_is_of_another_launch(tmp_path: Path) -> None:
    StatusFile(tmp_path, "train").stop("SIGTERM")
    noted = json.loads((tmp_path / "status.json").read_text())
    del noted["launcher"]
    (tmp_path / "status.json").write_text(json.dumps(noted))
    assert _code(tmp_path) == UNFINISHED
    record_failure(tmp_path, "train", "no such file", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR


def test_a_status_of_another_form_does_not_keep_a_failure_from_being_told(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "failed", "of another version": 1}')
    record_failure(tmp_path, "train", "no such file", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR


def test_a_mistake_is_forgotten_when_the_run_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_failure(tmp_path, "train", "no such file", users_mistake=True)
    assert _code(tmp_path) == USER_ERROR
    _another_launch(monkeypatch)
    status = StatusFile(tmp_path, "train")
    assert _code(tmp_path) == UNFINISHED
    status.finish()
    assert _code(tmp_path) == FINISHED


def test_failures_are_counted_until_a_new_checkpoint_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for attempt, commits in enumerate([None, 4, None, 8]):
        monkeypatch.setenv("MASTER_PORT", str(attempt))
        StatusFile(tmp_path, "train").enter("training", 9)  # and is killed
        if commits:
            _commit(tmp_path, commits)
        codes.append(_code(tmp_path, "--count-failure"))
    assert codes == [UNFINISHED, UNFINISHED, FAILED_TWICE, UNFINISHED]
    assert _code(tmp_path) == UNFINISHED


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    StatusFile(tmp_path, "train").stop("SIGUSR1")
    for _ in range(2):
        assert _code(tmp_path, "--count-failure") == UNFINISHED
    status = read_status(tmp_path, "train")
    assert status is not None
    assert status.failures == 0


@pytest.mark.parametrize(
    ("reason", "options", "codes"),
    [
        ("the STOP file", ["--out-of-time"], [UNFINISHED, FAILED_TWICE]),
        ("run.stop_after", [], [UNFINISHED, FAILED_TWICE]),
        ("the STOP file", [], [UNFINISHED, UNFINISHED]),
    ],
)
def test_a_held_out_pass_that_is_longer_than_two_launches_is_not_tried_again(
    reason: str, options: list[str], codes: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _commit(tmp_path, 4)
    told = []
    for _ in codes:
        status = StatusFile(tmp_path, "train")
        status.enter("training", 4)
        status.stop(reason)
        told.append(_code(tmp_path, "--count-failure", *options))
    assert told == codes
    hint = f"stopped by {reason} in a held-out pass, no step further than before; give a launch more time, or hold out"
    assert (hint in capsys.readouterr().out) == (FAILED_TWICE in codes)


def test_a_stop_for_want_of_time_is_no_failure_where_something_was_done(tmp_path: Path) -> None:
    for step in (4, 8):
        status = StatusFile(tmp_path, "train")
        status.enter("training")
        status.committed(step)
        status.stop("the STOP file")
        _commit(tmp_path, step)
        assert _code(tmp_path, "--count-failure", "--out-of-time") == UNFINISHED
    for stage in ("scoring", "preparing data"):  # rows that were scored are kept
        status = StatusFile(tmp_path, "train")
        status.enter(stage)
        status.stop("the STOP file")
        assert _code(tmp_path, "--count-failure", "--out-of-time") == UNFINISHED
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert noted.failures == 0


def test_a_launch_that_never_began_is_counted_too(tmp_path: Path) -> None:
    assert _code(tmp_path, "--count-failure") == UNFINISHED
    assert _code(tmp_path, "--count-failure") == FAILED_TWICE


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is slept, on a clock that nothing else moves."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    return slept


def _fail(monkeypatch: pytest.MonkeyPatch, number: int, *writers: str, times: int = 10**6) -> None:
    """Let writers of status files fail, so many times."""
    for name in writers:
        write, left = getattr(status, name), [times]

        def fail(path: Path, values: Any, write: Any = write, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(number, os.strerror(number), str(path))
            write(path, values)

        monkeypatch.setattr(status, name, fail)


def test_a_full_disk_keeps_neither_a_cause_nor_a_count_from_being_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    StatusFile(tmp_path, "train").enter("training", 9)
    _fail(monkeypatch, errno.ENOSPC, "write_json")
    record_failure(tmp_path, "train", "rank 0: metrics.jsonl: No space left on device")
    codes = [_code(tmp_path, "--count-failure") for _ in range(2)]
    assert codes == [UNFINISHED, FAILED_TWICE]
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert (noted.state, noted.step, noted.reason) == ("failed", 9, "rank 0: metrics.jsonl: No space left on device")
    assert not waits


def test_a_failure_is_noted_once_its_file_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    _fail(monkeypatch, errno.ESTALE, "write_json", times=9)
    record_failure(tmp_path, "train", "CUDA out of memory")
    _fail(monkeypatch, errno.EIO, "write_json", times=50)
    assert _code(tmp_path, "--count-failure") == UNFINISHED
    noted = read_status(tmp_path, "train")
    assert noted is not None
    assert (noted.reason, noted.failures) == ("CUDA out of memory", 1)
    assert len(waits) == 59


def test_a_failure_that_cannot_be_noted_for_want_of_rights_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    _fail(monkeypatch, errno.EACCES, "write_json")
    record_failure(tmp_path, "train", "CUDA out of memory")
    assert _code(tmp_path, "--count-failure") == USER_ERROR
    assert not waits


def test_without_a_count_a_job_is_queued_again_only_after_its_first_start_or_a_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    codes = []
    for restarts, room_to_start, commits in ((0, True, None), (1, True, 4), (2, True, None), (3, False, None)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        with monkeypatch.context() as full:
            if room_to_start:
                StatusFile(tmp_path, "train").enter("training", 9)
            if commits:
                _commit(tmp_path, commits)
            _fail(full, errno.ENOSPC, "write_json", "write_json_over")
            codes.append(_code(tmp_path, "--count-failure"))
    assert codes == [UNFINISHED, UNFINISHED, FAILED_TWICE, FAILED_TWICE]
    assert sum(waits) > 4 * status.PATIENCE_OF_A_SCRIPT_S
    told = f"killed or lost, without a word; failures cannot be counted: {tmp_path}: No space left on device"
    assert capsys.readouterr().out.count(told) == 4


def test_only_commits_count_as_checkpoints(tmp_path: Path) -> None:
    assert committed_step(tmp_path) is None
    _commit(tmp_path, 12)
    _commit(tmp_path, 7)
    (tmp_path / "checkpoints" / "step-00000099").mkdir()
    (tmp_path / "checkpoints" / ".step-00000050.partial").mkdir()
    assert committed_step(tmp_path) == 12


def test_training_and_scoring_have_a_status_each(tmp_path: Path) -> None:
    StatusFile(tmp_path, "score").finish()
    StatusFile(tmp_path, "train").stop("SIGTERM")
    assert _code(tmp_path, "--of", "score") == FINISHED
    assert _code(tmp_path) == UNFINISHED


def test_the_other_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status = StatusFile(None, "train")
    status.enter("training", 1)
    status.finish()
    assert list(tmp_path.iterdir()) == []


def test_steps_alone_are_noted_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dpo_scale.training.status.time.monotonic", lambda: clock[0])
    status = StatusFile(tmp_path, "train")
    status.enter("training", 0)
    noted = []
    for step in range(1, 41):
        clock[0] += 1.0
        status.advance(step)
        noted.append(json.loads((tmp_path / "status.json").read_text())["step"])
    assert sorted(set(noted)) == [0, 16, 32]


def test_a_note_of_a_step_that_cannot_be_written_for_now_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = StatusFile(tmp_path, "train")
    monkeypatch.setattr(status, "SECONDS_BETWEEN_STEPS", -1.0)
    _fail(monkeypatch, errno.EIO, "write_json", times=2)
    noted.advance(1)
    noted.go_on()
    noted.advance(3)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 3


def test_a_commit_is_noted_at_once_and_no_step_lists_the_folder_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = StatusFile(tmp_path, "train")
    noted.enter("training", 0)
    monkeypatch.setattr(status, "SECONDS_BETWEEN_STEPS", -1.0)
    monkeypatch.setattr(status, "committed_step", lambda folder: pytest.fail("listed"))
    known = []
    for step in range(1, 5):
        noted.advance(step)
        if step % 2 == 0:
            noted.committed(step)
        known.append(json.loads((tmp_path / "status.json").read_text())["committed_step"])
    assert known == [None, 2, 2, 4]


def test_a_commit_that_was_not_told_is_seen_when_a_stage_begins(tmp_path: Path) -> None:
    """One that was given its name only when the run went on."""
    noted = StatusFile(tmp_path, "train")
    _commit(tmp_path, 4)
    noted.enter("training", 4)
    assert json.loads((tmp_path / "status.json").read_text())["committed_step"] == 4


def test_a_recipe_stands_for_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: base}}\ndata: {{train: [pairs.jsonl]}}\nbatch: {{global_pairs: 8}}\nloss: {{beta: 0.1}}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    assert main(["status", "--folder", "--", str(recipe), f"run.output_dir={tmp_path / 'other'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other'}\n"
    StatusFile(tmp_path / "run", "train").finish()
    assert main(["status", str(recipe)]) == FINISHED
    assert main(["status", str(recipe), "loss.betta=1"]) == USER_ERROR
    assert main(["status", str(tmp_path / "nowhere")]) == USER_ERROR


def test_a_recipe_stands_for_no_run_of_another_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its launch is refused: a batch job that has done nothing must not end as a finished one."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: base}}\ndata: {{train: [pairs.jsonl]}}\nbatch: {{global_pairs: 8}}\nloss: {{beta: 0.1}}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    RunFolder(load_recipe(path))._lock.close()
    for command in ("train", "score"):
        StatusFile(tmp_path / "run", command).finish()
    _commit(tmp_path / "run", 4)
    assert main(["status", str(path), "track.every_steps=1"]) == FINISHED
    assert main(["status", str(path), "run.epochs=3", "--of", "score"]) == FINISHED
    assert main(["status", str(tmp_path / "run")]) == FINISHED
    assert main(["status", str(path), "run.epochs=3", "--count-failure"]) == USER_ERROR
    assert "holds a run of another recipe\n  run.epochs: was 1, is 3\n" in capsys.readouterr().err


def test_json_holds_status_verdict_and_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _commit(tmp_path, 4)
    status = StatusFile(tmp_path, "train")
    status.enter("training", 3)
    status.advance(4)  # too soon to be noted by itself
    status.stop("SIGUSR1")
    assert _code(tmp_path, "--json") == UNFINISHED
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["reason"], told["step"], told["committed_step"]) == ("stopped", "SIGUSR1", 4, 4)
    assert told["code"] == UNFINISHED
