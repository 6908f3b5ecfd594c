"""What travels between a ZeRO-3 engine and a checkpoint: flat slices, named by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch


def slice_bounds(elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """The elements [start, stop) of a flattened parameter that ZeRO-3 gives to a rank."""
    size = -(-elements // world_size)
    return min(rank * size, elements), min((rank + 1) * size, elements)


@dataclass(frozen=True, slots=True)
class SliceAddress:
    """Elements [start, stop) of a flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of_rank(cls, name: str, shape: tuple[int, ...], rank: int, world_size: int) -> SliceAddress:
        """The slice of a parameter that one rank owns."""
        return cls(name, shape, *slice_bounds(math.prod(shape), rank, world_size))

    @property
    def stored_bytes(self) -> int:
        """Size of its master weights and both moments in fp32."""
        return 12 * (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """The fp32 master weights and Adam moments at an address, each of shape [stop - start]."""

    address: SliceAddress
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossScale:
    """State of fp16's dynamic loss scale."""

    scale: float
    iteration: int
    last_overflow_iteration: int
    hysteresis: int


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """The numbers that an engine carries from step to step."""

    optimizer_steps: int
    """Updates that the optimizer has made; Adam's bias correction follows from it."""
    engine_steps: int
    """Steps that the engine has seen, the skipped ones included."""
    skipped_steps: int
    """Steps skipped for an overflow."""
    loss_scale: LossScale | None
    """None where the scale never changes (fp32, bf16, a fixed scale)."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One rank's view of an engine between two steps: all that a checkpoint needs."""

    architecture: str
    """Class of the Hugging Face model."""
    dtype: torch.dtype
    """Precision of forward and backward."""
    parameters: Mapping[str, tuple[int, ...]]
    """Hugging Face names and shapes in the order of the model, each tied weight once."""
    buffers: Mapping[str, torch.Tensor]
    """Persistent buffers; every rank has them whole."""
    addresses: tuple[SliceAddress, ...]
    """What this rank owns, in the order of `read_slices`."""
    read_slices: Callable[[], Iterator[ParameterSlice]]
    """Each slice is valid until the next is asked for."""
    counters: EngineCounters

    @property
    def stored_bytes(self) -> int:
        """Size of this rank's slices in fp32."""
        return sum(address.stored_bytes for address in self.addresses)

    def watched(self, progress: Callable[[int], None]) -> EngineSnapshot:
        """The same snapshot; `progress` is told of further bytes once a reader is done with them."""

        def read_slices() -> Iterator[ParameterSlice]:
            for piece in self.read_slices():
                yield piece
                progress(piece.address.stored_bytes)

        return replace(self, read_slices=read_slices)
