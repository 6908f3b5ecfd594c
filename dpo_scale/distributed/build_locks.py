"""Locks of operator builds that died. torch marks a build by a file, and waits for ever if its builder was killed.

DeepSpeed compiles or looks up an operator at every start, so a kill in that moment would hang all later ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ABANDONED_AFTER_SECONDS = 300.0
"""For builders on other machines, which cannot be seen; an operator takes one or two minutes."""
POLL_SECONDS = 1.0


def build_root() -> Path:
    """Where torch builds extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def own_ninja_first() -> None:
    """Build with this environment's ninja, whatever the caller's PATH: each version builds anew what another built."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def wait_for_builds(root: Path, say: Callable[[str], None]) -> None:
    """Wait until nobody builds below `root`; a lock that no process holds is removed once it is old."""
    told, unheld_before = False, set[Path]()
    while locks := [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]:
        unheld = {path for path in locks if _is_old(path) and not _is_open(path)}
        for path in unheld & unheld_before:  # not at first sight: a builder closes it before it removes it
            say(f"Removing {path}: whoever compiled this operator of DeepSpeed died over it")
            path.unlink(missing_ok=True)
        unheld_before = unheld
        if not told:
            say(f"Waiting for another process that compiles operators of DeepSpeed: {locks[0]}")
            told = True
        time.sleep(POLL_SECONDS)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False


def _is_open(path: Path) -> bool:
    """Whether a process of this machine that may be looked at has the file open, as a builder does."""
    target = path.resolve()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == target:
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
