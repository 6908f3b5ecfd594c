"""`dpo-scale cache list|inspect|verify|prune`: what the reference log-prob stores hold.

Values in, values out, plus the text of each for a terminal. Nothing is deleted but by `prune`.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_scale.console import counted
from dpo_scale.errors import UserError
from dpo_scale.files import fsync_folder, leftovers, sha256_of_file
from dpo_scale.reference.cache import part_paths, store_folders
from dpo_scale.reference.fingerprint import ReferenceFingerprint, readable_fingerprint
from dpo_scale.reference.parts import (
    DamagedPartError,
    Keys,
    Part,
    check_digest,
    set_aside,
)

_DEAD_AFTER_S = 3600.0
"""A part is written in seconds; a temporary file this old has lost its writer."""
_PRUNED_NAME = re.compile(r"\.pruned-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """One store."""

    folder: Path
    fingerprint: ReferenceFingerprint | None
    """None where reference.json is missing, damaged or not readable; the next run that scores restores it."""
    parts: int
    rows: int
    """Rows in all parts; a row that two writers scored counts twice."""
    tokens: int
    """Completion tokens with a log-prob."""
    bytes: int
    """Of all files, set-aside parts included."""
    damaged: tuple[str, ...]
    """Parts that were set aside, or whose layout is not a part's."""
    unreadable: tuple[str, ...]
    """Parts of another user that may not be read."""
    last_write: float | None
    """Seconds since the epoch; None without parts."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was freed."""

    paths: tuple[Path, ...]
    bytes: int


def list_stores(cache_dir: Path) -> list[StoreSummary]:
    """All stores below a folder, the one written last first."""
    summaries = [summarize(folder) for folder in store_folders(cache_dir)]
    return sorted(summaries, key=lambda summary: -(summary.last_write or 0.0))


def find_store(cache_dir: Path, name: str) -> Path:
    """The folder of the store that its path, a prefix of its folder's name, or its reference's name means.

    Raises UserError where that is none, or several.
    """
    if Path(name) in store_folders(Path(name).parent):
        return Path(name)
    stores = list_stores(cache_dir)
    sources = (name, str(Path(name).absolute()))  # as a recipe names it, and as a folder is noted
    named = [
        store.folder
        for store in stores
        if store.folder.name.startswith(name) or (store.fingerprint and store.fingerprint.source in sources)
    ]
    if len(named) == 1:
        return named[0]
    have = ", ".join(store.folder.name[:12] for store in stores) or "none"
    reason = "means several stores" if named else "is no store"
    raise UserError(f"{name!r} {reason} in {cache_dir}; give the start of one of: {have}")


def summarize(folder: Path) -> StoreSummary:
    """What a store holds, from the headers of its parts."""
    parts, rows, tokens, last_write = 0, 0, 0, None
    unreadable = []
    damaged = [path.name for path in sorted(folder.glob("damaged-*"))]
    fingerprint = readable_fingerprint(folder)
    for path in part_paths(folder):
        try:
            last_write = max(last_write or 0.0, path.stat().st_mtime)
            part = Part(path, fingerprint.key if fingerprint else None)
        except FileNotFoundError:  # set aside or pruned meanwhile
            continue
        except PermissionError:
            unreadable.append(path.name)
            continue
        except DamagedPartError as error:
            damaged.append(str(error))
            continue
        parts, rows, tokens = parts + 1, rows + part.num_rows, tokens + part.num_tokens
    return StoreSummary(
        folder=folder,
        fingerprint=fingerprint,
        parts=parts,
        rows=rows,
        tokens=tokens,
        bytes=_bytes_below(folder),
        damaged=tuple(damaged),
        unreadable=tuple(unreadable),
        last_write=last_write,
    )


def verify(folder: Path) -> list[str]:
    """Read every part whole, whatever is remembered of it, and set aside those that are damaged.

    Returns what is wrong, as `file: reason`.
    """
    fingerprint = readable_fingerprint(folder)
    wrong = [] if fingerprint else [f"reference.json: missing, damaged or not readable in {folder}"]
    for path in part_paths(folder):
        try:
            check_digest(path, sha256_of_file(path))
            Part(path, fingerprint.key if fingerprint else None)
        except FileNotFoundError:  # set aside or pruned meanwhile
            continue
        except PermissionError as error:
            wrong.append(f"{path.name}: {error.strerror}; have it made readable (chmod a+r)")
        except DamagedPartError as error:
            set_aside(path)
            wrong.append(str(error))
    return wrong


