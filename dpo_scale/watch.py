"""Ends a rank that goes on in vain: its launcher is gone, another rank of its machine is gone, or nothing has moved for
too long.

The main thread cannot see to this, for it may sit in a collective of which nothing returns. A rank signs on with a file
that holds its process id, in a folder that the launcher gives each attempt, and signs off when it ends well, by
emptying it: a file with a process that is gone belongs to a rank that died.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, Protocol

import psutil

GRACE_SECONDS = 5.0
"""For the main thread to fail by itself, which tells more, and for other ranks to give their account."""
POLL_SECONDS = 0.25
LOG_SECONDS = 5.0
"""For the log to take what is written to it; a server that hangs never does."""
WORDS_SECONDS = 20.0
"""For all that is said at one time: in the log, in the status, to the launcher and on the console."""


class Say(Protocol):
    """How a rank says why it ends."""

    def __call__(self, message: str, *, cause: bool) -> None:
        """Say it; a `cause` is said by one rank of a machine only."""
        ...


class Watch:
    """Watches over the ranks of this machine and over this rank's progress, from a thread of its own."""

    def __init__(self, attempt: Path | None, rank: int, say: Say, end: Callable[[int], object] = os._exit) -> None:
        """`attempt` is shared by the ranks that one launcher started on this machine; None where there is none."""
        self._attempt, self._rank, self._say, self._end = attempt, rank, say, end
        self._main = threading.current_thread()
        self.started = time.monotonic()
        self._limit = 0.0
        self._moved: tuple[float, str] | None = None
        self._launcher, self._outlives_it = os.getppid(), False
        self._closed = threading.Event()
        self._signed: dict[int, FileIO] = {}
        self._own = None if attempt is None else _sign(attempt / f"{rank}.pid")
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def expect(self, seconds: float | None) -> None:
        """Take a rank for stalled after so many seconds without `moved`; None: never."""
        self._limit = seconds or 0.0

    def moved(self, doing: str) -> None:
        """Note progress, and what begins now."""
        self._moved = time.monotonic(), doing

    def outlive_launcher(self) -> None:
        """From now on this rank stops in its own time after its launcher's end: it has met the others, and listens."""
        self._outlives_it = True

    def rest(self) -> None:
        """Expect no progress until the next `moved`: what begins now takes as long as it takes."""
        self._moved = None

    def close(self) -> None:
        """Sign off: this rank ends well."""
        self._closed.set()
        if self._own is not None:
            self._own.truncate(0)

    def gone(self, within: float = 0.0) -> dict[int, int]:
        """Rank -> process id of the ranks of this machine that died; waits `within` seconds for one to be found."""
        end = time.monotonic() + within
        while not (found := self._gone(unnoticed=False)) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _gone(self, *, unnoticed: bool) -> dict[int, int]:
        """`unnoticed` counts ranks whose launcher has not noticed: it may be busy ending others for half a minute."""
        self._meet()
        found = {}
        for rank, file in list(self._signed.items()):
            pid = os.pread(file.fileno(), 20, 0)
            if pid and _is_gone(int(pid), unnoticed):
                found[rank] = int(pid)
        return found

    def _meet(self) -> None:
        """Open the files of ranks that have signed on, for good: what cleans up /tmp may remove them."""
        for path in self._attempt.glob("*.pid") if self._attempt is not None else ():
            if int(path.stem) not in self._signed:
                with suppress(FileNotFoundError):
                    self._signed[int(path.stem)] = FileIO(path)

    def _watch(self) -> None:
        looked = awake_since = time.monotonic()
        while not self._closed.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - looked > POLL_SECONDS + GRACE_SECONDS:  # this process was stopped, as a job that is suspended
                awake_since = now
            looked = now
            if not self._outlives_it and os.getppid() != self._launcher:
                self._give_up("the launcher ended, and this rank with it; the same command starts again")
            if gone := self._gone(unnoticed=True):
                self._follow(gone)
            moved = self._moved
            if moved is not None and 0 < self._limit < now - max(moved[0], awake_since):
                self._report_stall(*moved)

    def _follow(self, gone: dict[int, int]) -> None:
        """End this rank after another, unless it does so by itself."""
        if self._closed.wait(GRACE_SECONDS):
            return
        within(LOG_SECONDS, _log_stacks)
        self._give_up(died(gone))

    def _report_stall(self, since: float, doing: str) -> None:
        within(LOG_SECONDS, _log_stacks)
        within(WORDS_SECONDS, partial(self._give_account, since, doing))
        # The last ranks to have moved give their account later.
        self._closed.wait(max(GRACE_SECONDS, self._limit / 10))
        if self._moved == (since, doing) and not self._closed.is_set():
            self._give_up(f"stalled since: {doing}; the stack of each rank stands above and in its log")

    def _give_account(self, since: float, doing: str) -> None:
        """Say where this rank is."""
        minutes = (time.monotonic() - since) / 60
        frame = sys._current_frames()[self._main.ident or 0]
        stack = "".join(traceback.format_stack(frame))
        self._say(
            f"rank {self._rank}: nothing has moved for {minutes:.3g} minutes (run.stall_after), since: {doing}. "
            f"It is at\n{stack}",
            cause=False,
        )

    def _give_up(self, message: str) -> None:
        """Say why, as far as it can be said, and end this rank."""
        within(WORDS_SECONDS, partial(self._say, message, cause=True))
        self._end(1)


def within(seconds: float, write: Callable[[], object]) -> None:
    """Write to what may hang, and wait no longer than this for it."""
    writer = threading.Thread(target=write, name="words", daemon=True)
    try:
        writer.start()
    except RuntimeError:  # this process may have no more threads
        write()
    else:
        writer.join(seconds)


def _log_stacks() -> None:
    """Put the stacks of all threads into the log.

    By way of memory: a dump holds up every thread, and one that goes to a log that hangs does so for ever.
    """
    with _memory() as memory:
        faulthandler.dump_traceback(memory)
        memory.seek(0)
        stacks = memory.read().decode(errors="replace")
    with suppress(OSError):  # a full disk
        print(stacks, file=sys.stderr, flush=True)


def _memory() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stacks"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # builds of Python for older systems


def _is_gone(pid: int, unnoticed: bool) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE and unnoticed)
    except psutil.NoSuchProcess:
        return True


def died(gone: dict[int, int]) -> str:
    """What to say for ranks that can no longer speak."""
    ranks = ", ".join(f"rank {rank} (process {pid})" for rank, pid in sorted(gone.items()))
    return (
        f"{ranks} died without a word: killed by a signal, for example by the kernel for want of memory, or crashed "
        "(its log may tell). Checkpoints are untouched; the same command goes on from the newest."
    )


def _sign(path: Path) -> FileIO:
    """A file that holds the process id until this rank signs off."""
    temporary = path.with_suffix(".tmp")
    file = FileIO(temporary, "w")
    file.write(str(os.getpid()).encode())
    os.replace(temporary, path)  # nobody reads half a number
    return file
