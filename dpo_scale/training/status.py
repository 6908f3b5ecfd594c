"""What became of a run, for people and for batch scripts: `status.json`, written by the run, and a judgement of it.

The launcher turns every failure of a rank into exit code 1, so a script must ask the run's folder. A process that is
killed writes nothing; that it is gone shows in its lock, which the kernel drops with it. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from dpo_scale.errors import USER_ERROR, UserError
from dpo_scale.files import FULL, MAY_PASS, write_json, write_json_over
from dpo_scale.locks import Lock, is_held_by, this_process

State = Literal["running", "stopped", "failed", "finished"]

FINISHED = 0
FAILED_TWICE = 1
RUNNING = 3
UNFINISHED = 85
"""Exit codes of `dpo-scale status`; the last one is also that of a rank whose run stopped on request."""

TIME_IS_UP = "run.stop_after"
"""The reason of a stop at the recipe's own limit."""

SECONDS_BETWEEN_STEPS = 15.0
"""Pause between two notes of the step alone: on a network file system a note is not free."""

PATIENCE_OF_A_RANK_S = 10.0
"""How long a failure is tried to be noted: the console hears of it afterwards, and all words have 20 s (`watch`)."""
PATIENCE_OF_A_SCRIPT_S = 60.0
"""How long a failure is tried to be counted."""

SECONDS_BETWEEN_TRIES = 1.0

LOST = "its process was killed or lost, without a word"

FILES = {
    "train": ("status.json", ".lock"),
    "score": ("status-score.json", ".score.lock"),
}
"""Command that leaves a status -> its file, and the lock that its main rank holds while it works."""


@dataclass(frozen=True, slots=True)
class Status:
    """A status file's contents."""

    state: State
    stage: str = ""
    """What it does, or did last, such as `training`."""
    step: int = 0
    """Optimizer steps done, as far as noted."""
    reason: str = ""
    """Why it stopped, or the first line of the error."""
    users_mistake: bool = False
    """Whether it failed over something that starting again cannot mend."""
    process: str = ""
    """The main rank that wrote it, as it stands in the lock; of a launch that failed before that, the rank that did."""
    launch: str = ""
    """Which launch it was: a name that a later one may have again."""
    launcher: str = ""
    """The launcher of the rank that wrote it; empty in a file of an earlier version."""
    time: str = ""
    """When it was written, in ISO 8601, UTC."""
    failed_at: int | None = None
    """Newest committed step at the last failure that a batch script counted."""
    failures: int = 0
    """Failures counted at that step, one after the other."""
    committed_step: int | None = None
    """Newest committed step as last seen: what is left to know of checkpoints that are on a disk that is away."""
    found_step: int | None = None
    """Newest committed step when the launch began."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A status as its reader needs it: one line, and the exit code."""

    line: str
    code: int


class StatusFile:
    """The main rank's notes on its run; on other ranks, whose folder is None, every method does nothing.

    Each note renews the run's lock. It raises UserError where that was lost to another process.
    """

    def __init__(self, folder: Path | None, command: str, lock: Lock | None = None) -> None:
        self._folder, self._command, self._lock = folder, command, lock
        before = None if folder is None else read_status(folder, command)
        known = None if folder is None else last_known_commit(folder)
        self._status = Status(
            state="running",
            process=this_process(),
            launch=_this_launch(),
            launcher=_launcher(),
            failed_at=before.failed_at if before else None,
            failures=before.failures if before else 0,
            committed_step=known,
            found_step=known,
        )
        self._wrote = 0.0
        self.enter("starting")

    def enter(self, stage: str, step: int = 0) -> None:
        """Another stage begins, such as `training`."""
        seen = None if self._folder is None else committed_step(self._folder)
        known = self._status.committed_step if seen is None else seen
        self._write(replace(self._status, stage=stage, step=step, committed_step=known))

    def advance(self, step: int) -> None:
        """A step is done; noted at most every quarter of a minute, or with what comes next."""
        self._status = replace(self._status, step=step)
        if time.monotonic() - self._wrote > SECONDS_BETWEEN_STEPS:
            with suppress(OSError):  # a disk that is full or away: the next note makes up for this one
                self._write(self._status)

    def go_on(self) -> None:
        """It works on what makes no steps; noted at most as often as they are."""
        self.advance(self._status.step)

    def committed(self, step: int) -> None:
        """A step was committed."""
        self._write(replace(self._status, committed_step=step))

    def stop(self, reason: str) -> None:
        """The run ends before its plan does, as it was asked to."""
        self._write(replace(self._status, state="stopped", reason=reason))

    def finish(self) -> None:
        """All is done."""
        self._write(replace(self._status, state="finished", failed_at=None, failures=0))

    def _write(self, status: Status) -> None:
        self._status, self._wrote = status, time.monotonic()
        if self._lock is not None:
            self._lock.renew()
        if self._folder is not None:
            _write(self._folder, self._command, self._status)


