"""Kinds of files -> blocks of rows, in bounded memory whatever the file holds."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dpo_scale.data.rows import Block, Unreadable
from dpo_scale.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
"""Longest accepted row of a text file; a longer one is unreadable (no text, or a compression bomb)."""
BLOCK_ROWS = 512
BLOCK_BYTES = 4 * 2**20
"""A block ends at the row that goes beyond this."""
JSON_PIECE = 2**16
"""Characters of a JSON list that are read at once; what a damage costs beside the row that it strikes."""
_AFTER_A_VALUE = frozenset(",] \t\n\r")

Numbered = tuple[int, Any, int]
"""Line or row, content, and about how many bytes it takes."""

JSON_ARRAY = "a JSON array in a file of one object a line; name the file .json"
DAMAGED = "the file is damaged from here on"
_DAMAGE = (EOFError, zlib.error, OSError)


def read_file(file: Path) -> Iterator[Block]:
    """The rows of a file in their order. Raises DataError for a file that is not what its name says."""
    reader = _reader(file)
    if reader is None:
        raise DataError(f"{file}: unknown kind of file; known: {known_suffixes()}")
    try:
        yield from reader(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; check the file") from error


def count_rows(file: Path) -> int:
    """How many rows `read_file` gives, without parsing those of JSON Lines or decoding those of Parquet."""
    if _reader(file) is _parquet:
        from dpo_scale.data import tables  # as below

        return tables.count_parquet_rows(file)
    return sum(len(block) for block in read_file(file))


def is_known(file: Path) -> bool:
    """Whether the name is that of a kind of file with rows."""
    return _reader(file) is not None


def known_suffixes() -> str:
    """The kinds of files, for messages."""
    return ", ".join(suffix for suffix, _ in _READERS) + " (text also as .gz or .zst)"


def _text_blocks(file: Path, rows: Iterable[Numbered]) -> Iterator[Block]:
    numbers: list[int] = []
    contents: list[Any] = []
    size = 0
    for number, content, bytes_ in rows:
        numbers.append(number)
        contents.append(content)
        size += bytes_
        if len(numbers) == BLOCK_ROWS or size > BLOCK_BYTES:
            yield Block(str(file), np.array(numbers, np.int64), contents)
            numbers, contents, size = [], [], 0
    if numbers:
        yield Block(str(file), np.array(numbers, np.int64), contents)


def _too_long() -> str:
    return f"the row is longer than {MAX_ROW_BYTES >> 20} MiB"


@contextmanager
def _open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says."""
    if file.suffix.lower() == ".gz":
        with gzip.GzipFile(file, "rb") as unzipped:
            yield io.BufferedReader(unzipped)  # a small buffer: what it holds is lost at a damage
    elif file.suffix.lower() == ".zst":
        import pyarrow  # as below

        with pyarrow.input_stream(str(file), compression="zstd") as compressed:
            yield io.BufferedReader(compressed)
    else:
        with file.open("rb", buffering=2**18) as stream:
            yield stream


# --- JSON --------------------------------------------------------------------------------------


def _json_lines(file: Path) -> Iterator[Block]:
    with _open_bytes(file) as stream:
        yield from _text_blocks(file, _lines(stream))


def _lines(stream: IO[bytes]) -> Iterator[Numbered]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_ROW_BYTES + 1)
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_ROW_BYTES)
                yield number, Unreadable(_too_long()), 0
                continue
        except _DAMAGE as error:
            yield number, Unreadable(f"{DAMAGED} ({error})"), 0
            return
        if not line:
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.lstrip().startswith(b"["):
                yield number, Unreadable(JSON_ARRAY), 0
                continue
        if not line.isspace() and line:
            yield number, line, len(line)


def _json(file: Path) -> Iterator[Block]:
    """A list of objects, or (many files named .json are) one object a line."""
    with _open_bytes(file) as stream:
        try:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        except _DAMAGE as error:
            raise DataError(f"{file}: the file is damaged ({error})") from error
    if start != b"[":
        yield from _json_lines(file)
        return
    with _open_bytes(file) as stream:
        yield from _text_blocks(file, _list_items(stream))


def _list_items(stream: IO[bytes]) -> Iterator[Numbered]:
    """The values of a list, read one by one: the list may be larger than the memory."""
    number = 1
    try:
        window = _Window(stream)
        window.take("[")
        if window.peek() == "]":
            return
        while True:
            value, size = window.value()
            yield number, value, size
            number += 1
            if window.peek() != ",":
                break
            window.take(",")
        window.take("]")
        if window.peek():
            raise json.JSONDecodeError("text behind the end of the list", window.piece, window.at)
    except json.JSONDecodeError as error:
        yield number, Unreadable(f"not valid JSON from here on ({error.msg})"), 0
    except RecursionError:
        yield number, Unreadable("JSON nested too deeply, not readable from here on"), 0
    except (ValueError, *_DAMAGE) as error:  # an integer of thousands of digits, a damaged archive
        yield number, Unreadable(f"not readable from here on ({error})"), 0


