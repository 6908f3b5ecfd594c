"""One process at a time in a folder: a lock that the kernel drops with its holder, however that dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dpo_scale.errors import UserError

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""A reader that looks whether the lock is held has it for an instant."""
LEASE_S = 300.0
"""A file server keeps the locks of a host that was lost until their lease runs out: 90 s by default on Linux' NFS 4, a
few minutes elsewhere. NFS 3 keeps them until that host is back.
"""


class HeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, path: Path) -> None:
        self.holder = path.read_text(encoding="utf-8").strip() or "another process"
        """How it names itself."""
        super().__init__(f"held by {self.holder}")
        self.is_elsewhere = not self.holder.endswith(f" on {socket.gethostname()}")
        """Whether it is on another host, whose loss its lock may outlive; one of this host is named at once."""
        self.remedy = f". If that host is lost and stays away, remove {path}" if self.is_elsewhere else ""


class NoLocksError(OSError):
    """The file system of a lock locks no files."""


def this_process() -> str:
    """How a holder names itself."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def take(path: Path, say: Callable[[str], None] = logger.warning, *, lease_s: float = LEASE_S) -> TextIO:
    """Hold a lock until the returned file is closed or this process ends; parent folders are made.

    A process on another host is waited for, since it may be gone with its host: `lease_s` seconds, told to `say`.

    Raises HeldError if another process holds it, NoLocksError where none can be held, and OSError where its file
    cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _hold_within(PATIENCE_S, path)
    if file is None:
        held = HeldError(path)
        if held.is_elsewhere:
            say(
                f"{path} is held by {held.holder}: waiting up to {lease_s / 60:.3g} minutes, in which the lock of a "
                "host that was lost runs out"
            )
            file = _hold_within(lease_s, path)
        if file is None:
            raise HeldError(path)
    _sign(file)
    return file


def _sign(file: TextIO) -> None:
    file.truncate(0)
    file.write(f"{this_process()}\n")
    file.flush()


def _hold_within(seconds: float, path: Path) -> TextIO | None:
    """The file of a lock that is held now, or None. A person may have removed the one before meanwhile."""
    give_up = time.monotonic() + seconds
    while True:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held)
        if _hold(file):
            return file
        file.close()
        if time.monotonic() > give_up:
            return None
        time.sleep(PATIENCE_S / 10)


def _hold(file: TextIO) -> bool:
    try:
        return try_lock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise NoLocksError(error.errno, error.strerror) from error


class Lock:
    """A lock that was taken, and is kept however long that takes."""

    def __init__(self, path: Path, file: TextIO) -> None:
        """`file` is what `take` returned for `path`."""
        self._path, self._file = path, file

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def renew(self) -> None:
        """Keep its file young, which a purge by age leaves alone, and put it back where it was removed all the same.

        What cannot be done for now is left to the next time. Raises UserError where another process has taken the
        lock since its file was removed.
        """
        with suppress(OSError):
            os.utime(self._file.fileno())
        with suppress(OSError):
            if not self._is_in_place():
                self._put_back()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise

    def _put_back(self) -> None:
        file = _hold_within(PATIENCE_S, self._path)
        if file is None:
            holder = HeldError(self._path).holder
            if holder == this_process():  # its file was there after all
                return
            raise UserError(
                f"{self._path} was removed while this run held it, and {holder} has taken it since: this run ends, for "
                "two must not write into one folder"
            )
        try:
            _sign(file)
        except OSError:  # a full disk
            file.close()
            raise
        self._file.close()
        self._file = file


def is_held_by(path: Path, process: str) -> bool:
    """Whether a process, named as `this_process` names it, holds a lock; also from another host if `path` is shared."""
    try:
        with open(path, encoding="utf-8") as file:
            return not try_lock(file, fcntl.LOCK_SH) and file.read().strip() == process
    except OSError:  # no such file, or no locks on its file system: nobody holds one
        return False


def try_lock(file: TextIO | int, kind: int) -> bool:
    """Whether a lock of a kind could be had on a file or its descriptor. Raises OSError where there are none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
