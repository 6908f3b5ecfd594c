"""Requests to stop: signals, a file, a clock. They are noted when they come and acted on between steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 85
"""Exit code of a run that committed a checkpoint and stopped before its end: start it again."""


class Ranks(Protocol):
    """The collective that agreeing needs."""

    @property
    def is_main(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def max(self, values: Tensor) -> Tensor: ...


class Interruption:
    """Notes the first signal and leaves at once on the second; watches the STOP file and the clock."""

    def __init__(self, folder: Path, stop_after_minutes: float | None) -> None:
        self._file = folder / "STOP"
        self._deadline = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
        self._reason = ""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._reason:
            os._exit(128 + number)
        self._reason = signal.Signals(number).name

    def reason(self) -> str:
        """Why to stop, or nothing."""
        if self._reason:
            return self._reason
        if self._file.exists():
            return "the STOP file"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "run.stop_after"
        return ""

    def consume_file(self) -> None:
        """Remove the STOP file, so that the next start does not stop at once."""
        self._file.unlink(missing_ok=True)


def agree(ranks: Ranks, *, stop: bool, commit: bool) -> tuple[bool, bool]:
    """Whether any rank wants to stop, and whether the main rank's clock asks for a checkpoint; collective."""
    wishes = torch.tensor([stop, commit and ranks.is_main], dtype=torch.int32, device=ranks.device)
    stop_agreed, commit_agreed = ranks.max(wishes).tolist()
    return bool(stop_agreed), bool(commit_agreed)
