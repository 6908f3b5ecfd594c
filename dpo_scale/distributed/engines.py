"""The two ZeRO-3 engines: the policy with its optimizer, the reference without one."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_scale.console import counted
from dpo_scale.data.layouts import MicroBatch
from dpo_scale.distributed.zero_config import pinning_fits
from dpo_scale.errors import RecipeError
from dpo_scale.model.fused import takes_weights_of_children
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import Recipe


@contextmanager
def loading_for(accelerator: Accelerator, role: str, progress: Callable[[int], None] | None = None) -> Iterator[None]:
    """Inside, models are built under zero.Init with the configuration of a role: policy or reference.

    `progress` is told of further elements that were filled. Transformers gathers the parameters of a module, fills them
    and moves on, and shows no progress of its own under ZeRO-3.
    """
    plain = deepspeed.zero.GatheredParameters

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *arguments: Any, **settings: Any) -> None:
            super().__init__(params, *arguments, **settings)
            self._elements = sum(parameter.ds_numel for parameter in params) if isinstance(params, list) else 0

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if progress is not None:
                progress(self._elements)

    accelerator.state.select_deepspeed_plugin(role)
    deepspeed.zero.GatheredParameters = Counted
    try:
        yield
    finally:
        deepspeed.zero.GatheredParameters = plain
        accelerator.state.select_deepspeed_plugin("policy")


def pin_where_it_fits(accelerator: Accelerator, role: str, model_bytes: int) -> bool:
    """Leave `pin_memory` of a role's offloading on only where its shards fit beside everything else.

    To be called before the model is loaded. Returns whether it had to be switched off.
    """
    config = accelerator.state.get_deepspeed_plugin(role).deepspeed_config
    offload = config["zero_optimization"].get("offload_param", {})
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / accelerator.num_processes
    if not offload.get("pin_memory") or pinning_fits(model_bytes, share, psutil.virtual_memory().available):
        return False
    offload["pin_memory"] = False
    return True


def mark_leaves(model: nn.Module) -> None:
    """Let ZeRO-3 gather each decoder layer as one, and each mixture of experts that stands outside of one.

    Its hooks then run once a layer instead of once for each of a dozen modules, which for a small model takes half as
    long as the arithmetic. A mixture of experts must be gathered as one in any case: ranks route tokens differently,
    and a rank that skips an expert would wait for ever for those that do not. So must what reads weights of modules
    that it does not call. Only these are leaves of a model on NVMe: DeepSpeed reads each matrix of a leaf into a buffer
    of its own, and as each must hold the largest shard of the model, there are few.
    """
    reads_into_buffers = any(_swapper_of(parameter) is not None for parameter in model.parameters())
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, GradientCheckpointingLayer) and not reads_into_buffers:
            module.register_forward_pre_hook(_check_hidden_states)
        elif not (isinstance(getattr(module, "experts", None), nn.Module) or takes_weights_of_children(module)):
            pending += module.children()
            continue
        deepspeed.utils.set_z3_leaf_module(module, True)


def check_buffers(model: nn.Module) -> None:
    """Raise RecipeError if a leaf of a model on NVMe holds more matrices than DeepSpeed can read at a time."""
    for name, module in model.named_modules():
        if not deepspeed.utils.z3_leaf_module(module):
            continue
        swappers = [swapper for p in module.parameters() if (swapper := _swapper_of(p)) and swapper.swappable_tensor(p)]
        if swappers and len(swappers) > swappers[0].param_buffer_count:
            raise RecipeError(
                f"reference.offload: nvme: {name} needs {len(swappers)} matrices at once, and "
                f"ds_configs/reference_nvme.json has {swappers[0].param_buffer_count} buffers; use cpu or none"
            )


def _swapper_of(parameter: nn.Parameter) -> Any:
    """What reads a sharded parameter from NVMe; None where it lies elsewhere."""
    return getattr(parameter, "nvme_swapper", None)


def _check_hidden_states(layer: nn.Module, positional: tuple[Any, ...]) -> None:
    """DeepSpeed reduces a leaf's gradients when that of its positional inputs is there: without such an input, at once
    and before they are computed.
    """
    if torch.is_grad_enabled():
        tensors = [value for value in positional if isinstance(value, Tensor)]
        assert any(tensor.requires_grad for tensor in tensors), f"{type(layer).__name__}: hidden states by keyword"


class PolicyEngine:
    """The policy under ZeRO-3: forward, backward of a sum, one step."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: CompletionLogProbs,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
    ) -> None:
        mark_leaves(model)
        self.engine, _ = accelerator.prepare(model, optimizer)
        self._world_size = accelerator.num_processes
        self._take_scaler(self.engine.optimizer.loss_scaler)
        self._check_what_arrived(recipe)

    def _check_what_arrived(self, recipe: Recipe) -> None:
        """Compare the engine with the recipe: a setting that was lost on the way must not train in silence."""
        engine, dtype = self.engine, recipe.model.dtype
        assert engine.zero_optimization_stage() == 3
        assert engine.gradient_clipping() == recipe.optim.max_grad_norm
        assert engine.bfloat16_enabled() == (dtype == "bfloat16")
        assert engine.fp16_enabled() == (dtype == "float16")
        assert engine.gradient_accumulation_steps() == 1
        assert engine.dp_world_size == self._world_size
        for parameter in engine.module.parameters():
            own = -(-parameter.ds_numel // self._world_size)
            assert parameter.ds_tensor.numel() == own, "a parameter is not sharded over all ranks"

    def describe(self) -> str:
        """One line on how the model is sharded."""
        own = sum(parameter.ds_tensor.numel() for parameter in self.engine.module.parameters())
        return (
            f"ZeRO stage {self.engine.zero_optimization_stage()} on {counted(self._world_size, 'rank')}: "
            f"each holds {own:,} of {self.num_parameters:,} parameters"
        )

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, over all ranks."""
        return sum(parameter.ds_numel for parameter in self.engine.module.parameters())

    @property
    def model(self) -> CompletionLogProbs:
        module: CompletionLogProbs = self.engine.module
        return module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; their learning rates may be set between steps."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation.

        A forward without a backward leaves parameters that were fetched ahead in flight, where neither a checkpoint nor
        an export may find them: they are brought home.
        """
        self.engine.train(mode)
        self.engine.empty_partition_cache()

    def __call__(self, batch: MicroBatch, *, plain: bool = False) -> Tensor:
        """Completion log-probs, fp32 [C]."""
        logps_C: Tensor = self.engine(batch, plain=plain)
        return logps_C

    def backward(self, loss_sum: Tensor, *, global_pairs: int, is_last: bool) -> None:
        """Accumulate the gradient of `sum over all ranks and micro-batches / global_pairs`.

        ZeRO averages over ranks, hence the factor; it is the only division besides that by the true pair count.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss_sum * (self._world_size / global_pairs), scale_wrt_gas=False)

    def step(self) -> bool:
        """Clip and apply the accumulated gradient. False if DeepSpeed skipped the step over a non-finite gradient."""
        self.engine.step()
        applied: bool = self.engine.was_step_applied()
        return applied

    def _take_scaler(self, scaler: Any) -> None:
        """Ask this of DeepSpeed's scalers for the loss scale, and let it not end the process at the lowest."""
        self._scaler = scaler
        scaler.raise_error_at_min_scale = False  # who repeats the step says which one it was, and why

    def loss_scales_left(self) -> int:
        """How many loss scales a step may try, down from the present one; 1 in a precision that needs none."""
        return 1 + int(math.log2(self._scaler.cur_scale / self._scaler.min_scale)) if self._scaler.dynamic else 1

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")


class ReferenceEngine:
    """A frozen model under ZeRO-3 inference: no optimizer, no gradients, parameters offloaded between forwards."""

    def __init__(self, accelerator: Accelerator, model: CompletionLogProbs) -> None:
        mark_leaves(model)
        check_buffers(model)
        model.eval().requires_grad_(False)
        # Not accelerator.prepare: a second prepared model breaks save_state and replaces the policy's config.
        config = accelerator.state.get_deepspeed_plugin("reference").deepspeed_config
        self.engine, *_ = deepspeed.initialize(model=model, config=config)
        self.engine.eval()

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, *, plain: bool = False) -> Tensor:
        """Completion log-probs, fp32 [C]."""
        logps_C: Tensor = self.engine(batch, plain=plain)
        return logps_C

    @property
    def model(self) -> CompletionLogProbs:
        module: CompletionLogProbs = self.engine.module
        return module

    def release(self) -> None:
        """Give back everything: shards, gathered parameters, hooks, pinned buffers and what keeps them alive."""
        release_zero3(self.engine)
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator.memory, "empty_host_cache"):  # torch 2.13
                torch.accelerator.memory.empty_host_cache()
            else:
                torch._C._host_emptyCache()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed, as much as half a model, until it is told
            libc.malloc_trim(0)


def release_zero3(engine: Any) -> None:
    """Free a ZeRO-3 engine that has no optimizer.

    `engine.destroy()` leaves two global references to the modules: the stack of modules in forward, and a class-level
    cache of the parameter coordinator. Both are private; `tests/unit/test_private_names.py` guards them.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module = engine.module
    engine.empty_partition_cache()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter in module.parameters():
        for shard in ("ds_tensor", "ds_secondary_tensor"):
            tensor = getattr(parameter, shard, None)
            if tensor is not None:
                tensor.data = torch.empty(0, dtype=tensor.dtype)
    parameter_offload.FWD_MODULE_STACK[:] = [
        entry for entry in parameter_offload.FWD_MODULE_STACK if entry is not module
    ]
    _clear_cache(PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release)


def _clear_cache(function: Callable[..., Any]) -> None:
    """Clear an lru_cache that may be wrapped by decorators that hide it."""
    pending = [function]
    while pending:
        current = pending.pop()
        if hasattr(current, "cache_clear"):
            current.cache_clear()
            return
        cells = getattr(current, "__closure__", None) or ()
        pending += [cell.cell_contents for cell in cells if callable(cell.cell_contents)]
    raise AssertionError("the parameter coordinator's cache is not where it was")
