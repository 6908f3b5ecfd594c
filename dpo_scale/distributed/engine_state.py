"""The sharded state of a DeepSpeed ZeRO-3 engine, read and written by parameter.

ZeRO-3 keeps, for each sub-group of parameters, one flat fp32 tensor with this rank's slices of them
end to end, each padded to ceil(elements / ranks); Adam's moments have the same form. The shards
that the forward gathers are copies in the engine's precision (in fp32 the same memory). DeepSpeed's
private names for all this are in this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

from dpo_scale.distributed.parameter_slices import (
    EngineCounters,
    EngineSnapshot,
    LossScale,
    ParameterSlice,
    SliceAddress,
)
from dpo_scale.errors import UserError

PREFIX = "model."
"""The engine's module is a wrapper whose attribute `model` is the Hugging Face model."""

_DEEPSPEED_ADAMS = ("DeepSpeedCPUAdam", "FusedAdam")

_PRIVATE_NAMES = (
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "sub_group_to_group_id",
    "persistent_parameters",
    "loss_scaler",
    "_swappable_optimizer_subgroup",
    "_optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out",
    "_release_swap_buffers",
    "_reassign_or_swap_out_partitioned_parameters",
    "checkpoint_event_prologue",
    "checkpoint_event_epilogue",
)


def snapshot(engine: Any) -> EngineSnapshot:
    """This rank's view of an engine between two steps.

    Raises UserError for an engine whose state would not be complete.
    """
    zero = _zero3(engine)
    parameters = dict(_parameters(engine))
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise UserError(
            f"{len(frozen)} parameters are frozen (first {frozen[0]}); checkpoints hold only those "
            "that are trained: train all, or none"
        )
    module = engine.module.get_submodule(PREFIX.rstrip("."))
    return EngineSnapshot(
        architecture=type(module).__name__,
        dtype=next(iter(parameters.values())).dtype,
        parameters={name: tuple(parameter.ds_shape) for name, parameter in parameters.items()},
        buffers=_persistent_buffers(module),
        addresses=tuple(address for _, group in _addresses(engine, zero) for _, address in group),
        read_slices=lambda: _read_slices(engine, zero),
        counters=_read_counters(engine, zero),
    )


def restore(
    engine: Any,
    read: Callable[[SliceAddress], ParameterSlice],
    buffers: dict[str, torch.Tensor],
    counters: EngineCounters,
) -> None:
    """Put a stored state into an engine between two steps. Collective.

    `read` serves this rank's slices, whatever the number of ranks that stored them. Learning rate
    and weight decay of the parameter groups stay as the engine was built.
    """
    zero = _zero3(engine)
    zero.checkpoint_event_prologue()  # drops gathered copies, which would outlive the new values
    for sub_group, addresses in _addresses(engine, zero):
        swapped = zero._swappable_optimizer_subgroup(sub_group)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(sub_group)
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        state = _adam_state(zero, sub_group)
        state["step"] = _step_count(zero, sub_group, counters.optimizer_steps)
        zero.optimizer.state[flat] = state
        for offset, address in addresses:
            stored, stop = read(address), offset + address.stop - address.start
            flat.data[offset:stop].copy_(stored.master)
            state["exp_avg"][offset:stop].copy_(stored.exp_avg)
            state["exp_avg_sq"][offset:stop].copy_(stored.exp_avg_sq)
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(sub_group)
    zero.checkpoint_event_epilogue()  # drops hpZ's secondary shards, gathers persistent parameters
    present = _persistent_buffers(engine.module.get_submodule(PREFIX.rstrip(".")))
    for name, buffer in present.items():
        buffer.copy_(buffers[name])
    _write_counters(engine, zero, counters)


def gathered_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole, in the engine's precision and the model's order. Collective.

    All ranks must go through all of it. Each tensor is valid until the next is asked for.
    """
    import deepspeed  # not at the top: checkpoints are also read where no engine is

    _zero3(engine)
    for name, parameter in _parameters(engine):
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.data


def non_finite(engine: Any) -> str | None:
    """A parameter of which this rank's shard, in the engine's precision, is not finite; None where all are."""
    for name, parameter in _parameters(engine):
        if not torch.isfinite(parameter.ds_tensor).all():
            return name
    return None


def _zero3(engine: Any) -> Any:
    """The engine's ZeRO-3 optimizer, if its private names mean what this file takes them for."""
    zero = engine.optimizer
    installed = version("deepspeed")
    missing = [name for name in _PRIVATE_NAMES if not hasattr(zero, name)]
    if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3" or missing:
        raise UserError(
            f"deepspeed {installed}, {type(zero).__name__}: not the ZeRO-3 optimizer of 0.19 "
            f"(lacks {missing}); use zero_optimization.stage 3 and deepspeed 0.19"
        )
    release = Version(installed).release
    if release[:2] != (0, 19) or release < (0, 19, 8):  # an older one applies gradients that are not numbers
        raise UserError(f"deepspeed {installed}: this is verified with 0.19 from 0.19.8 on; install that")
    if zero.master_weights_and_grads_dtype != torch.float32:
        raise UserError(
            f"master weights are {zero.master_weights_and_grads_dtype}, and checkpoints need fp32: "
            "remove bf16_master_weights_and_grads and fp16_master_weights_and_grads from the "
            "DeepSpeed JSON"
        )
    if zero.zenflow or (zero.offload_optimizer and zero.partial_offload != 1.0):
        raise UserError(
            "zenflow and offload_optimizer.ratio below 1 keep a second optimizer, which is not in "
            "checkpoints; remove them from the DeepSpeed JSON"
        )
    kind = type(zero.optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW) and kind.__name__ not in _DEEPSPEED_ADAMS:
        raise UserError(f"{kind.__name__}: checkpoints know the state of Adam and AdamW only")
    return zero


