"""One process at a time makes a store, on whichever of the machines that share its disk; the others wait for it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_scale.locks import this_process, try_lock

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_MADE = "made"
_GIVEN_UP = ""


@contextmanager
def one_at_a_time(path: Path, while_waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock while a store is made, or wait for the process that makes it. Yields whether that one has made it.

    Whoever has waited takes the place of a process that was killed. After one that came to its own end, be it an
    error, all who have waited go on at once and hold nothing: mistakes in the data would else be found by one after
    the other, each after hours. Where files cannot be locked, nobody waits.

    Args:
        path: the lock's file, which stays.
        while_waiting: called about once a second; what it raises ends the wait.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # another user's, or a folder that takes no file, of which the writing of the store will tell
        yield False
        return
    try:
        has_waited = _wait(descriptor, path, while_waiting)
        left = _read(descriptor)
        if has_waited and left in (_MADE, _GIVEN_UP):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            yield left == _MADE
            return
        _write(descriptor, this_process())
        left = _GIVEN_UP
        try:
            yield False
            left = _MADE
        finally:
            _write(descriptor, left)
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path, while_waiting: Callable[[], None]) -> bool:
    """Take the lock, as soon as nobody holds it; whether anybody did."""
    has_waited = False
    while not _take(descriptor):
        if not has_waited:
            left = _read(descriptor)
            holder = "another process" if left in (_MADE, _GIVEN_UP) else left
            logger.warning("Waiting for %s, which tokenizes the same data; its lock is %s", holder, path)
            has_waited = True
        while_waiting()
        time.sleep(POLL_SECONDS)
    return has_waited


def _take(descriptor: int) -> bool:
    try:
        return try_lock(descriptor, fcntl.LOCK_EX)
    except OSError:  # the file system locks no files: each process makes a store of its own, and the first one stays
        return True


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip()


def _write(descriptor: int, text: str) -> None:
    with suppress(OSError):  # of a full disk, which the store's own files will tell
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{text}\n".encode(), 0)
