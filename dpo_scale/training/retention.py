"""What goes once a newer checkpoint is committed. What cannot be removed is told, and is no reason to end a run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path


def remove_superseded(folder: Path, superseded: Sequence[Path]) -> list[str]:
    """Remove checkpoints, and what dead runs left half-written; returns what stays, a line each, and why."""
    troubles = []
    for path in superseded:
        try:
            remove(path)
        except OSError as error:
            troubles.append(f"Could not remove {path}: {error.strerror}; keeping it")
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
        if leftover.exists():
            troubles.append(f"Could not remove all of {leftover}, which nothing needs; remove it by hand")
    return troubles


def remove(checkpoint: Path) -> None:
    """Hide a checkpoint, then delete it: a kill in between leaves none that is half there.

    Raises OSError if it cannot be hidden; what cannot be deleted then is left to the next removal.
    """
    hidden = tempfile.mkdtemp(prefix=f".{checkpoint.name}.removed-", dir=checkpoint.parent)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
