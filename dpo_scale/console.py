"""What a person sees: the main rank speaks, progress is a bar on a terminal and plain lines elsewhere.

Everything that libraries, compilers and other ranks write goes to a log file a rank.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
"""Pause between two progress lines where the output is no terminal."""


class ProgressBar:
    """Progress of one stage in units that the caller names."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done = 0
        self._started = self._spoke = time.monotonic()
        self._bar: Progress | None = None
        if console.is_main and console.rich.is_terminal and total:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console.rich,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, note=unit)
            self._bar.start()

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more; the note stands beside the bar."""
        self._done += amount
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note or self._unit)
        elif now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            left = (now - self._started) / max(1, self._done) * (self._total - self._done)
            self._console.say(
                f"{self._title}: {self._done:,} of {self._total:,} {self._unit}"
                f"{', ' + note if note else ''}, about {left:.0f} s left"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Console:
    """The main rank's voice; silent on all others."""

    def __init__(self, stream: io.TextIOBase | None = None, *, is_main: bool = True) -> None:
        self.is_main = is_main
        self.rich = RichConsole(file=stream, highlight=False, soft_wrap=True)  # type: ignore[arg-type]

    def say(self, message: str) -> None:
        """One plain line (or several), as it is."""
        if self.is_main:
            self.rich.print(message, markup=False)

    def show(self, renderable: RenderableType) -> None:
        """A table or another rich object."""
        if self.is_main:
            self.rich.print(renderable)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[ProgressBar]:
        bar = ProgressBar(self, title, total, unit)
        try:
            yield bar
        finally:
            bar.close()


def route_output(log_path: Path, *, is_main: bool) -> Console:
    """Send file descriptors 1 and 2 of this process to a log file and return the console that still speaks.

    Descriptors, not streams: compilers, C++ libraries and child processes write to the descriptors.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    voice = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.captureWarnings(True)
    warnings.simplefilter("once")  # some of torch's come with every collective
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level="INFO")
    return Console(voice, is_main=is_main)
