"""Parquet and Arrow -> blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from dpo_scale.data import readers
from dpo_scale.data.rows import Block, Unreadable
from dpo_scale.errors import DataError


def table_blocks(file: str, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Block]:
    """Arrow batches as blocks of bounded size, numbered from 1; ends with the reason where they cannot be read."""
    number = 1
    while True:
        try:
            batch = next(batches, None)
            if batch is not None:
                batch.validate()
        except (pyarrow.ArrowException, OSError) as error:
            yield Block(file, np.array([number], np.int64), [Unreadable(f"{readers.DAMAGED} ({error})")])
            return
        if batch is None:
            return
        for part in _sound_parts(batch):
            if isinstance(part, Unreadable):
                yield Block(file, np.array([number], np.int64), [part])
                number += 1
            else:
                yield from _blocks(file, number, part)
                number += len(part)


def _sound_parts(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch | Unreadable]:
    """The rows in their order, each that is not sound apart.

    Arrow does not look at what it reads: a value in a damaged file may lie outside of the file, and end the process.
    """
    try:
        for column in batch.columns:
            _check(column)
    except pyarrow.ArrowInvalid as error:
        if len(batch) == 1:
            yield Unreadable(f"damaged ({error})")
            return
        half = len(batch) // 2
        yield from _sound_parts(batch.slice(0, half))
        yield from _sound_parts(batch.slice(half))
    else:
        yield batch


def _check(array: pyarrow.Array) -> None:
    """Raise ArrowInvalid where a value lies outside of what was read. Text that is not UTF-8 is left to its row.

    Arrow's own check of a slice looks at the whole of what lies inside of lists and structs: here only at the slice.
    """
    kind = array.type
    if not len(array):
        return
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        array.view(pyarrow.binary() if pyarrow.types.is_string(kind) else pyarrow.large_binary()).validate(full=True)
    elif pyarrow.types.is_struct(kind):
        for index in range(kind.num_fields):
            _check(array.field(index))
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        offsets, values = array.offsets, array.values
        type(array).from_arrays(offsets, pyarrow.nulls(len(values))).validate(full=True)
        start, stop = offsets[0].as_py(), offsets[-1].as_py()
        _check(values.slice(start, stop - start))
    else:
        array.validate(full=True)


def _blocks(file: str, number: int, batch: pyarrow.RecordBatch) -> Iterator[Block]:
    rows = max(1, min(readers.BLOCK_ROWS, readers.BLOCK_BYTES * len(batch) // max(1, batch.nbytes)))
    for start in range(0, len(batch), rows):
        part = np.arange(start, min(start + rows, len(batch)))
        # Taken, not sliced: a slice would carry the whole batch to another process.
        yield Block(file, number + part, batch.take(pyarrow.array(part)))


@contextmanager
def _open_parquet(file: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from error
    with table:
        yield table


def count_parquet_rows(file: Path) -> int:
    """How many rows a file has, without decoding them."""
    with _open_parquet(file) as table:
        return int(table.metadata.num_rows)


def parquet_blocks(file: Path) -> Iterator[Block]:
    """The rows of a Parquet file. Raises DataError where it is none."""
    with _open_parquet(file) as table:
        groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        rows = max(1, min(2 * readers.BLOCK_ROWS, readers.BLOCK_BYTES // max(1, row_bytes)))
        yield from table_blocks(str(file), table.iter_batches(batch_size=rows))


def arrow_blocks(file: Path) -> Iterator[Block]:
    """The rows of an Arrow file or stream. Raises DataError where it is neither."""
    try:
        with pyarrow.memory_map(str(file)) as stream:
            try:
                table = pyarrow.ipc.open_file(stream)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                batches = iter(pyarrow.ipc.open_stream(stream))
            yield from table_blocks(str(file), batches)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Arrow file ({error})") from error
