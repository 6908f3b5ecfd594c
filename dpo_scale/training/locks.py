"""One process at a time in a folder: a lock that the kernel drops with its holder, however that dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

PATIENCE_S = 1.0
"""A reader that looks whether the lock is held has it for an instant."""


class HeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by {holder}")
        self.holder = holder
        """How it names itself."""


class NoLocksError(OSError):
    """The file system of a lock locks no files."""


def this_process() -> str:
    """How a holder names itself."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def take(path: Path) -> TextIO:
    """Hold a lock until the returned file is closed or this process ends; parent folders are made.

    Raises HeldError if another process holds it, NoLocksError where none can be held, and OSError where its file
    cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held)
    give_up = time.monotonic() + PATIENCE_S
    while not _hold(file):
        if time.monotonic() > give_up:
            raise HeldError(path.read_text(encoding="utf-8").strip() or "another process")
        time.sleep(PATIENCE_S / 10)
    file.truncate(0)
    file.write(f"{this_process()}\n")
    file.flush()
    return file


def _hold(file: TextIO) -> bool:
    try:
        return _try(file, fcntl.LOCK_EX)
    except OSError as error:
        raise NoLocksError(error.errno, error.strerror) from error


def is_held_by(path: Path, process: str) -> bool:
    """Whether a process, named as `this_process` names it, holds a lock; also from another node if `path` is shared."""
    try:
        with open(path, encoding="utf-8") as file:
            return not _try(file, fcntl.LOCK_SH) and file.read().strip() == process
    except OSError:  # no such file, or no locks on its file system: nobody holds one
        return False


def _try(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