def _parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in engine.module.named_parameters():
        assert name.startswith(PREFIX), f"{name}: outside of {PREFIX}"
        yield name.removeprefix(PREFIX), parameter


def _persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    persistent = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _addresses(engine: Any, zero: Any) -> Iterator[tuple[int, list[tuple[int, SliceAddress]]]]:
    """For each sub-group, the offsets in its flat tensors and what of which parameter is there."""
    names = {id(parameter): name for name, parameter in _parameters(engine)}
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for sub_group, parameters in enumerate(zero.fp16_groups):
        addresses, offset = [], 0
        for parameter in parameters:
            shape = tuple(parameter.ds_shape)
            assert parameter.partition_numel() == -(-math.prod(shape) // world_size), shape
            address = SliceAddress.of_rank(names[id(parameter)], shape, rank, world_size)
            addresses.append((offset, address))
            offset += parameter.partition_numel()
        yield sub_group, addresses


def _read_slices(engine: Any, zero: Any) -> Iterator[ParameterSlice]:
    for sub_group, addresses in _addresses(engine, zero):
        swapped = zero._swappable_optimizer_subgroup(sub_group)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(sub_group)
        try:
            flat, state = zero.fp32_partitioned_groups_flat[sub_group], _adam_state(zero, sub_group)
            for offset, address in addresses:
                piece = slice(offset, offset + address.stop - address.start)
                yield ParameterSlice(address, flat.data[piece], state["exp_avg"][piece], state["exp_avg_sq"][piece])
        finally:  # also when a writer fails half-way: the buffers are few
            if swapped:
                zero._release_swap_buffers(sub_group)


def _adam_state(zero: Any, sub_group: int) -> dict[str, Any]:
    """A sub-group's Adam state; what it would be after no update, where there was none yet."""
    flat = zero.fp32_partitioned_groups_flat[sub_group]
    state: dict[str, Any] = zero.optimizer.state.get(flat) or {
        "step": _step_count(zero, sub_group, 0),
        "exp_avg": torch.zeros_like(flat.data),
        "exp_avg_sq": torch.zeros_like(flat.data),
    }
    return state


def _step_count(zero: Any, sub_group: int, steps: int) -> int | torch.Tensor:
    """A number of updates in the form that the optimizer keeps."""
    if type(zero.optimizer).__name__ in _DEEPSPEED_ADAMS:
        return steps
    group = zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]
    on_device = group["fused"] or group["capturable"]
    device = zero.fp32_partitioned_groups_flat[sub_group].device if on_device else "cpu"
    return torch.tensor(float(steps), device=device)


def _read_counters(engine: Any, zero: Any) -> EngineCounters:
    steps = {int(state["step"]) for state in zero.optimizer.state.values()} or {0}
    assert len(steps) == 1, f"sub-groups differ in their number of updates: {steps}"
    scaler, scale = zero.loss_scaler, None
    if scaler.dynamic:
        scale = LossScale(
            scale=float(scaler.cur_scale),
            iteration=scaler.cur_iter,
            last_overflow_iteration=scaler.last_overflow_iter,
            hysteresis=scaler.cur_hysteresis,
        )
    return EngineCounters(
        optimizer_steps=steps.pop(),
        engine_steps=engine.global_steps,
        skipped_steps=engine.skipped_steps,
        loss_scale=scale,
    )


def _write_counters(engine: Any, zero: Any, counters: EngineCounters) -> None:
    engine.global_steps = counters.engine_steps
    engine.skipped_steps = counters.skipped_steps
    scaler, scale = zero.loss_scaler, counters.loss_scale
    if scaler.dynamic and scale is not None:
        scaler.cur_scale = scale.scale
        scaler.cur_iter = scale.iteration
        scaler.last_overflow_iter = scale.last_overflow_iteration
        scaler.cur_hysteresis = scale.hysteresis
