"""A build lock outlives its holder in torch; here it does not."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from dpo_scale.distributed import build_locks
from dpo_scale.distributed.build_locks import ABANDONED_AFTER_SECONDS, own_ninja_first, wait_for_builds
from dpo_scale.distributed.ops import ASYNC_IO


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_locks, "POLL_SECONDS", 0.05)


def baton(root: Path, age: float) -> FileBaton:
    """What torch leaves while it builds an operator."""
    path = root / ASYNC_IO / "lock"
    path.parent.mkdir(parents=True)
    held = FileBaton(str(path))
    assert held.try_acquire()
    os.utime(path, (time.time() - age,) * 2)
    return held


def test_the_lock_of_a_build_that_was_killed_is_removed(tmp_path: Path) -> None:
    held = baton(tmp_path / "py311_cpu", ABANDONED_AFTER_SECONDS + 60)
    os.close(held.fd)  # as the kernel does when a process dies
    said: list[str] = []
    wait_for_builds(tmp_path, [ASYNC_IO], said.append)
    assert not Path(held.lock_file_path).exists()
    assert "died over it" in said[1]


@pytest.mark.parametrize("age", [0.0, ABANDONED_AFTER_SECONDS + 60])
def test_a_build_that_goes_on_is_waited_for_however_long_it_takes(tmp_path: Path, age: float) -> None:
    held = baton(tmp_path, age)
    released_at: list[float] = []

    def release() -> None:
        released_at.append(time.monotonic())
        held.release()

    threading.Timer(0.5, release).start()
    said: list[str] = []
    wait_for_builds(tmp_path, [ASYNC_IO], said.append)
    assert time.monotonic() >= released_at[0]
    assert said == [f"Waiting for another process that compiles operators of DeepSpeed: {held.lock_file_path}"]


def test_a_fresh_lock_may_be_another_machines(tmp_path: Path) -> None:
    held = baton(tmp_path, 0.0)
    os.close(held.fd)
    waiting = threading.Thread(target=wait_for_builds, args=(tmp_path, [ASYNC_IO], lambda line: None), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    Path(held.lock_file_path).unlink()
    waiting.join(5)
    assert not waiting.is_alive()


def test_the_ninja_of_this_environment_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    own_ninja_first()
    assert Path(shutil.which("ninja") or "").parent == Path(sys.executable).parent


def test_no_builds_no_words(tmp_path: Path) -> None:
    said: list[str] = []
    wait_for_builds(tmp_path / "absent", [ASYNC_IO], said.append)
    assert said == []


def test_builds_of_other_programs_are_not_waited_for(tmp_path: Path) -> None:
    """Several projects of a user compile into one folder."""
    baton(tmp_path / "py311_cpu", 0.0)
    said: list[str] = []
    wait_for_builds(tmp_path, ["an_op_of_theirs"], said.append)
    assert said == []
