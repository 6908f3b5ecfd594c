"""Small disks that fill up, for those who may mount one, what reaches a disk in which order, and a log that hangs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A mounted tmpfs."""

    path: Path

    def resize(self, kilobytes: int) -> None:
        self._remount(f"size={kilobytes}k")

    def make_read_only(self) -> None:
        self._remount("ro")

    def fill(self, leave_kilobytes: int = 0) -> None:
        """Take all room but some, with a file named `filler`."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        (self.path / "filler").write_bytes(b"\0" * max(0, free - 1024 * leave_kilobytes))

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)


def note_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is brought to the disk and what gets its name from now on, as `sync NAME` and `name NAME`."""
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def noting_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"sync {_without_random_part(path.name)}{'/' * path.is_dir()}")
        fsync(descriptor)

    def noting(operation: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(old: Path, new: Path) -> None:
            events.append(f"name {Path(new).name}")
            operation(old, new)

        return call

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting(replace))
    monkeypatch.setattr(os, "rename", noting(rename))
    return events


def _without_random_part(name: str) -> str:
    return re.sub(r"\.[0-9a-f]{12,}(\.tmp)?$", "", name)


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Disk]:
    """A disk at `path`; skips the test where none can be mounted."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs a tmpfs, and mount says: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe on which a further write hangs, as on a server that is away."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    return reader, writer
