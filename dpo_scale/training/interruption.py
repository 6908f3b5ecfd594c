"""Requests to stop: signals, a file, a clock. They are noted when they come and acted on between steps."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.errors import DataError
from dpo_scale.training.status import TIME_IS_UP

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The last one comes when a terminal is closed; the launcher passes it on even under nohup."""
ECHO_SECONDS = 3.0
"""One request may arrive twice: SLURM signals every process of a job, and the launcher passes its own copy on."""
STEPS_OF_LATE = 20
"""So many tell how long the next one takes: one that the disk or the machine held up must not count for days."""


class StopRequestedError(Exception):
    """All ranks agreed to stop in the middle of something that can be done again."""


class Interruption:
    """Notes the first signal and leaves at once on a second one; watches the STOP file, the clock and the launcher."""

    def __init__(self, folder: Path, stop_after_minutes: float | None, started: float) -> None:
        """`started` is when the clock began, by time.monotonic."""
        self._file = folder / "STOP"
        self._deadline = None if stop_after_minutes is None else started + 60 * stop_after_minutes
        self._launcher = os.getppid()
        self._signal = ""
        # The main thread may wait in a collective, where Python runs no handler: a thread hears of signals at once.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: int) -> None:
        first, noted_at = 0, 0.0
        while number := int.from_bytes(os.read(heard, 1), "little"):
            if number not in SIGNALS:
                continue
            if not first:
                first, noted_at = number, time.monotonic()
                self._signal = signal.Signals(number).name
            elif number != first or time.monotonic() - noted_at > ECHO_SECONDS:
                os._exit(128 + number)

    def reason(self, needed_seconds: float = 0.0) -> str:
        """Why to stop, or nothing; the clock is met if what takes `needed_seconds` must not begin any more."""
        if self._signal:
            return self._signal
        if os.path.exists(self._file):  # a file server that is away for a moment ends no run
            return "the STOP file"
        if self._deadline is not None and time.monotonic() + needed_seconds > self._deadline:
            self._deadline = -math.inf  # it stays the reason when it is asked for again and less is needed
            return TIME_IS_UP
        if os.getppid() != self._launcher:
            return "the end of its launcher"
        return ""

    def consume_file(self) -> None:
        """Remove the STOP file at the end, be it heard or not, so that the next start does not stop at once."""
        self._file.unlink(missing_ok=True)


class StopTime:
    """How long a stop takes, as steps and commits of late tell, beside the time that the launcher grants."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=STEPS_OF_LATE)
        self._commit = 0.0
        self._warned = False
        self._committed_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """The longest step of late and the last commit."""
        return max(self._steps, default=0.0) + self._commit

    def step_took(self, seconds: float) -> None:
        self._steps.append(seconds)

    def commit_took(self, seconds: float) -> None:
        self._commit, self._committed_at = seconds, time.monotonic()

    def is_commit_due(self, every_minutes: float | None) -> bool:
        """Whether the last commit is so long ago."""
        return every_minutes is not None and time.monotonic() - self._committed_at > 60 * every_minutes

    def warning(self) -> str:
        """Once, if the launcher would kill a run that stops before it has committed; else nothing.

        The longest step does not count: a pause of the machine or of its disk is no reason to change a setting.
        """
        granted = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        seconds = sum(sorted(self._steps)[-2:-1]) + self._commit
        if self._warned or seconds < granted:
            return ""
        self._warned = True
        return (
            f"A SIGTERM leaves {granted:.0f} s, and a step with its commit takes {seconds:.0f} s: export "
            f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(2 * seconds)}, or a preemption costs the work since the "
            "last commit"
        )


def heed(interruption: Interruption, ranks: Ranks) -> None:
    """Raise StopRequestedError on every rank if any of them was asked to stop; collective."""
    if agree(ranks, stop=bool(interruption.reason()), commit=False)[0]:
        raise StopRequestedError


def unless_stopped(work: Callable[[Callable[[], None]], T], interruption: Interruption, ranks: Ranks) -> T:
    """The result of work on data, which fails on all ranks or on none. It gets what it is to call between its parts.

    Raises StopRequestedError where it fails and a rank was asked to stop: a part is the last one after a request, and
    a signal to a job also ends the processes that tokenize for it.
    """

    def between_parts() -> None:
        if reason := interruption.reason():
            raise DataError(f"stopped by {reason}")  # as a mistake in the data would, it ends the work on all ranks

    try:
        return work(between_parts)
    except DataError:
        heed(interruption, ranks)
        raise


def reason_of_any(interruption: Interruption, ranks: Ranks) -> str:
    """Why all ranks stop, from the first one that knows; collective, so that nobody leaves before all have looked."""
    return next(filter(None, ranks.gather_objects(interruption.reason())), "a request that is gone")


def agree(ranks: Ranks, *, stop: bool, commit: bool) -> tuple[bool, bool]:
    """Whether any rank wants to stop, and whether the main rank's clock asks for a checkpoint; collective."""
    wishes = torch.tensor([stop, commit and ranks.is_main], dtype=torch.int32, device=ranks.device)
    stop_agreed, commit_agreed = ranks.max(wishes).tolist()
    return bool(stop_agreed), bool(commit_agreed)
