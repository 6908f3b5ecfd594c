"""The store of reference log-probs: computed once, found by content, checked before it is believed.

A store is a folder for one reference: `reference.json` says which, and append-only parts hold rows (parts.py). A row is
one (prompt, completion) sequence; its key is made of its token ids alone, so rows do not care about the order of the
data, the number of ranks or the loss. Writers share nothing: each adds whole parts under names of their own, and merges
its small ones. A row that is stored twice, by two writers or by a merge that a kill interrupted, is counted once. A
part that is gone was merged or set aside: readers list the folder again and find what others have of its rows. A part
that another user lets nobody read is as good as absent.

What is believed: a part's layout is checked when the store is opened, and its SHA-256 before its first row is served,
once a part and machine (1.5 GB/s on one core; `verified/` remembers it by size and time stamps). A part that fails is
set aside under the name `damaged-...`, and its rows count as missing.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_scale.errors import UserError
from dpo_scale.files import DigestMemory, write_json
from dpo_scale.reference.fingerprint import (
    ReferenceFingerprint,
    explain_difference,
    read_fingerprint,
    readable_fingerprint,
)
from dpo_scale.reference.key_index import KeyIndex, first_positions
from dpo_scale.reference.parts import (
    KEY_BYTES,
    DamagedPartError,
    Keys,
    LogProbs,
    Part,
    batches,
    check_digest,
    is_forbidden,
    is_gone,
    read_whole,
    set_aside,
    size_of,
    write_part,
)
from dpo_scale.reference.row_keys import as_keys

logger = logging.getLogger(__name__)

_MAX_OPEN_PARTS = 256
"""A quarter of the 1,024 files that a process may have open where nobody set another limit."""
_FOLDER_DIGITS = 32
_STORE_NAME = re.compile(f"[0-9a-f]{{{_FOLDER_DIGITS}}}")


class MissingRowsError(LookupError):
    """Rows were looked up that the store does not hold."""


class NonFiniteLogProbsError(UserError):
    """Log-probs that are NaN or infinite; `rows` says of which sequences."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = list(rows)
        more = ", ..." if len(rows) > 5 else ""
        super().__init__(
            f"{len(rows)} sequences have log-probs that are not finite ({', '.join(rows[:5])}{more}); "
            "the reference overflows in this precision (try bfloat16 or float32), or its weights "
            "are broken"
        )


