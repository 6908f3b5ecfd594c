"""One process at a time in a folder: a lock that the kernel drops with its holder, however that dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from dpo_scale.errors import RecipeError

PATIENCE_S = 1.0
"""A reader that looks whether the lock is held has it for an instant."""


def this_process() -> str:
    """How a holder names itself."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def take(path: Path) -> TextIO:
    """Hold a lock until the returned file is closed or this process ends; parent folders are made.

    Raises RecipeError naming the holder if there is one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held)
    except OSError as error:
        raise RecipeError(f"run.output_dir: {path.parent}: {error.strerror}") from error
    give_up = time.monotonic() + PATIENCE_S
    try:
        while not _try(file, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                holder = path.read_text(encoding="utf-8").strip()
                raise RecipeError(
                    f"run.output_dir: {path.parent} is in use by {holder or 'another process'}; "
                    "stop that run, or choose another folder"
                )
            time.sleep(PATIENCE_S / 10)
    except OSError as error:
        raise RecipeError(
            f"run.output_dir: {path.parent}: its file system locks no files ({error.strerror}); have it mounted with "
            "locks (Lustre: -o flock; NFS: with its lock service), or choose another folder"
        ) from error
    file.truncate(0)
    file.write(f"{this_process()}\n")
    file.flush()
    return file


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
