"""What a person sees: the main rank speaks, progress is a bar on a terminal and plain lines elsewhere.

Everything that libraries, compilers and other ranks write goes to a log file a rank.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich import filesize
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
"""Silence that a progress line ends where the output is no terminal."""
BYTES = "bytes"
"""The unit that is shown as MB and GB."""


class StageClock:
    """Wall-clock seconds of each stage; while a stage runs inside another, time counts for the inner one alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = ["Starting"]
        self._since = time.monotonic()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds up to now, in the order of their beginnings."""
        self._settle()
        return dict(self._seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside under a name."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class ProgressBar:
    """Progress of one stage in units that the caller names."""

    def __init__(self, console: Console, title: str, total: int | None, unit: str, done: int) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done = self._done_before = done
        self._note = ""
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bar = console.open_bar(self)
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=done, amount=self._amount(), note="")
        elif console.is_main:
            threading.Thread(target=self._speak_up, daemon=True).start()

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more; the note stands beside the bar."""
        self._done += amount
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, amount=self._amount(), note=note)

    def close(self) -> None:
        """Take the bar away."""
        self._ended.set()
        if self._bar is not None:
            self._bar.remove_task(self._task)
        self._console.close_bar(self)

    def _speak_up(self) -> None:
        """Say a line whenever nothing else was said for a while; from a thread, as a stage may be one long call."""
        silence = 0.0
        while not self._ended.wait(max(0.05, SECONDS_BETWEEN_LINES - silence)):
            silence = time.monotonic() - self._console.spoke_at
            if silence >= SECONDS_BETWEEN_LINES and self._console.is_innermost(self):
                self._console.say(self.line())

    def line(self) -> str:
        """The progress as plain text."""
        spent = time.monotonic() - self._started
        parts = [self._amount(), self._note, f"{duration(spent)} so far"]
        progress = self._done - self._done_before
        if self._total and progress:
            parts[-1] = f"about {duration(spent / progress * (self._total - self._done))} left"
        return f"{self._title}: {', '.join(part for part in parts if part)}"

    def _amount(self) -> str:
        if self._unit == BYTES:
            done, total = filesize.decimal(self._done), filesize.decimal(self._total or 0)
            return f"{done} of {total}" if self._total else done
        if not self._unit:
            return ""
        return f"{self._done:,}{f' of {self._total:,}' if self._total else ''} {self._unit}"


class _Time(ProgressColumn):
    """What a bar has taken, and what is left where that is known."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining if task.total else None
        return Text(duration(task.elapsed or 0) + (f", {duration(left)} left" if left else ""), "cyan")


class Voice(io.TextIOBase):
    """Where a person listens: a terminal, a pipe or a file.

    It may be closed, broken or full; what is said then goes to standard output, a rank's log, and no run ends over it.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """Say it at once; never raises."""
        left = text.encode(errors="backslashreplace")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            with suppress(OSError):  # that disk may be full too
                sys.stdout.write(left.decode(errors="replace"))
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


class Console:
    """The main rank's voice; silent on all others. Its clock times the stages on every rank."""

    def __init__(self, stream: io.TextIOBase | None = None, *, is_main: bool = True) -> None:
        self.is_main = is_main
        self.rich = RichConsole(file=stream, highlight=False, soft_wrap=True)  # type: ignore[arg-type]
        self.clock = StageClock()
        self.spoke_at = time.monotonic()
        self._live: Progress | None = None
        self._bars: list[ProgressBar] = []

    def say(self, message: str) -> None:
        """One plain line (or several), as it is."""
        if self.is_main:
            self.rich.print(message, markup=False)
            self.spoke_at = time.monotonic()

    def show(self, renderable: RenderableType) -> None:
        """A table or another rich object."""
        if self.is_main:
            self.rich.print(renderable)
            self.spoke_at = time.monotonic()

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str = "", *, done: int = 0) -> Iterator[ProgressBar]:
        """A stage with a bar; the total is None where nobody knows it, and the unit empty where nothing is counted."""
        bar = ProgressBar(self, title, total, unit, done)
        try:
            with self.clock.stage(title):
                yield bar
        finally:
            bar.close()

    def open_bar(self, bar: ProgressBar) -> Progress | None:
        """Take note of a bar. Returns the display that all bars share, as a terminal bears only one; None without."""
        self._bars.append(bar)
        if self.is_main and self.rich.is_terminal and self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TextColumn("{task.fields[note]}", style="dim"),
                _Time(),
                console=self.rich,
                transient=True,
                redirect_stdout=False,  # what libraries print is for the log, not for the terminal
                redirect_stderr=False,
            )
            self._live.start()
        return self._live

    def close_bar(self, bar: ProgressBar) -> None:
        """Forget a bar, and close the display with the last one."""
        self._bars.remove(bar)
        if not self._bars and self._live is not None:
            self._live.stop()
            self._live = None

    def is_innermost(self, bar: ProgressBar) -> bool:
        """Whether a bar is the one that was opened last: where lines are plain, it alone speaks."""
        return self._bars[-1:] == [bar]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.2 s, 42 s, 7 min 30 s, 3 h 12 min, 2 d 5 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, finer, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {finer}" if rest else "")
    return f"{whole} s"


def counted(number: float, unit: str, units: str = "") -> str:
    """A number, to a tenth, with its unit: 1 step, 2,000 steps, 1.5 micro-batches. `units` where s alone is wrong."""
    text = f"{round(number, 1):,}".removesuffix(".0")
    return f"{text} {unit if text == '1' else units or f'{unit}s'}"


def open_closed_streams() -> None:
    """Put the null device where this process was started without a standard stream, before a file takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def route_output(log_path: Path, *, is_main: bool) -> Console:
    """Send file descriptors 1 and 2 of this process to a log file and return the console that still speaks.

    Descriptors, not streams: compilers, C++ libraries and child processes write to the descriptors.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    voice = Voice(os.dup(1))
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.captureWarnings(True)
    warnings.simplefilter("once")  # some of torch's come with every collective
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level="INFO")
    return Console(voice, is_main=is_main)