class ReferenceStore:
    """The rows of one reference in one folder. Opening it writes nothing.

    Attributes:
        folder: where the parts are.
        fingerprint: the reference.
        damaged: parts that this object found damaged and set aside, as `name: reason`.
    """

    def __init__(self, folder: Path, fingerprint: ReferenceFingerprint) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.damaged: list[str] = []
        self._held: dict[bytes, LogProbs] = {}
        self._ignored: set[str] = set()
        self._unreadable: set[str] = set()
        self._reference_key = fingerprint.key
        self._sound = DigestMemory(folder / "verified" / f"{platform.node()}.jsonl")
        self._forget_parts()

    @classmethod
    def open(cls, cache_dir: Path, fingerprint: ReferenceFingerprint) -> ReferenceStore:
        """The store of a reference below `cache_dir`, which need not exist yet."""
        store = cls(store_folder(cache_dir, fingerprint), fingerprint)
        store.refresh()
        return store

    def refresh(self) -> int:
        """Pick up parts that others wrote; returns the number of rows that are new here."""
        rows_before = len(self)
        gone: set[str] = set()
        while newly_gone := self._add_listed(gone):  # merged since they were listed: into what was not
            gone |= newly_gone
        return len(self) - rows_before

    def _add_listed(self, gone: set[str]) -> set[str]:
        """Add the parts in the folder; returns those that are listed and cannot be opened, without `gone`."""
        names: list[str] = []
        tables: list[Keys] = []
        newly_gone: set[str] = set()
        known = self._names.keys() | self._ignored | gone
        for path in part_paths(self.folder):
            if path.name in known:
                continue
            try:
                tables.append(Part(path, self._reference_key).keys())
                names.append(path.name)
            except DamagedPartError as error:
                self._set_aside(path, error)
            except OSError as error:
                self._do_without(path, error)
                newly_gone.add(path.name)
        self._add_parts(names, tables)
        return newly_gone

    def __len__(self) -> int:
        """Distinct rows, those of parts that nobody has used and checked yet included."""
        return len(self._index)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which rows are here, held or in parts whose checksum fits."""
        parts, _ = self._locate(keys)
        return (parts >= 0) | self._are_held(keys, parts < 0)

    def lookup(self, keys: Keys) -> list[LogProbs]:
        """Per-token log-probs, float32 [completion tokens] a row. Raises MissingRowsError."""
        found: list[LogProbs] = [np.zeros(0, np.float32)] * len(keys)
        for rows, positions in self._read(keys):
            for position, values in zip(positions.tolist(), rows, strict=True):
                found[position] = values
        return found

    def sums_and_counts(self, keys: Keys) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Summed log-probs in float64 and numbers of tokens, by row. Raises MissingRowsError."""
        sums, counts = np.zeros(len(keys)), np.zeros(len(keys), np.int64)
        for rows, positions in self._read(keys):
            sums[positions] = [row.sum(dtype=np.float64) for row in rows]
            counts[positions] = [len(row) for row in rows]
        return sums, counts

    def hold(self, keys: Keys, rows: Sequence[LogProbs]) -> None:
        """Make rows readable by this object alone; `write_held` makes them durable."""
        self._held |= {key.tobytes(): row for key, row in zip(keys, rows, strict=True)}

    @property
    def held(self) -> Keys:
        """Keys of the rows that are held."""
        return as_keys(list(self._held))

    def write_held(self, keys: Keys) -> list[Path]:
        """Store some of the rows that are held, as `append` does."""
        paths = self.append(keys, [self._held[key.tobytes()] for key in keys])
        self.let_go()
        return paths

    def let_go(self) -> None:
        """Hold no longer what a part has by now."""
        keys = self.held
        for key in keys[self._locate(keys)[0] >= 0]:
            del self._held[key.tobytes()]

    def append(self, keys: Keys, rows: Sequence[LogProbs]) -> list[Path]:
        """Store those rows that are not here yet, durably, and return the parts written.

        There is none where nothing is new, else one, but for very much. Raises NonFiniteLogProbsError and then
        stores nothing.
        """
        assert keys.dtype == np.uint8
        assert keys.shape == (len(rows), KEY_BYTES)
        assert all(row.dtype == np.float32 and row.ndim == 1 for row in rows)
        if len(rows) and not np.isfinite(np.concatenate(rows)).all():
            bad = [i for i, row in enumerate(rows) if not np.isfinite(row).all()]
            raise NonFiniteLogProbsError([f"position {i}" for i in bad])
        is_first = first_positions(keys) == np.arange(len(keys))
        new = np.flatnonzero(is_first & (self._locate(keys)[0] < 0))
        if len(new):
            self.ensure_writable()
        paths = []
        for batch in batches([rows[i].nbytes + KEY_BYTES + 8 for i in new]):
            paths.append(self._write_part(keys[new[batch]], [rows[i] for i in new[batch]]))
        return paths

    def merge(self, paths: Sequence[Path]) -> list[Path]:
        """Put parts of this object together and delete them; returns those that have their rows now, the last not full.

        A kill at any moment leaves each row in one part or in two. Readers that lose a part list the folder again,
        and another machine may be shown an old listing for a minute: merge what nobody else had a reason to open.
        """
        merged: list[Path] = []
        for batch in batches([size_of(path) for path in paths]):
            merged += self._merge(paths[batch]) if len(paths[batch]) > 1 else paths[batch]
        return merged

    def _merge(self, paths: Sequence[Path]) -> list[Path]:
        tables: list[Keys] = []
        rows: list[LogProbs] = []
        starts: dict[int, int] = {}
        for path in paths:
            try:
                keys, values = read_whole(path)
            except DamagedPartError as error:
                self._set_aside(path, error)
                continue
            except OSError as error:
                if not is_gone(error):
                    raise
                continue
            if path.name in self._names:
                starts[self._names[path.name]] = len(rows)
            tables.append(keys)
            rows += values
        if not rows:
            return []
        merged = self._write_part(np.concatenate(tables), rows)
        self._index.move(starts, self._names[merged.name])
        for path in set(paths) - {merged}:  # of one sound part alone, the merged one is that part
            path.unlink(missing_ok=True)
            self._names.pop(path.name, None)
        return [merged]

    def _write_part(self, keys: Keys, rows: Sequence[LogProbs]) -> Path:
        path = write_part(self.folder, self._reference_key, keys, rows)
        self._add_parts([path.name], [keys])
        self._trusted.add(self._names[path.name])  # these very bytes were hashed for its name
        return path

    def ensure_writable(self) -> None:
        """Create the folder and its reference.json. Raises UserError where that cannot be.

        Call it before an expensive pass; `append` does too.
        """
        try:
            if read_fingerprint(self.folder) != self.fingerprint:
                write_json(self.folder / "reference.json", self.fingerprint.to_json())
            elif not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; set reference.cache_dir to a writable folder") from error

    def _forget_parts(self) -> None:
        self._paths: list[Path] = []
        self._names: dict[str, int] = {}
        self._index = KeyIndex()
        self._trusted: set[int] = set()
        self._open: dict[int, Part] = {}

    def _add_parts(self, names: Sequence[str], tables: Sequence[Keys]) -> None:
        first = len(self._paths)
        for number, name in enumerate(names, start=first):
            self._names[name] = number
            self._paths.append(self.folder / name)
        self._index.add(tables, first)

    def _locate(self, keys: Keys) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Part number and row of each key, -1 where there is none; only in parts that are sound."""
        while True:
            parts, rows = self._index.find(keys)
            used = np.unique(parts[parts >= 0]).tolist()
            # Each process of a machine checks parts in an order of its own, and finds remembered
            # what the others checked meanwhile.
            random.Random().shuffle(used)
            unsound = [number for number in used if not self._is_sound(number)]
            if not unsound:
                return parts, rows
            self._forget_parts()  # another part may hold rows that were hidden behind the lost ones
            self.refresh()

    def _is_sound(self, number: int) -> bool:
        path = self._paths[number]
        if number in self._open:
            return True
        try:
            if number in self._trusted:
                return path.exists()
            check_digest(path, self._sound.sha256(path))
        except DamagedPartError as error:
            self._set_aside(path, error)
            return False
        except OSError as error:
            self._do_without(path, error)
            return False
        self._trusted.add(number)
        return True

    def _are_held(self, keys: Keys, where: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which rows are held, asked only of some."""
        held = np.zeros(len(keys), np.bool_)
        if self._held:
            candidates = np.flatnonzero(where)
            held[candidates] = [key.tobytes() in self._held for key in keys[candidates]]
        return held

    def _read(self, keys: Keys) -> Iterator[tuple[list[LogProbs], npt.NDArray[np.intp]]]:
        """Rows from one place at a time, and their positions in `keys`."""
        parts, rows = self._locate(keys)
        held = self._are_held(keys, parts < 0)
        if num_missing := int(((parts < 0) & ~held).sum()):
            raise MissingRowsError(f"{self.folder}: {num_missing} of {len(keys)} rows have no reference log-probs")
        in_memory = np.flatnonzero(held)
        yield [self._held[key.tobytes()] for key in keys[in_memory]], in_memory
        order = np.argsort(parts, kind="stable")[len(in_memory) :]
        by_part = np.split(order, np.flatnonzero(np.diff(parts[order])) + 1) if len(order) else []
        for number_read, positions in enumerate(by_part):
            found = self._read_part(int(parts[positions[0]]), rows[positions])
            if found is None:
                self._forget_parts()
                self.refresh()
                left = np.concatenate(by_part[number_read:])
                for found, positions in self._read(keys[left]):
                    yield found, left[positions]
                return
            yield found, positions

    def _read_part(self, number: int, rows: npt.NDArray[np.int32]) -> list[LogProbs] | None:
        """Some rows of a part; None if it is lost since it was located."""
        try:
            return self._part(number).log_probs(rows)
        except DamagedPartError as error:
            self._set_aside(self._paths[number], error)
        except OSError as error:
            self._do_without(self._paths[number], error)
        return None

    def _part(self, number: int) -> Part:
        if number not in self._open:
            if len(self._open) >= _MAX_OPEN_PARTS:
                self._open.pop(next(iter(self._open)))
            self._open[number] = Part(self._paths[number], self._reference_key)
        return self._open[number]

    def _set_aside(self, path: Path, reason: DamagedPartError) -> None:
        if not set_aside(path):
            self._ignored.add(path.name)
        self.damaged.append(str(reason))
        logger.warning("%s: set aside; its rows are scored again. %s", path.parent, reason)

    def _do_without(self, path: Path, error: OSError) -> None:
        """Let a part go that is gone, or that may not be read, which is told once. Raises any other error."""
        if is_forbidden(error) and path.name not in self._unreadable:
            self._unreadable.add(path.name)
            logger.warning("%s: %s; its rows are scored again. Have it made readable: chmod a+r", path, error.strerror)
        elif not (is_forbidden(error) or is_gone(error)):
            raise error


