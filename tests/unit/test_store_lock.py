"""Who makes a store, who waits, and who goes on without a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dpo_scale.data import store_lock
from dpo_scale.data.store_lock import one_at_a_time


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "POLL_SECONDS", 0.01)


def nothing() -> None:
    """While waiting."""


def never() -> None:
    """While waiting, which nobody should."""
    raise AssertionError("waits")


@pytest.mark.parametrize("fails", [False, True])
def test_all_who_waited_go_on_at_once_after_one_that_came_to_its_end(fails: bool, tmp_path: Path) -> None:
    """To read a store takes a while, too; and what stopped the first should not stop one after the other."""
    path = tmp_path / "lock"
    waiting, inside = threading.Barrier(3, timeout=20), threading.Barrier(2, timeout=20)

    def come_second() -> bool:
        first_look: Iterator[Callable[[], Any]] = iter([waiting.wait])
        with one_at_a_time(path, lambda: next(first_look, nothing)()) as is_made:
            inside.wait()
            return is_made

    with ThreadPoolExecutor(2) as pool:
        with suppress(ValueError), one_at_a_time(path, never):
            seconds = [pool.submit(come_second) for _ in range(2)]
            waiting.wait()
            if fails:
                raise ValueError("bad rows")
        assert [second.result() for second in seconds] == [not fails] * 2


def test_whoever_comes_after_a_failure_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="bad rows"), one_at_a_time(path, never):
        raise ValueError("bad rows")
    with one_at_a_time(path, never) as is_made:
        assert not is_made
        with pytest.raises(AssertionError, match="waits"), one_at_a_time(path, never):
            pass


def test_a_stop_ends_the_wait_and_leaves_the_lock_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with one_at_a_time(path, never):
        for _ in range(2):
            with pytest.raises(AssertionError, match="waits"), one_at_a_time(path, never):
                pass


def test_nobody_waits_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    with one_at_a_time(path, never) as first, one_at_a_time(path, never) as second:
        assert not first
        assert not second


def test_nobody_waits_where_the_lock_cannot_be_opened(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "absent" / "lock", never) as is_made:
        assert not is_made
