"""What one rank puts into a checkpoint: its slices, its generators' state, and on the main rank the buffers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.distributed.parameter_slices import EngineSnapshot
from dpo_scale.training.tensor_files import FileRecord, TensorEntry, aligned, write_tensors

MOMENTS = ("master", "exp_avg", "exp_avg_sq")
BUFFERS_FILE = "buffers.safetensors"


def rank_file(rank: int, world_size: int) -> str:
    """Name of one rank's tensors."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_rank(folder: Path, snapshot: EngineSnapshot, ranks: Ranks) -> list[FileRecord]:
    """This rank's files and their manifest."""
    random_state = _random_state(ranks.device)
    entries = [
        TensorEntry(f"{address.name}.{moment}", torch.float32, (address.stop - address.start,))
        for address in snapshot.addresses
        for moment in MOMENTS
    ]
    entries += [TensorEntry(name, state.dtype, tuple(state.shape)) for name, state in random_state.items()]

    def tensors() -> Iterator[torch.Tensor]:
        for piece in snapshot.read_slices():
            yield from (piece.master, piece.exp_avg, piece.exp_avg_sq)
        yield from random_state.values()

    bounds = {address.name: [address.start, address.stop] for address in snapshot.addresses}
    metadata = {"format": "pt", "bounds": json.dumps(bounds)}
    path = folder / rank_file(ranks.rank, ranks.world_size)
    records = [write_tensors(path, entries, tensors(), metadata)]
    if ranks.is_main:
        records.append(_write_buffers(folder / BUFFERS_FILE, snapshot.buffers))
    return records


def _write_buffers(path: Path, buffers: Mapping[str, torch.Tensor]) -> FileRecord:
    entries = aligned(TensorEntry(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items())
    tensors = (buffers[entry.name] for entry in entries)
    return write_tensors(path, entries, tensors, {"format": "pt"})


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states; training draws nothing from them unless dropout is on."""
    state = {"random_state.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["random_state.device"] = torch.get_device_module(device).get_rng_state(device)
    return state