def store_folder(cache_dir: Path, fingerprint: ReferenceFingerprint) -> Path:
    """The folder of a reference's store."""
    return cache_dir / fingerprint.key[:_FOLDER_DIGITS]


def store_folders(cache_dir: Path) -> list[Path]:
    """The stores in a folder where anything may lie: runs, which have a `reference.json` too, or tokenized data."""
    folders = {path.parent for path in cache_dir.glob("*/reference.json")}
    folders |= {path.parent for path in cache_dir.glob("*/*part-*.safetensors")}
    return sorted(folder for folder in folders if _STORE_NAME.fullmatch(folder.name))


def part_paths(folder: Path) -> list[Path]:
    """The parts of a store, by name; none where there is no store."""
    return sorted(folder.glob("part-*.safetensors"))


def near_misses(cache_dir: Path, fingerprint: ReferenceFingerprint) -> list[str]:
    """Why stores of similar references do not serve, one line each, the most similar first.

    Similar is a store with the same architecture settings, some equal weight file, or the same name
    or folder.
    """
    found: list[tuple[int, str]] = []
    for folder in store_folders(cache_dir):
        stored = readable_fingerprint(folder)
        if stored is None or stored.key == fingerprint.key or not part_paths(folder):
            continue
        same_weights = set(stored.weights.values()) & set(fingerprint.weights.values())
        if same_weights or stored.config == fingerprint.config or stored.source == fingerprint.source:
            reasons = explain_difference(fingerprint, stored)
            line = f"{folder.name[:12]} ({stored.source}): {'; '.join(reasons)}"
            found.append((len(reasons), line))
    return [line for _, line in sorted(found)]
