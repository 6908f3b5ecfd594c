"""What ZeRO-3 holds of a model on one rank and on one node: shards, gathered parameters, gradient buckets.

Pure arithmetic on parameter sizes. The rules are those of DeepSpeed 0.19: `runtime/zero/stage3.py` for states and
gradient buckets, `partitioned_param_coordinator.py` for what is gathered ahead and released late. They can be found in
the paper too: Rajbhandari et al. 2020, arXiv 1910.02054, and 2021, arXiv 2104.07857, for offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MASTER_BYTES, MOMENTS_BYTES, GRADIENT_BYTES = 4, 8, 4
"""fp32 a parameter: the weight that is updated, Adam's two moments, the accumulated gradient."""


WORKSPACES_BYTES = 2 * 32 * 2**20
"""Of cuBLAS on a Hopper (older GPUs take 8 MiB each), for the thread of forward passes and that of backward passes."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained tensor. Tied weights are one parameter with one key."""

    key: int
    elements: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of the model in the order of its forward: the embedding, one decoder layer, or norm and head."""

    name: str
    modules: tuple[tuple[Parameter, ...], ...]
    """The parameters of each module that has some of its own."""
    recomputes: bool = False
    """Whether activation checkpointing runs its forward again in the backward pass: true of decoder layers."""


@dataclass(frozen=True)
class ZeroSettings:
    """What a DeepSpeed JSON says about memory, with DeepSpeed's defaults for what it leaves out or calls "auto"."""

    reduce_bucket_size: int = 500_000_000
    reduce_scatter: bool = True
    """Whether a bucket is reduced to slices of a copy; else all of it is reduced where it lies."""
    sub_group_size: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    hpz_partition_size: int = 1
    offload_optimizer: str = "none"
    offload_param: str = "none"
    pin_optimizer: bool = True
    pin_param: bool = True
    """Whether what is offloaded lies in pinned memory."""
    optimizer_buffers: int = 4
    """Each holds one state of a sub-group on its way from and to NVMe: a weight, a gradient or a moment."""
    param_buffers: int = 5
    param_buffer_size: int = 100_000_000
    """Each holds a shard of one parameter that was read from NVMe."""

    @classmethod
    def of_config(cls, config: dict[str, Any], ranks_per_node: int = 1) -> ZeroSettings:
        """The settings of a parsed DeepSpeed JSON; a secondary partition that is `auto` spans a node."""
        zero = config.get("zero_optimization", {})

        optimizer, param = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}

        def size(key: str, default: int) -> int:
            return default if zero.get(key, "auto") == "auto" else int(zero[key])

        return cls(
            reduce_bucket_size=size("reduce_bucket_size", cls.reduce_bucket_size),
            reduce_scatter=zero.get("reduce_scatter", cls.reduce_scatter),
            sub_group_size=size("sub_group_size", cls.sub_group_size),
            prefetch_bucket_size=size("stage3_prefetch_bucket_size", cls.prefetch_bucket_size),
            param_persistence_threshold=size("stage3_param_persistence_threshold", cls.param_persistence_threshold),
            max_live_parameters=size("stage3_max_live_parameters", cls.max_live_parameters),
            max_reuse_distance=size("stage3_max_reuse_distance", cls.max_reuse_distance),
            hpz_partition_size=size("zero_hpz_partition_size", ranks_per_node)
            if "zero_hpz_partition_size" in zero
            else cls.hpz_partition_size,
            offload_optimizer=optimizer.get("device", "none"),
            offload_param=param.get("device", "none"),
            pin_optimizer=optimizer.get("pin_memory", cls.pin_optimizer),
            pin_param=param.get("pin_memory", cls.pin_param),
            optimizer_buffers=optimizer.get("buffer_count", cls.optimizer_buffers),
            param_buffers=param.get("buffer_count", cls.param_buffers),
            param_buffer_size=int(param.get("buffer_size", cls.param_buffer_size)),
        )


def parameters_of(units: Sequence[Unit]) -> list[Parameter]:
    """Every parameter once, in the order of the forward."""
    found = {p.key: p for unit in units for module in unit.modules for p in module}
    return list(found.values())


