"""Where a run keeps shards on a node's NVMe disk: a folder that is nobody else's, and none left of earlier starts.

Containers may share a disk and yet each have a run at the same path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from dpo_scale.locks import try_lock

_held: list[int] = []
"""Descriptors of folders that this process uses; their locks end with it, however it ends."""


def own_folder(output_dir: str, role: str) -> str:
    """Below a node's NVMe folder, for one role of a run: the same at each start while the run's folder stays.

    It is named by the path of the run's folder, and by which folder that is.
    """
    run = Path(output_dir).absolute()
    return f"dpo_scale-{_digest(str(run))}-{_digest(_identity(run))}/{role}"


def hold(folder: Path) -> None:
    """Use a run's folder, made if need be, until this process ends; delete others of its path that nobody uses.

    Those are left of runs whose folders are gone: nothing in them outlives a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _held.append(os.open(folder, os.O_RDONLY))
    with suppress(OSError):  # a disk without locks: its folders count as used
        try_lock(_held[-1], fcntl.LOCK_SH)
    same_path = folder.name.rpartition("-")[0]
    for other in folder.parent.glob(f"{same_path}-*"):
        if other != folder and not _is_used(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_used(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # deleted by another rank, or another user's
        return True
    try:
        return not try_lock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _identity(run: Path) -> str:
    """Device and inode of a run's folder; empty if it is not there yet."""
    try:
        status = run.stat()
    except OSError:
        return ""
    # Network and layered file systems get another number (of major 0) each time that they are mounted.
    return f"{status.st_dev if os.major(status.st_dev) else 0} {status.st_ino}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
