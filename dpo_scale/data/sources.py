"""Files and datasets -> raw rows, each with its place. A bad row is a value, not a crash."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSource

MAX_LINE_BYTES = 64 * 2**20
"""Longest accepted line; a longer one is unreadable (no text, or a compression bomb)."""


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

# name:split or name:config:split, the split only where there are several.
_HUB_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){0,2}")


def read_rows(source: DataSource, seed: int) -> Iterator[Row]:
    """The rows of a source in the order of its files, or `rows` of them drawn with `seed`."""
    if source.rows is None:
        yield from _all_rows(source.path)
        return
    count = sum(1 for _ in _all_rows(source.path))
    taken = set(random.Random(seed).sample(range(count), min(source.rows, count)))
    for index, row in enumerate(_all_rows(source.path)):
        if index in taken:
            yield row


def source_files(path: str) -> list[Path]:
    """The files of a file, folder or glob, sorted; empty for a dataset on the hub."""
    if glob.has_magic(path) and not Path(path).exists():
        files = sorted(Path(name) for name in glob.glob(path, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{path}: no file matches this pattern")
        return files
    folder = _dataset_folder(path)
    if folder is not None:
        return sorted(file for file in folder.rglob("*") if file.is_file())
    root = Path(path)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if _is_data_file(file, root))
        if not files:
            raise DataError(f"{path}: no data files in this folder; known: {_known_suffixes()}")
        return files
    if root.is_file():
        return [root]
    if not _HUB_DATASET.fullmatch(path) or _reader(root) is not None:
        raise DataError(f"{path}: no such file; check the paths of data.train and data.evaluate")
    return []


def open_dataset(path: str) -> Any:
    """The `datasets.Dataset` of a hub name or of a folder written by save_to_disk."""
    import datasets  # takes a second: only where it is needed

    folder = _dataset_folder(path)
    try:
        if folder is not None:
            loaded = datasets.load_from_disk(str(folder))
            split = None if folder == Path(path) else path.rpartition(":")[2]
        else:
            name, *config, split = (path if ":" in path else f"{path}:").split(":")
            loaded = datasets.load_dataset(name, *config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path}: neither a file nor a dataset that can be loaded ({reason}); "
            "check the path, or for a hub dataset its name, split and the network"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(f"{path}: name a split as in name:split; there are {', '.join(loaded)}")
    return loaded[split]


def _all_rows(path: str) -> Iterator[Row]:
    files = source_files(path)
    if not files or _dataset_folder(path) is not None:
        tables = open_dataset(path).with_format("arrow").iter(batch_size=1024)
        yield from _batches(path, tables)
        return
    for file in files:
        reader = _reader(file)
        if reader is None:
            raise DataError(f"{file}: unknown kind of file; known: {_known_suffixes()}")
        try:
            yield from reader(file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}; check the file") from error


def _dataset_folder(path: str) -> Path | None:
    """The folder that save_to_disk wrote, named as `folder` or `folder:split`."""
    for folder in (Path(path), Path(path.rpartition(":")[0])):
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return folder
    return None


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.is_file() and _reader(file) is not None


# --- one reader a kind of file -----------------------------------------------------------------


@contextmanager
def _open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says."""
    if file.suffix == ".gz":
        with gzip.GzipFile(file, "rb") as unzipped:
            yield io.BufferedReader(unzipped)
    elif file.suffix == ".zst":
        with pyarrow.input_stream(str(file), compression="zstd") as compressed:
            yield io.BufferedReader(compressed)
    else:
        with file.open("rb") as stream:
            yield stream


def _json_lines(file: Path) -> Iterator[Row]:
    with _open_bytes(file) as stream:
        number = 0
        while True:
            number += 1
            place = f"{file}:{number}"
            try:
                line = stream.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_LINE_BYTES)
                    yield BadRow(place, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                    continue
            except (EOFError, zlib.error, OSError) as error:
                yield BadRow(place, f"the file is damaged from here on ({error})")
                return
            if not line:
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _json_row(place, line)


def _json_row(place: str, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRow(place, f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(place, f"not valid JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return BadRow(place, "JSON nested too deeply")
    except ValueError as error:  # an integer of thousands of digits
        return BadRow(place, f"not readable as JSON ({error})")
    return _row(place, value)


def _row(place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return RawRow(place, value)
    return BadRow(place, f"a row is an object with named fields, this is {_kind(value)}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, or (many files named .json are) one object a line."""
    with _open_bytes(file) as stream:
        try:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"{file}: the file is damaged ({error})") from error
    if start != b"[":
        yield from _json_lines(file)
        return
    with _open_bytes(file) as stream:
        try:
            rows = json.loads(stream.read())
        except (ValueError, RecursionError, EOFError, zlib.error, OSError) as error:
            raise DataError(f"{file}: not valid JSON ({error}); mend the file") from error
    for number, value in enumerate(rows, 1):
        yield _row(f"{file}:{number}", value)


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open_bytes(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if ".tsv" in file.suffixes else ","
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield BadRow(f"{file}:{reader.line_num}", f"not valid CSV ({error})")
                continue
            except (EOFError, zlib.error, OSError) as error:
                yield BadRow(f"{file}:{reader.line_num}", f"the file is damaged from here on ({error})")
                return
            if fields is None:
                return
            place = f"{file}:{reader.line_num}"
            if None in fields or None in fields.values():
                count = len(reader.fieldnames or ())
                yield BadRow(place, f"the header names {count} columns, the row has more or fewer")
            else:
                yield RawRow(place, {name: _json_cell(cell) for name, cell in fields.items()})


def _json_cell(cell: str) -> Any:
    """Chats travel through CSV as JSON lists of messages; every other cell is text."""
    if not cell.startswith('[{"'):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _parquet(file: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _batches(file, table.iter_batches(batch_size=1024))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from error


def _arrow(file: Path) -> Iterator[Row]:
    try:
        with pyarrow.memory_map(str(file)) as stream:
            try:
                table = pyarrow.ipc.open_file(stream)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                batches = iter(pyarrow.ipc.open_stream(stream))
            yield from _batches(file, batches)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Arrow file ({error})") from error


def _batches(file: Path | str, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield RawRow(f"{file}:{number}", fields)


_READERS: Sequence[tuple[str, Callable[[Path], Iterator[Row]]]] = (
    (".jsonl", _json_lines),
    (".ndjson", _json_lines),
    (".json", _json),
    (".csv", _csv),
    (".tsv", _csv),
    (".parquet", _parquet),
    (".arrow", _arrow),
)
_TEXT = (_json_lines, _json, _csv)


def _reader(file: Path) -> Callable[[Path], Iterator[Row]] | None:
    name = file.name.lower()
    compressed = name.endswith((".gz", ".zst"))
    stem = name.rsplit(".", 1)[0] if compressed else name
    for suffix, reader in _READERS:
        if stem.endswith(suffix) and (not compressed or reader in _TEXT):
            return reader
    return None


def _known_suffixes() -> str:
    return ", ".join(suffix for suffix, _ in _READERS) + " (text also as .gz or .zst)"
