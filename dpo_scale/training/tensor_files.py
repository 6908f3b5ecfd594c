"""safetensors files written and read piece by piece: memory holds one tensor and never the file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's line in the header of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written to its end and flushed to the disk."""

    name: str
    bytes: int
    sha256: str


def aligned(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Wide types first: readers view bytes in place, which needs offsets that the type divides."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def write_tensors(
    path: Path,
    entries: Sequence[TensorEntry],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> FileRecord:
    """Write a safetensors file with one tensor in memory at a time.

    `tensors` yields in the order of `entries`, which must be `aligned`; each tensor is used up
    before the next is asked for. Raises OSError if the disk refuses.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(entries, metadata)
        file.write(header)
        digest.update(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            data = _bytes_of(tensor.detach().cpu().contiguous())
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileRecord(path.name, size, digest.hexdigest())


class TensorFile:
    """A safetensors file of flat tensors, read by slices with plain reads.

    A memory map would leave every page that was read in the process's resident memory. A file that was closed
    opens again when it is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self._data_start = 8 + length

    @property
    def names(self) -> set[str]:
        return self._header.keys() - {"__metadata__"}

    def close(self) -> None:
        self._file.close()

    def read_all(self, name: str) -> torch.Tensor:
        """A whole flat tensor."""
        return self.read(name, 0, self._header[name]["shape"][0])

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flat tensor."""
        entry = self._header[name]
        dtype = _DTYPES[entry["dtype"]]
        assert 0 <= start <= stop <= entry["shape"][0], (name, start, stop, entry["shape"])
        tensor = torch.empty(stop - start, dtype=dtype)
        if self._file.closed:
            self._file = self._path.open("rb", buffering=0)
        self._file.seek(self._data_start + entry["data_offsets"][0] + start * dtype.itemsize)
        left = _bytes_of(tensor)
        while left:
            count = self._file.readinto(left)  # at most 2 GiB a call on Linux
            if not count:
                raise OSError(f"{self._file.name}: ends within {name}")
            left = left[count:]
        return tensor


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The format's header: its length in 8 bytes, then JSON padded to a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        assert entry.name not in fields, entry.name
        assert offset % entry.dtype.itemsize == 0, f"{entry.name} is misaligned; use aligned()"
        fields[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
