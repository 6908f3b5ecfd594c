"""Where each of millions of 16-byte keys lies: sorted arrays, 24 bytes a key, no Python objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_scale.reference.parts import Keys

Halves = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int32]


class KeyIndex:
    """Key -> (part number, row in the part); of equal keys the first added wins.

    Keys are hashes, so their first halves alone sort them; the second halves settle the rest. New
    keys go into a table of their own, and a table that is no longer much smaller than the one
    before is merged into it: adding a key costs a logarithm of merges, a search looks into as many
    tables.
    """

    def __init__(self) -> None:
        self._tables: list[_Table] = []

    def __len__(self) -> int:
        return sum(len(table.high) for table in self._tables)

    def add(self, parts: Sequence[Keys], first_number: int) -> None:
        """Add the keys of parts that are numbered from `first_number` on."""
        keys = np.concatenate([np.zeros((0, 16), np.uint8), *parts])
        lengths = [len(part) for part in parts]
        numbers = np.repeat(np.arange(first_number, first_number + len(parts)), lengths)
        rows = [np.arange(length, dtype=np.int32) for length in lengths]
        high, low = _halves(keys)
        table = _Table(high, low, numbers.astype(np.int32), np.concatenate([np.zeros(0, np.int32), *rows]))
        if self._tables:
            table = table.take(np.flatnonzero(self.find(keys)[0] < 0))
        table = _sorted_without_repeats(table)
        while self._tables and 2 * len(table.high) > len(self._tables[-1].high):
            table = _sorted_without_repeats(self._tables.pop().followed_by(table))
        if len(table.high):
            self._tables.append(table)

    def move(self, starts: Mapping[int, int], number: int) -> None:
        """All rows of some parts lie in another one now, those of each from a row of it on."""
        moved_parts = np.array(sorted(starts))
        shifts = np.array([starts[part] for part in sorted(starts)], np.int32)
        for table in self._tables:
            moved = np.flatnonzero(np.isin(table.parts, moved_parts))
            table.rows[moved] += shifts[np.searchsorted(moved_parts, table.parts[moved])]
            table.parts[moved] = number

    def find(self, keys: Keys) -> tuple[Numbers, Numbers]:
        """Part number and row of each key, -1 where it is absent."""
        high, low = _halves(keys)
        parts, rows = np.full((2, len(keys)), -1, np.int32)
        for table in self._tables:
            positions = table.find(high, low)
            found = positions >= 0
            parts[found] = table.parts[positions[found]]
            rows[found] = table.rows[positions[found]]
        return parts, rows


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns of equal length: both halves of the key, part number, row in the part."""

    high: Halves
    low: Halves
    parts: Numbers
    rows: Numbers

    def take(self, positions: npt.NDArray[np.intp]) -> _Table:
        return _Table(self.high[positions], self.low[positions], self.parts[positions], self.rows[positions])

    def followed_by(self, other: _Table) -> _Table:
        return _Table(
            np.concatenate([self.high, other.high]),
            np.concatenate([self.low, other.low]),
            np.concatenate([self.parts, other.parts]),
            np.concatenate([self.rows, other.rows]),
        )

    def find(self, high: Halves, low: Halves) -> npt.NDArray[np.intp]:
        """Position of each key in this sorted table, -1 where it is absent."""
        order = np.argsort(high)  # neighbours in the table are looked up one after another: five times faster
        positions = np.empty(len(high), np.intp)
        positions[order] = np.searchsorted(self.high, high[order])
        result = np.full(len(high), -1, np.intp)
        open_ = np.arange(len(high))  # queries that are not settled
        while len(open_):
            open_ = open_[positions[open_] < len(self.high)]
            open_ = open_[self.high[positions[open_]] == high[open_]]
            same = self.low[positions[open_]] == low[open_]
            result[open_[same]] = positions[open_[same]]
            open_ = open_[~same]
            positions[open_] += 1  # another key with the same first half
        return result


def first_positions(keys: Keys) -> Numbers:
    """For each key the position of the first key that equals it, int32 [keys]."""
    index = KeyIndex()
    index.add([keys], 0)
    return index.find(keys)[1]


def _sorted_without_repeats(table: _Table) -> _Table:
    order = np.argsort(table.high, kind="stable")
    repeated_half = table.high[order[1:]] == table.high[order[:-1]]
    if not repeated_half.any():
        return table.take(order)
    order = np.lexsort((table.low, table.high))  # stable as well, and three times slower
    same_high = table.high[order[1:]] == table.high[order[:-1]]
    same_low = table.low[order[1:]] == table.low[order[:-1]]
    return table.take(order[np.concatenate([[True], ~(same_high & same_low)])])


def _halves(keys: Keys) -> tuple[Halves, Halves]:
    halves = np.ascontiguousarray(keys).view(np.uint64)
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])
