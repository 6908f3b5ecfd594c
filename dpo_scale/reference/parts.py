"""One part of a store: a safetensors file of rows, named by the SHA-256 of its own bytes.

    keys     uint8    [rows, 16]   see row_keys.py
    offsets  int64    [rows + 1]   row i is values[offsets[i] : offsets[i + 1]]
    values   float32  [tokens]     log-probs of the completion tokens, in nats

The name makes it unique, makes writing it twice harmless, and lets `sha256sum` alone prove it
sound. The metadata holds the key of the reference, so that a part copied into another store's
folder is not believed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from dpo_scale.files import fsync_folder, write_whole

Keys = npt.NDArray[np.uint8]
LogProbs = npt.NDArray[np.float32]

KEY_BYTES = 16
MAX_PART_BYTES = 64 << 20
_DIGEST_DIGITS = 32
_LENGTH_BYTES = 8


class DamagedPartError(Exception):
    """A part whose size, layout or checksum is not what was written."""


def batches(sizes: Sequence[int]) -> Iterator[slice]:
    """What goes into one part each, given the bytes of rows or of parts; none of them is cut."""
    start, part_bytes = 0, 0
    for end, size in enumerate(sizes):
        if end > start and part_bytes + size > MAX_PART_BYTES:
            yield slice(start, end)
            start, part_bytes = end, 0
        part_bytes += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def write_part(folder: Path, reference_key: str, keys: Keys, rows: Sequence[LogProbs]) -> Path:
    """Write rows as one part, whole or not at all; durable when this returns."""
    lengths = [len(row) for row in rows]
    content = save(
        {
            "keys": np.ascontiguousarray(keys),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "values": np.concatenate(rows).astype(np.float32, copy=False),
        },
        metadata={"reference": reference_key},
    )
    path = folder / _part_name(hashlib.sha256(content).hexdigest())
    write_whole(path, content)
    return path


def read_whole(path: Path) -> tuple[Keys, list[LogProbs]]:
    """Keys and rows of a part, all of its bytes held against its name. Raises OSError, or DamagedPartError."""
    content = path.read_bytes()
    check_digest(path, hashlib.sha256(content).hexdigest())
    tensors = load(content)
    return tensors["keys"], np.split(tensors["values"], tensors["offsets"][1:-1])


def check_digest(path: Path, sha256: str) -> None:
    """Hold a part's name against the SHA-256 of its bytes, in hex. Raises DamagedPartError."""
    if path.name != _part_name(sha256):
        raise DamagedPartError(f"{path.name}: its bytes have changed (SHA-256 {sha256[:12]}...)")


def set_aside(path: Path) -> bool:
    """Rename a damaged part so that nobody reads it again; False where that is forbidden."""
    try:
        path.rename(path.with_name(f"damaged-{path.name}"))
    except FileNotFoundError:  # another process was first
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    fsync_folder(path.parent)
    return True


def is_gone(error: OSError) -> bool:
    """Whether a file was merged, pruned or set aside by another process; ESTALE is NFS's word for it."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def is_forbidden(error: OSError) -> bool:
    """Whether a file is another user's who lets nobody else read it."""
    return error.errno in (errno.EACCES, errno.EPERM)


def size_of(path: Path) -> int:
    """Bytes of a part; 0 if it is gone."""
    try:
        return path.stat().st_size
    except OSError as error:
        if not is_gone(error):
            raise
        return 0


class Part:
    """An open part: its layout is checked, its rows stay in the file until they are asked for.

    It is read with plain reads: where a file that another node unlinks is mapped, NFS kills the reader.

    Raises OSError if it is gone (see is_gone), DamagedPartError if it is truncated or is no part of
    this reference (None: of any).
    """

    def __init__(self, path: Path, reference_key: str | None) -> None:
        self._name = path.name
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            self._read_header(reference_key)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # bytes that are no header
            raise DamagedPartError(f"{path.name}: its header cannot be read ({error})") from error

    def _read_header(self, reference_key: str | None) -> None:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(self._read(0, min(_LENGTH_BYTES, size)), "little")
        self._data_start = _LENGTH_BYTES + length
        if self._data_start > size:
            raise DamagedPartError(f"{self._name}: ends within its header")
        header = json.loads(self._read(_LENGTH_BYTES, length))
        owner = header.pop("__metadata__", {}).get("reference")
        if reference_key not in (owner, None):
            raise DamagedPartError(f"{self._name}: holds rows of another reference ({owner})")
        if set(header) != {"keys", "offsets", "values"}:
            raise DamagedPartError(f"{self._name}: holds {', '.join(sorted(header))}")
        self.num_rows: int = header["keys"]["shape"][0]
        self.num_tokens: int = header["values"]["shape"][0]
        expected = {
            "keys": ("U8", [self.num_rows, KEY_BYTES], KEY_BYTES * self.num_rows),
            "offsets": ("I64", [self.num_rows + 1], 8 * (self.num_rows + 1)),
            "values": ("F32", [self.num_tokens], 4 * self.num_tokens),
        }
        self._starts: dict[str, int] = {name: self._data_start + header[name]["data_offsets"][0] for name in header}
        layout = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
        if layout != expected:
            raise DamagedPartError(f"{self._name}: layout {layout}, expected {expected}")
        if (expected_size := self._data_start + sum(length for _, _, length in layout.values())) != size:
            raise DamagedPartError(f"{self._name}: has {size} bytes instead of {expected_size}")

    def keys(self) -> Keys:
        """Keys of all rows, uint8 [rows, 16]."""
        data = self._read(self._starts["keys"], KEY_BYTES * self.num_rows)
        return np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)

    def log_probs(self, rows: npt.NDArray[np.int32]) -> list[LogProbs]:
        """Per-token log-probs of some rows; only their bytes are read. Raises OSError if the part is gone."""
        offsets = np.frombuffer(self._read(self._starts["offsets"], 8 * (self.num_rows + 1)), "<i8")
        spans = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        first = self._starts["values"]
        return [np.frombuffer(self._read(first + 4 * start, 4 * (end - start)), np.float32) for start, end in spans]

    def _read(self, start: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, start)
        if len(data) != length:  # a part is far below the 2 GiB that one read gives on Linux
            raise DamagedPartError(f"{self._name}: ends after {start + len(data)} bytes")
        return data


def _part_name(sha256: str) -> str:
    return f"part-{sha256[:_DIGEST_DIGITS]}.safetensors"
