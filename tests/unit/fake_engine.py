"""Ranks that are threads, and an engine's state made of plain tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dpo_scale.distributed.parameter_slices import (
    EngineCounters,
    EngineSnapshot,
    LossScale,
    ParameterSlice,
    SliceAddress,
)
from dpo_scale.training import checkpoints
from dpo_scale.training.checkpoints import RunState

TRAJECTORY = {"loss.beta": 0.5, "data.train": [{"path": "pairs.jsonl"}]}
COUNTERS = EngineCounters(optimizer_steps=5, engine_steps=6, skipped_steps=1, loss_scale=LossScale(1024.0, 6, 2, 1))


class ThreadRanks:
    """One rank of a group of threads."""

    def __init__(self, rank: int, machines: Sequence[int], meeting: threading.Barrier, box: list[Any]):
        self.rank, self.world_size = rank, len(machines)
        self.is_main = rank == 0
        self.is_local_main = machines.index(machines[rank]) == rank
        self.device = torch.device("cpu")
        self._meeting, self._box = meeting, box
        self.before_gather: Callable[[], None] = lambda: None

    def barrier(self) -> None:
        self._meeting.wait()

    def gather_objects(self, value: Any) -> list[Any]:
        self.before_gather()
        self._box[self.rank] = value
        self.barrier()
        values = list(self._box)
        self.barrier()
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather_objects(values)).amax(0)

    def on_local_mains(self, work: Callable[[], None]) -> None:
        if self.is_local_main:
            work()
        self.barrier()


def on_ranks(world_size: int, action: Callable[[ThreadRanks], Any], machines: Sequence[int] | None = None) -> list[Any]:
    """What each rank returns or raises; `machines[rank]` names its machine, by default one for all."""
    meeting, box = threading.Barrier(world_size, timeout=60), [None] * world_size

    def run(rank: int) -> Any:
        try:
            return action(ThreadRanks(rank, machines or [0] * world_size, meeting, box))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def make_parameters(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """For each name its master, exp_avg and exp_avg_sq."""
    generator = torch.Generator().manual_seed(seed)
    return {name: [torch.randn(shape, generator=generator) for _ in range(3)] for name, shape in shapes.items()}


def snapshot_of(
    parameters: Mapping[str, list[torch.Tensor]], rank: int, world_size: int, **fields: Any
) -> EngineSnapshot:
    """One rank's share of whole parameters, cut by padding and reshaping as ZeRO-3 does."""
    shapes = {name: tuple(tensors[0].shape) for name, tensors in parameters.items()}

    def shard(tensor: torch.Tensor) -> torch.Tensor:
        size = -(-tensor.numel() // world_size)
        padded = torch.zeros(size * world_size)
        padded[: tensor.numel()] = tensor.flatten()
        left = min(max(tensor.numel() - rank * size, 0), size)
        return padded.view(world_size, size)[rank, :left]

    addresses = []
    for name, shape in shapes.items():
        elements = parameters[name][0].numel()
        size = -(-elements // world_size)
        start, stop = min(rank * size, elements), min((rank + 1) * size, elements)
        addresses.append(SliceAddress(name, shape, start, stop))

    def read_slices() -> Iterator[ParameterSlice]:
        for address in addresses:
            yield ParameterSlice(address, *(shard(tensor) for tensor in parameters[address.name]))

    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": torch.float32,
        "parameters": shapes,
        "buffers": {"flag": torch.tensor([True, False, True]), "scale": torch.tensor(2.5)},
        "addresses": tuple(addresses),
        "read_slices": read_slices,
        "counters": COUNTERS,
    }
    return EngineSnapshot(**(values | fields))


def save(
    folder: Path,
    parameters: Mapping[str, list[torch.Tensor]],
    *,
    step: int = 1,
    world_size: int = 2,
    trajectory: Mapping[str, Any] | None = None,
    keep_last: int = 9,
    keep_every: int | None = None,
    **fields: Any,
) -> list[Any]:
    """Save on thread ranks; what each returns or raises."""
    return on_ranks(
        world_size,
        lambda ranks: checkpoints.save(
            folder,
            snapshot_of(parameters, ranks.rank, world_size, **fields),
            RunState(step=step, pairs=8 * step, tracker_run_ids={"wandb": "x1"}),
            ranks,
            trajectory=trajectory or TRAJECTORY,
            source_model="/models/source",
            keep_last=keep_last,
            keep_every=keep_every,
        ),
    )