def shard_elements(parameters: Sequence[Parameter], ranks: int) -> int:
    """Elements of one rank's slices, each padded to a whole number."""
    return sum(-(-p.elements // ranks) for p in parameters)


def sub_groups(parameters: Sequence[Parameter], ranks: int, sub_group_size: int) -> list[int]:
    """Elements of the pieces that the optimizer updates one by one; a piece ends with the tensor that fills it."""
    pieces = [0]
    for parameter in parameters:
        if pieces[-1] >= sub_group_size:
            pieces.append(0)
        pieces[-1] += -(-parameter.elements // ranks)
    return pieces


@dataclass(frozen=True, slots=True)
class States:
    """What rests on a rank between two micro-batches, in bytes, by where it rests."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)


def states(parameters: Sequence[Parameter], zero: ZeroSettings, ranks: int, dtype_bytes: int, *, cpu: bool) -> States:
    """A rank's share of weights, optimizer state and gradients.

    Args:
        dtype_bytes: of the weights in forward and backward. The master weights are another copy in fp32 too.
        cpu: the device is a CPU, whose reduce bucket costs only what is written to it.
    """
    own = shard_elements(parameters, ranks)
    persistent = sum(p.elements for p in parameters if p.elements <= zero.param_persistence_threshold)
    held = States()
    places = {"none": held.device, "cpu": held.host, "nvme": held.nvme}
    optimizer, param = places[zero.offload_optimizer], places[zero.offload_param]
    param["weights"] = own * dtype_bytes
    optimizer["fp32 master weights"] = own * MASTER_BYTES
    optimizer["Adam moments"] = own * MOMENTS_BYTES
    gradients = held.device if zero.offload_optimizer == "none" else held.host
    in_pinned = zero.offload_optimizer != "none" and zero.pin_optimizer
    gradients["accumulated gradients"] = (pinned if in_pinned else int)(own * GRADIENT_BYTES)
    if zero.offload_param == "cpu" and zero.pin_param:
        held.host["weights"] = pinned(own * dtype_bytes)
    elif zero.offload_param == "nvme":
        held.host["weights' NVMe buffers"] = zero.param_buffers * zero.param_buffer_size * dtype_bytes
    if zero.offload_optimizer == "cpu":
        pieces = sub_groups(parameters, ranks, zero.sub_group_size)
        held.host["gradients for the optimizer"] = sum(
            (pinned if zero.pin_optimizer else int)(piece * GRADIENT_BYTES) for piece in pieces
        )
    elif zero.offload_optimizer == "nvme":
        piece = max(sub_groups(parameters, ranks, zero.sub_group_size))
        held.nvme["gradients for the optimizer"] = own * GRADIENT_BYTES
        held.host["optimizer's NVMe buffers"] = zero.optimizer_buffers * piece * GRADIENT_BYTES
    held.device["small weights, kept whole"] = persistent * dtype_bytes
    if zero.hpz_partition_size > 1:
        held.device["second copy within the node"] = shard_elements(parameters, zero.hpz_partition_size) * dtype_bytes
    if not cpu:
        held.device["cuBLAS workspaces"] = WORKSPACES_BYTES
    bucket = zero.reduce_bucket_size
    held.device["reduce bucket"] = (min(bucket, sum(p.elements for p in parameters)) if cpu else bucket) * dtype_bytes
    return held


@dataclass(frozen=True, slots=True)
class Gathered:
    """Whole parameters on a rank while a unit runs, in elements, at their most."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    fetched: int
    """Elements that one micro-batch gathers, forward and backward together."""
    fetched_again: int
    """Of those, the elements that were gathered in the same micro-batch before."""
    gathers: int
    """Collectives that this takes."""


@dataclass(slots=True)
class _Gather:
    """A collective that brings several parameters."""

    elements: int
    unused: int
    """Parameters that no module has waited for."""
    copied: bool = False
    """Whether the parameters have left the buffer."""


def gathered(units: Sequence[Unit], zero: ZeroSettings, *, recompute: bool) -> Gathered:
    """Follow DeepSpeed's fetches, prefetches and releases through a micro-batch whose trace is complete.

    What is gathered together arrives in one buffer, which stays until the last of its parameters is used, beside the
    parameters that are copied out of it. A module's parameters are released behind it unless they come up again within
    `max_reuse_distance` elements, or the prefetch has already passed over their next use.

    Args:
        recompute: activations are checkpointed.
    """
    threshold = zero.param_persistence_threshold
    steps = [
        (phase, unit, [p for p in module if p.elements > threshold])
        for phase, unit, module in _module_order(units, recompute)
    ]
    uses = [(step, p) for step, (_, _, module) in enumerate(steps) for p in module]
    traversed = [0]
    for _, _, module in steps:
        traversed.append(traversed[-1] + sum(p.elements for p in module))
    later_uses: dict[int, list[int]] = {}
    for step, p in uses:
        later_uses.setdefault(p.key, []).append(step)

    peaks = {"forward": [0] * len(units), "backward": [0] * len(units)}
    available: dict[int, int] = {}
    in_flight: dict[int, _Gather] = {}
    seen: set[int] = set()
    planned_until: dict[int, int] = {}
    position = live = buffers = fetched = again = gathers = 0
    for step, (phase, unit, module) in enumerate(steps):
        while position < len(uses) and uses[position][0] <= step:
            position += 1
        now = [p for p in module if p.key not in available]
        room = zero.max_live_parameters - sum(available.values()) - sum(p.elements for p in now)
        ahead: list[Parameter] = []
        while position < len(uses) and sum(p.elements for p in ahead) < min(room, zero.prefetch_bucket_size):
            at, p = uses[position]
            position += 1
            planned_until[p.key] = at
            if p.key not in available and p not in now and p not in ahead:
                ahead.append(p)
        for together in filter(None, (now, ahead)):
            gather = _Gather(sum(p.elements for p in together), len(together))
            buffers, fetched, gathers = buffers + gather.elements, fetched + gather.elements, gathers + 1
            for p in together:
                available[p.key], in_flight[p.key] = p.elements, gather
                again += p.elements * (p.key in seen)
                seen.add(p.key)
        done = 0
        for p in module:
            if (waited := in_flight.pop(p.key, None)) is not None:
                live += 0 if waited.copied else waited.elements
                waited.copied = True
                waited.unused -= 1
                done += 0 if waited.unused else waited.elements
        peaks[phase][unit] = max(peaks[phase][unit], live + buffers)
        buffers -= done
        for p in module:
            following = next((at for at in later_uses[p.key] if at > step), None)
            near = following is not None and traversed[following] - traversed[step + 1] < zero.max_reuse_distance
            if not near and planned_until.get(p.key, -1) <= step and p.key in available:
                live -= available.pop(p.key)
    return Gathered(tuple(peaks["forward"]), tuple(peaks["backward"]), fetched, again, gathers)


def _module_order(units: Sequence[Unit], recompute: bool) -> Iterator[tuple[str, int, tuple[Parameter, ...]]]:
    """Modules in the order in which a micro-batch runs them: (phase, unit, parameters)."""
    for number, unit in enumerate(units):
        yield from (("forward", number, module) for module in unit.modules)
    for number, unit in reversed(list(enumerate(units))):
        if recompute and unit.recomputes:
            yield from (("backward", number, module) for module in unit.modules)
        yield from (("backward", number, module) for module in reversed(unit.modules))


def gradient_bytes(units: Sequence[Unit], zero: ZeroSettings, ranks: int, dtype_bytes: int) -> tuple[int, ...]:
    """Most bytes of whole gradients on a rank beside the reduce bucket, while each unit's backward runs.

    A gradient that is larger than the bucket waits on its own for the next one to arrive.
    """
    uses_left: dict[int, int] = {}
    for unit in units:
        for module in unit.modules:
            for p in module:
                uses_left[p.key] = uses_left.get(p.key, 0) + 1
    peaks = [0] * len(units)
    tied = waiting = 0  # elements of gradients that other uses will still add to; that wait beside the bucket
    bucket: list[int] = []
    for number, unit in reversed(list(enumerate(units))):
        for module in reversed(unit.modules):
            # a module's gradients are all there before the first of them is reduced
            arriving = sum(p.elements for p in module)
            peaks[number] = max(peaks[number], (tied + waiting + arriving) * dtype_bytes)
            for p in module:
                arriving -= p.elements
                uses_left[p.key] -= 1
                if uses_left[p.key]:
                    tied += p.elements
                    peaks[number] = max(peaks[number], (tied + waiting) * dtype_bytes)
                    continue
                if bucket and sum(bucket) + p.elements > zero.reduce_bucket_size:
                    copied = _reduction_bytes(bucket, zero, ranks, dtype_bytes)
                    peaks[number] = max(peaks[number], (tied + waiting + arriving + p.elements) * dtype_bytes + copied)
                    bucket, waiting = [], 0
                if sum(bucket) + p.elements > zero.reduce_bucket_size:
                    waiting += p.elements
                bucket.append(p.elements)
                peaks[number] = max(peaks[number], (tied + waiting) * dtype_bytes)
    last = _reduction_bytes(bucket, zero, ranks, dtype_bytes)
    peaks[0] = max(peaks[0], (tied + waiting) * dtype_bytes + last)
    return tuple(peaks)


def _reduction_bytes(bucket: Sequence[int], zero: ZeroSettings, ranks: int, dtype_bytes: int) -> int:
    """What reducing gradients of these elements takes: a copy of them, and this rank's slices.

    A single one that all ranks have an equal part of is not copied. The slices are fp32 ones that the sums are turned
    into; where these are fp32 themselves, on CPUs, it is as much that arrives from another rank.
    """
    size = sum(bucket)
    is_copied = len(bucket) > 1 or size % ranks > 0
    if not zero.reduce_scatter and size <= zero.reduce_bucket_size:
        return 0
    return size * is_copied * dtype_bytes + -(-size // ranks) * GRADIENT_BYTES


def optimizer_step_bytes(parameters: Sequence[Parameter], zero: ZeroSettings, ranks: int) -> int:
    """What an update by fused AdamW needs on the device beside the states: a sub-group's gradients end to end."""
    if zero.offload_optimizer != "none":
        return 0
    return max(sub_groups(parameters, ranks, zero.sub_group_size)) * GRADIENT_BYTES


def pinned(size: int) -> int:
    """Bytes that torch's allocator of pinned memory takes for a buffer: the next power of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