def prune_stores(cache_dir: Path, names: Sequence[str] = (), older_than_days: float | None = None) -> Pruned:
    """Delete whole stores: those named, those last written more than some days ago, and what killed prunings left.

    Raises UserError if neither is given, a name means no store, or one is not this user's to delete; nothing is
    deleted then.
    """
    if not names and older_than_days is None:
        raise UserError("nothing to prune: name the stores, or give --older-than DAYS")
    doomed = {find_store(cache_dir, name) for name in names}
    if older_than_days is not None:
        before = time.time() - older_than_days * 86400
        doomed |= {
            store.folder
            for store in list_stores(cache_dir)
            if (store.last_write or store.folder.stat().st_mtime) < before
        }
    for folder in doomed:
        _refuse_undeletable(folder)
    half_pruned = _half_pruned({cache_dir, *(folder.parent for folder in doomed)})
    pruned, freed = [], 0
    for folder in (*sorted(doomed), *half_pruned):
        size = _bytes_below(folder)
        if folder in doomed:
            _delete(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it may be another user's
        if not folder.exists():
            pruned.append(folder)
            freed += size
    for parent in {folder.parent for folder in pruned}:
        fsync_folder(parent)
    return Pruned(tuple(pruned), freed)


def _refuse_undeletable(folder: Path) -> None:
    """Raise UserError for a folder whose files are not this user's to delete; renaming it would lose it for others."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place}: may not be written to; have its owner prune {folder}, or give you write access")


def _delete(folder: Path) -> None:
    """Delete a store, or leave it as it was. Raises UserError where it cannot be deleted."""
    # Renamed first: a kill in the middle leaves no half store under a name that is looked up.
    hidden = folder.with_name(f".pruned-{uuid.uuid4().hex[:12]}")
    try:
        folder.rename(hidden)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; have its owner prune it") from error
    contents = set(hidden.rglob("*"))
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        is_whole = set(hidden.rglob("*")) == contents
        if is_whole:
            hidden.rename(folder)
        done = "not deleted" if is_whole else "only partly deleted"
        raise UserError(f"{folder}: {done}: {error.strerror}; have its owner prune it") from error


def _half_pruned(cache_dirs: Iterable[Path]) -> list[Path]:
    """What kills left of stores that were being pruned."""
    before = time.time() - _DEAD_AFTER_S
    found = []
    for folder in sorted(path for cache_dir in cache_dirs for path in cache_dir.glob(".pruned-*")):
        with suppress(FileNotFoundError):  # its pruner has just finished
            if _PRUNED_NAME.fullmatch(folder.name) and folder.stat().st_ctime < before:
                found.append(folder)
    return found


def prune_waste(folder: Path) -> Pruned:
    """Delete from a store what nobody will read.

    Parts whose rows all stand in other sound parts, parts that were set aside, and temporary files
    of dead writers.
    """
    waste = [*sorted(folder.glob("damaged-*")), *leftovers(folder, _DEAD_AFTER_S)]
    waste += _repeated_parts(folder)
    freed = 0
    for path in waste:
        freed += path.stat().st_size
        path.unlink()
    if waste:
        fsync_folder(folder)
    return Pruned(tuple(waste), freed)


def format_stores(stores: Sequence[StoreSummary]) -> str:
    """A table, one line a store."""
    if not stores:
        return "no stores"
    lines = [("STORE", "REFERENCE", "PRECISION", "ROWS", "TOKENS", "SIZE", "LAST WRITE", "")]
    for store in stores:
        reference = store.fingerprint
        lines.append(
            (
                store.folder.name[:12],
                reference.source if reference else "unknown (no reference.json)",
                reference.dtype if reference else "?",
                f"{store.rows:,}",
                f"{store.tokens:,}",
                _size(store.bytes),
                _time(store.last_write),
                _troubles(store),
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    right = {3, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_store(store: StoreSummary) -> str:
    """All that is known of one store."""
    lines = [
        f"store        {store.folder}",
        f"rows         {store.rows:,} in {counted(store.parts, 'part')}",
        f"tokens       {store.tokens:,}",
        f"size         {_size(store.bytes)}",
        f"last write   {_time(store.last_write)}",
    ]
    if store.fingerprint is None:
        lines.append("reference    unknown (no reference.json)")
    else:
        reference = store.fingerprint
        lines += [
            f"reference    {reference.source}",
            f"key          {reference.key}",
            f"precision    {reference.dtype}",
            f"scoring      version {reference.scoring_version}",
        ]
        for name, digest in {**reference.weights, **reference.code}.items():
            lines.append(f"sha256       {digest}  {name}")
    lines += [f"damaged      {name}" for name in store.damaged]
    return "\n".join(lines + [f"not readable {name}" for name in store.unreadable])


def _troubles(store: StoreSummary) -> str:
    found = {"damaged": store.damaged, "not readable": store.unreadable}
    return ", ".join(f"{len(names)} {trouble}" for trouble, names in found.items() if names)


def _repeated_parts(folder: Path) -> list[Path]:
    """Parts that can go without losing a row: found smallest first, so that the large ones stay."""
    fingerprint = readable_fingerprint(folder)
    tables: list[tuple[Path, Keys]] = []
    for path in part_paths(folder):
        try:
            check_digest(path, sha256_of_file(path))
            part = Part(path, fingerprint.key if fingerprint else None)
        except (FileNotFoundError, PermissionError, DamagedPartError):  # its copies of rows prove nothing
            continue
        tables.append((path, np.unique(part.keys(), axis=0)))
    if not tables:
        return []
    tables.sort(key=lambda table: len(table[1]))
    all_keys = np.concatenate([keys for _, keys in tables])
    _, identity, copies = np.unique(all_keys, axis=0, return_inverse=True, return_counts=True)
    ends = np.cumsum([len(keys) for _, keys in tables])
    repeated = []
    for (path, _), rows in zip(tables, np.split(identity.ravel(), ends[:-1]), strict=True):
        if (copies[rows] > 1).all():
            copies[rows] -= 1
            repeated.append(path)
    return repeated


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def _time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
