"""DeepSpeed's async_io for machines without libaio: the same calls in Python, each done at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

LOCKED: dict[int, int] = {}
"""Address -> bytes of what counts as locked, of all handles."""


class Handle:
    """Reads and writes whole tensors; "locked" ones are ordinary memory that is remembered as locked."""

    def __init__(self, **settings: Any) -> None:
        self._done = 0

    def new_cpu_locked_tensor(self, elements: int, like: Tensor) -> Tensor:
        tensor = torch.zeros(elements, dtype=like.dtype)
        LOCKED[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return LOCKED.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(first <= tensor.data_ptr() < first + size for first, size in LOCKED.items())

    def async_pwrite(self, tensor: Tensor, path: str, offset: int = 0) -> int:
        assert offset == 0
        Path(path).write_bytes(_bytes_of(tensor.contiguous()).tobytes())
        self._done += 1
        return 0

    def async_pread(self, tensor: Tensor, path: str, offset: int = 0) -> int:
        assert offset == 0
        content = np.fromfile(path, np.uint8, count=tensor.nbytes)
        _bytes_of(tensor)[: content.size] = content
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor as an array that shares its memory."""
    return tensor.detach().view(torch.uint8).numpy()


def stand_in_where_libaio_is_absent() -> None:
    if AsyncIOBuilder().is_compatible(verbose=False):
        return
    AsyncIOBuilder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=Handle)
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
