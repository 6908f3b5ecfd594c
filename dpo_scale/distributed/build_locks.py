"""Locks of operator builds that died. torch marks a build by a file, and waits for ever if its builder was killed.

A run that offloads to NVMe compiles its operator or looks it up at every start, so a kill in that moment would hang all
later ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ABANDONED_AFTER_SECONDS = 300.0
"""For builders on other machines, which cannot be seen; an operator takes one or two minutes."""
POLL_SECONDS = 1.0


def own_ninja_first() -> None:
    """Build with this environment's ninja, whatever the caller's PATH: each version builds anew what another built."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def wait_for_builds(root: Path, ops: Iterable[str], say: Callable[[str], None]) -> None:
    """Wait until nobody builds one of the ops below `root`; an old lock that no process holds is removed."""
    told, unheld_before = False, set[Path]()
    patterns = [f"{folder}{op}/lock" for op in ops for folder in ("", "*/")]
    while locks := [path for pattern in patterns for path in root.glob(pattern)]:
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