class _Window:
    """A piece of a JSON text that slides over it; grows only as far as one value needs."""

    _decoder = json.JSONDecoder()
    _space = re.compile(r"[ \t\n\r]*")
    """What JSON calls whitespace, less than Python does."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.piece, self.at = "", 0

    def _more(self) -> bool:
        new = self._text.read(max(JSON_PIECE, len(self.piece) - self.at))
        self.piece, self.at = self.piece[self.at :] + new, 0
        return bool(new)

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            match = self._space.match(self.piece, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.piece):
                return self.piece[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character. Raises JSONDecodeError where another one stands."""
        if self.peek() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.piece, self.at)
        self.at += 1

    def value(self) -> tuple[Any, int]:
        """Go past a value; returns it and the number of its characters."""
        self.peek()
        while True:
            end, mistake = -1, None
            try:
                value, end = self._decoder.raw_decode(self.piece, self.at)
            except json.JSONDecodeError as error:
                mistake = error
            is_whole = end >= 0 and self.piece[end : end + 1] in _AFTER_A_VALUE  # else "1" may become "1.5"
            if not is_whole and len(self.piece) - self.at > MAX_ROW_BYTES:
                raise ValueError(_too_long())
            if is_whole or not self._more():
                if mistake is not None:
                    raise mistake
                size, self.at = end - self.at, end
                return value, size


# --- CSV ---------------------------------------------------------------------------------------


def _csv(file: Path) -> Iterator[Block]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open_bytes(file) as stream:
        yield from _text_blocks(file, _csv_rows(file, stream))


class _Lines:
    """Lines of a text, no more of them to one row than a row may hold."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.characters = 0
        """Characters read since the row began."""

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(MAX_ROW_BYTES + 1):
            self.characters += len(line)
            if self.characters > MAX_ROW_BYTES:
                raise ValueError(_too_long())
            yield line


def _csv_rows(file: Path, stream: IO[bytes]) -> Iterator[Numbered]:
    lines = _Lines(stream)
    # The name says it all: "rows.tsv", "rows.tsv.gz".
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.characters = 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, Unreadable(f"not valid CSV ({error})"), 0
            continue
        except (ValueError, *_DAMAGE) as error:
            yield reader.line_num + 1, Unreadable(f"{DAMAGED} ({error})"), 0
            return
        if cells is None:
            return
        if header is None:
            header = cells
            _check_header(file, header, delimiter)
        elif len(cells) == len(header):
            yield reader.line_num, _csv_fields(header, cells), sum(map(len, cells))
        elif cells:
            reason = f"the header names {len(header)} columns, the row has {len(cells)}"
            yield reader.line_num, Unreadable(reason), 0


def _check_header(file: Path, header: Sequence[str], delimiter: str) -> None:
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DataError(f"{file}: the header names {', '.join(sorted(repeated))} twice; rename a column")
    others = [mark for mark in ",;\t|" if mark != delimiter and len(header) == 1 and mark in header[0]]
    if others:
        raise DataError(
            f"{file}: the file seems to be separated by {others[0]!r}, and commas (tabs in .tsv) are read; "
            "save it with these"
        )


def _csv_fields(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | Unreadable:
    for name, cell in zip(header, cells, strict=True):
        if _PYTHON_CHAT.match(cell):
            return Unreadable(f"{name!r} holds a list as Python prints it; write it as JSON (json.dumps)")
    return {name: _json_cell(cell) for name, cell in zip(header, cells, strict=True)}


_JSON_CHAT = re.compile(r'\s*\[\s*\{\s*"')
_PYTHON_CHAT = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


def _json_cell(cell: str) -> Any:
    """Chats travel through CSV as JSON lists of messages; every other cell is text."""
    if not _JSON_CHAT.match(cell):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


# --- tables ------------------------------------------------------------------------------------


def _parquet(file: Path) -> Iterator[Block]:
    from dpo_scale.data import tables  # pyarrow takes 30 MiB, which a rank that finds the store filled can do without

    return tables.parquet_blocks(file)


def _arrow(file: Path) -> Iterator[Block]:
    from dpo_scale.data import tables  # as above

    return tables.arrow_blocks(file)


_READERS: Sequence[tuple[str, Callable[[Path], Iterator[Block]]]] = (
    (".jsonl", _json_lines),
    (".ndjson", _json_lines),
    (".json", _json),
    (".csv", _csv),
    (".tsv", _csv),
    (".parquet", _parquet),
    (".arrow", _arrow),
)
_TEXT = (_json_lines, _json, _csv)


def _reader(file: Path) -> Callable[[Path], Iterator[Block]] | None:
    name = file.name.lower()
    compressed = name.endswith((".gz", ".zst"))
    stem = name.rsplit(".", 1)[0] if compressed else name
    for suffix, reader in _READERS:
        if stem.endswith(suffix) and (not compressed or reader in _TEXT):
            return reader
    return None
