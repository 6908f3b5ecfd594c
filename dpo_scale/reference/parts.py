"""One part of a store: a safetensors file of rows, named by the SHA-256 of its own bytes.

    keys     uint8    [rows, 16]   see cache.row_keys
    offsets  int64    [rows + 1]   row i is values[offsets[i] : offsets[i + 1]]
    values   float32  [tokens]     log-probs of the completion tokens, in nats

The name makes it unique, makes writing it twice harmless, and lets `sha256sum` alone prove it
sound. The metadata holds the key of the reference, so that a part copied into another store's
folder is not believed.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dpo_scale.files import fsync_folder, write_whole

Keys = npt.NDArray[np.uint8]
LogProbs = npt.NDArray[np.float32]

KEY_BYTES = 16
_DIGEST_DIGITS = 32


class DamagedPartError(Exception):
    """A part whose size, layout or checksum is not what was written."""


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


class Part:
    """An open part: its layout is checked, its rows stay in the file until they are asked for.

    Raises FileNotFoundError if it is gone, DamagedPartError if it is truncated or is no part of
    this reference (None: of any).
    """

    def __init__(self, path: Path, reference_key: str | None) -> None:
        try:
            self._file = cast(Any, safe_open)(path, framework="numpy")
        except SafetensorError as error:
            raise DamagedPartError(f"{path.name}: {error}") from error
        owner = (self._file.metadata() or {}).get("reference")
        if reference_key not in (owner, None):
            raise DamagedPartError(f"{path.name}: holds rows of another reference ({owner})")
        layout = {
            name: (self._file.get_slice(name).get_dtype(), self._file.get_slice(name).get_shape())
            for name in self._file.keys()  # noqa: SIM118 - not a mapping
        }
        if set(layout) != {"keys", "offsets", "values"}:
            raise DamagedPartError(f"{path.name}: holds {', '.join(sorted(layout))}")
        self.num_rows: int = layout["keys"][1][0]
        self.num_tokens: int = layout["values"][1][0]
        expected = {
            "keys": ("U8", [self.num_rows, KEY_BYTES]),
            "offsets": ("I64", [self.num_rows + 1]),
            "values": ("F32", [self.num_tokens]),
        }
        if layout != expected:
            raise DamagedPartError(f"{path.name}: layout {layout}, expected {expected}")

    def keys(self) -> Keys:
        """Keys of all rows, uint8 [rows, 16]."""
        keys: Keys = self._file.get_tensor("keys")
        return keys

    def log_probs(self, rows: npt.NDArray[np.int32]) -> list[LogProbs]:
        """Per-token log-probs of some rows; only their bytes are read."""
        values = self._file.get_slice("values")
        offsets = self._file.get_tensor("offsets")
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        empty = np.zeros(0, np.float32)  # the library refuses an empty slice at the very end
        return [values[start:end] if end > start else empty for start, end in zip(starts, ends, strict=True)]


def _part_name(sha256: str) -> str:
    return f"part-{sha256[:_DIGEST_DIGITS]}.safetensors"
