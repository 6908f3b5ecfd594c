"""The tensors of a checkpoint, read back by any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from safetensors.torch import load_file

from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.distributed.parameter_slices import ParameterSlice, SliceAddress, slice_bounds
from dpo_scale.training.checkpoints import Checkpoint, CheckpointError
from dpo_scale.training.rank_files import BUFFERS_FILE, MOMENTS, rank_file
from dpo_scale.training.tensor_files import TensorFile

_MAX_OPEN_FILES = 256
"""A quarter of the 1,024 that a process may have open where nobody set another limit."""


class StoredState:
    """A checkpoint's slices by address; a context manager that closes the files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[int, TensorFile] = {}
        self._open: dict[int, TensorFile] = {}
        """Those of `_files` that are open, the one used last at the end."""

    def __enter__(self) -> StoredState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.close()

    def read(self, address: SliceAddress) -> ParameterSlice:
        """Any slice of a parameter, whatever the number of ranks that wrote it."""
        return ParameterSlice(address, *(self._read(address, moment) for moment in MOMENTS))

    def watched(self, progress: Callable[[int], None]) -> Callable[[SliceAddress], ParameterSlice]:
        """`read`, and `progress` is told of further bytes."""

        def read(address: SliceAddress) -> ParameterSlice:
            progress(address.stored_bytes)
            return self.read(address)

        return read

    def read_parameter(self, name: str) -> torch.Tensor:
        """A whole parameter's fp32 weights, in its shape."""
        shape = self.checkpoint.commit.parameters[name]
        return self._read(SliceAddress(name, shape, 0, math.prod(shape)), "master").view(shape)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers."""
        buffers: dict[str, torch.Tensor] = load_file(self.checkpoint.path / BUFFERS_FILE)
        return buffers

    def restore_random_state(self, ranks: Ranks) -> None:
        """Put this rank's generators back, if as many ranks wrote them; else change nothing."""
        if ranks.world_size != self.checkpoint.commit.world_size:
            return
        file = self._file(ranks.rank)
        torch.set_rng_state(file.read_all("random_state.cpu"))
        if "random_state.device" in file.names and ranks.device.type != "cpu":
            state = file.read_all("random_state.device")
            torch.get_device_module(ranks.device).set_rng_state(state, ranks.device)

    def _read(self, address: SliceAddress, moment: str) -> torch.Tensor:
        world_size = self.checkpoint.commit.world_size
        elements = math.prod(address.shape)
        result = torch.empty(address.stop - address.start)
        rank_size = max(slice_bounds(elements, 0, world_size)[1], 1)
        for rank in range(address.start // rank_size, world_size):
            start, stop = slice_bounds(elements, rank, world_size)
            first, last = max(start, address.start), min(stop, address.stop)
            if first >= last:
                break
            piece = self._file(rank).read(f"{address.name}.{moment}", first - start, last - start)
            result[first - address.start : last - address.start] = piece
        return result

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            name = rank_file(rank, self.checkpoint.commit.world_size)
            self._files[rank] = TensorFile(self.checkpoint.path / name)
        self._open.pop(rank, None)
        self._open[rank] = self._files[rank]
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return self._files[rank]


def check_fits(checkpoint: Checkpoint, parameters: Mapping[str, Sequence[int]]) -> None:
    """Refuse, before anything is read, a checkpoint of another model. Raises CheckpointError."""
    stored = checkpoint.commit.parameters
    present = {name: tuple(shape) for name, shape in parameters.items()}
    wrong = [
        f"{name}: {stored.get(name, 'absent')} stored, {present.get(name, 'absent')} in the model"
        for name in dict.fromkeys([*stored, *present])
        if stored.get(name) != present.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: of another model ({len(wrong)} parameters differ; {wrong[0]}); "
            "resume with the model that it was trained from"
        )