def record_failure(folder: Path, command: str, reason: str, *, users_mistake: bool = False) -> None:
    """Note why a launch failed; any of its ranks may call it, and the first one is believed.

    Does nothing where the run is finished, or another launch works in the folder: the failure is then that this one
    may not. What cannot be written for now is tried again for a while.
    """
    record = partial(_record_failure, folder, command, reason, users_mistake=users_mistake)
    with suppress(OSError):  # a full disk, or no folder: it may be what the launch failed over
        _patiently(record, PATIENCE_OF_A_RANK_S)


def _record_failure(folder: Path, command: str, reason: str, *, users_mistake: bool) -> None:
    try:
        before = read_status(folder, command)
    except UserError:  # of another form; it may be what the launch failed over
        before = None
    own = before is not None and _is_of_this_launch(before)
    if before is not None and own and before.state != "running":
        return
    if before is not None and not own and (before.state == "finished" or is_alive(folder, command, before)):
        return
    if before is None or not own:
        before = before or Status(state="failed")
        before = replace(before, stage="starting", step=0, process=this_process(), launcher=_launcher())
    failed = replace(before, state="failed", reason=reason, users_mistake=users_mistake, launch=_this_launch())
    _write(folder, command, failed)


def read_status(folder: Path, command: str) -> Status | None:
    """The status in a run's folder; None where there is none. Raises UserError for a file of another form."""
    path = folder / FILES[command][0]
    try:
        return Status(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a status that this version wrote ({error}); remove it") from error


def is_alive(folder: Path, command: str, status: Status) -> bool:
    """Whether the process that wrote a status still works in the folder.

    Not one of an earlier start of this SLURM job, which ended before this one began: the lock of a node that was lost
    may outlive it.
    """
    return not _is_of_an_earlier_start(status) and is_held_by(folder / FILES[command][1], status.process)


def _is_of_an_earlier_start(status: Status) -> bool:
    (job, restarts), (this_job, this_restarts) = _slurm_start(status.launch), _slurm_start(_this_launch())
    return job == this_job != "-" and restarts < this_restarts


def _slurm_start(launch: str) -> tuple[str, int]:
    """The SLURM job of a launch, `-` for none, and how often it had been queued again."""
    job, restarts = (launch.split() or ["-", "-"])[-2:]
    return job, 0 if restarts == "-" else int(restarts)


def committed_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that has its commit record; None where there is none."""
    steps = [
        int(match[1])
        for path in (folder / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d{8,})", path.name)) and (path / "commit.json").is_file()
    ]
    return max(steps, default=None)


def last_known_commit(folder: Path) -> int | None:
    """The newest committed step; where no checkpoint is there, the one that the run's status noted."""
    newest = committed_step(folder)
    if newest is not None:
        return newest
    with suppress(UserError):  # a status that cannot be read
        status = read_status(folder, "train")
        return None if status is None else status.committed_step
    return None


def judge(status: Status | None, *, alive: bool, committed: int | None) -> Verdict:
    """What a status means, given whether its process lives and the newest committed step."""
    kept = "no checkpoint yet" if committed is None else f"step {committed} is committed"
    if status is None:
        return Verdict(f"not started; {kept}", UNFINISHED)
    doing = f"{status.stage}, step {status.step}" if status.step else status.stage
    if status.state == "finished":
        return Verdict(f"finished; {kept}" if committed is not None else "finished", FINISHED)
    if alive:
        return Verdict(f"running: {doing}; {kept}; {status.process}, noted {status.time}", RUNNING)
    if status.state == "stopped":
        return Verdict(f"stopped by {status.reason} ({doing}); {kept}; start it again to go on", UNFINISHED)
    if status.state == "running":
        status = replace(status, reason=LOST)
    if status.users_mistake:
        return Verdict(f"failed ({doing}): {status.reason}; mend this first, starting again would not help", USER_ERROR)
    if status.failures > 1 and status.failed_at == committed:
        times = "twice" if status.failures == 2 else f"{status.failures} times"
        return Verdict(f"failed {times} without a new checkpoint ({doing}): {status.reason}; {kept}", FAILED_TWICE)
    return Verdict(f"failed ({doing}): {status.reason}; {kept}; start it again to go on", UNFINISHED)


def count_failure(folder: Path, command: str, *, out_of_time: bool = False) -> Status | None:
    """Count that a launch of this run has failed, and return its status with the count, for a verdict on another try.

    For a script whose launch has just ended, `out_of_time` if the script asked it to stop for that. Does nothing if the
    run finished, stopped on request or is running; but a stop for want of time that was in vain is a failure.
    What cannot be written for now is tried again for a while, then judged as it is known. Raises UserError if the
    folder cannot be written at all.
    """
    status, committed = read_status(folder, command), committed_step(folder)
    if status is not None and _stopped_in_vain(status, out_of_time):
        reason = (
            f"stopped by {status.reason} in a held-out pass, no step further than before; give a launch more time, or "
            "hold out fewer pairs (data.evaluate)"
        )
        status = replace(status, state="failed", reason=reason)
    if status is not None and (status.state in ("finished", "stopped") or is_alive(folder, command, status)):
        return status
    status = status or Status(state="failed", reason="its launch ended before it began")
    again = status.failures > 0 and status.failed_at == committed
    counted = replace(status, failed_at=committed, failures=status.failures + 1 if again else 1)
    try:
        _patiently(partial(_write, folder, command, counted), PATIENCE_OF_A_SCRIPT_S)
    except OSError as error:
        if error.errno not in MAY_PASS:
            raise UserError(f"run.output_dir: {folder}: {error.strerror}") from error
        reason = f"{counted.reason or LOST}; failures cannot be counted: {folder}: {error.strerror}"
        least = 2 if _was_queued_in_vain(status, committed) else 1
        return replace(counted, state="failed", reason=reason, failures=max(counted.failures, least))
    return counted


def _was_queued_in_vain(status: Status, committed: int | None) -> bool:
    """Whether this start of a SLURM job was not its first and has committed nothing, as far as its status tells.

    Where no failure can be counted it is taken for the second one, lest the job is queued again for ever.
    """
    start = _slurm_start(_this_launch())
    return start[1] > 0 and (_slurm_start(status.launch) != start or status.found_step == committed)


def _stopped_in_vain(status: Status, out_of_time: bool) -> bool:
    """Whether want of time stopped training where its launch had found it, which only happens in a held-out pass."""
    if status.state != "stopped" or status.stage != "training" or status.committed_step != status.found_step:
        return False
    return out_of_time or status.reason == TIME_IS_UP


def as_json(status: Status | None, verdict: Verdict, committed: int | None) -> dict[str, Any]:
    """A status and its judgement in one flat object."""
    return {**(asdict(status) if status else {"state": None}), "committed_step": committed, **asdict(verdict)}


def _write(folder: Path, command: str, status: Status) -> None:
    path, values = folder / FILES[command][0], asdict(replace(status, time=_iso(time.time())))
    try:
        write_json(path, values)
    except OSError as error:
        if error.errno not in FULL:
            raise
        try:
            write_json_over(path, values)
        except OSError:
            raise error from None


def _patiently(write: Callable[[], None], seconds: float) -> None:
    """Write; what fails and may pass is tried again for a while. Raises OSError when that has not helped."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in MAY_PASS or time.monotonic() > give_up:
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _this_launch() -> str:
    """A name that the ranks of one launch share; a later one may have it again, on a port that was given by hand."""
    names = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    return " ".join(os.environ.get(name, "-") for name in names)


def _is_of_this_launch(status: Status) -> bool:
    """Whether a rank of this launch wrote a status.

    Launches of one name differ in their launchers, which a rank knows of its own node alone: of a status from another
    node the name decides.
    """
    if status.launch != _this_launch() or not status.launcher:
        return False
    return status.launcher == _launcher() or status.launcher.split()[0] != _launcher().split()[0]


@cache
def _launcher() -> str:
    """The launcher of this process: its node, its process, and when that began.

    In ticks since the start of the system: the hour at which a process began moves with the clock that is set.
    """
    parent, began = os.getppid(), "-"
    with suppress(OSError):  # outside of this container
        _, _, fields = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        began = fields.split()[19]
    return f"{os.environ.get('GROUP_RANK') or socket.gethostname()} {parent} {began}"
