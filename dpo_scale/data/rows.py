"""Rows as their source gives them: one by one with their places, or in blocks that are not parsed yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file gives it."""

    place: str
    """`file.jsonl:17`: the line of a text file, the row of any other source; both count from 1."""
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    reason: str


Row = RawRow | BadRow


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands in a block where a row could not be read."""

    reason: str


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one file that were read but not parsed, which is cheap to send to another process.

    Args:
        file: the file, or the name of a dataset.
        numbers: int64 [rows], line or row of each; rising.
        contents: an Arrow table, or a list of JSON texts (bytes), `Unreadable`s and parsed values.
        copies: int64 [rows], how often each row is taken; None means once.
    """

    file: str
    numbers: Numbers
    contents: Sequence[Any] | pyarrow.RecordBatch
    copies: Numbers | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, copies: Numbers) -> Block:
        """The rows that are wanted, int64 [rows] times each. What cannot be read is never left out."""
        contents: Any
        if isinstance(self.contents, Sequence):
            unreadable = np.array([isinstance(content, Unreadable) for content in self.contents], np.bool_)
            copies = np.where(unreadable, 1, copies)
            kept = np.flatnonzero(copies)
            contents = [self.contents[position] for position in kept.tolist()]
        else:
            kept = np.flatnonzero(copies)
            contents = self.contents.take(kept)
        return Block(self.file, self.numbers[kept], contents, copies[kept])

    def rows(self) -> Iterator[Row]:
        """The rows, parsed."""
        contents = self.contents
        values = contents if isinstance(contents, Sequence) else _table_rows(contents)
        for number, value in zip(self.numbers.tolist(), values, strict=True):
            yield _row(f"{self.file}:{number}", value)


def _row(place: str, value: Any) -> Row:
    if isinstance(value, bytes):
        value = _json(value)
    if isinstance(value, dict):
        return RawRow(place, value)
    if isinstance(value, Unreadable):
        return BadRow(place, value.reason)
    return BadRow(place, f"a row is an object with named fields, this is {_kind(value)}")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        column = 1 + min(error.pos, len(error.doc.rstrip()))  # what ends too early ends here, not after its newline
        return Unreadable(f"not valid JSON ({error.msg}, column {column})")
    except RecursionError:
        return Unreadable("JSON nested too deeply")
    except ValueError as error:  # an integer of thousands of digits
        return Unreadable(f"not readable as JSON ({error})")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _table_rows(table: pyarrow.RecordBatch) -> list[Any]:
    """The rows as dictionaries; those that Python has no values for (text that is no UTF-8) as `Unreadable`."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except (ValueError, OverflowError):
        if len(table) == 1:
            return [Unreadable("a value that Python cannot hold, or text that is not UTF-8")]
        half = len(table) // 2
        return [*_table_rows(table.slice(0, half)), *_table_rows(table.slice(half))]
    return [{name: _without_nulls(value) for name, value in row.items()} for row in rows]


def _without_nulls(value: Any) -> Any:
    """A value without the nulls inside its objects: a table fills with them what other rows have and this one has not.

    Told of, a tool would be called with arguments that nobody gave it.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
