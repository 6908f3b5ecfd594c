"""The private names of DeepSpeed and torch that this package uses, held against the installed versions, without engine.

A release that renames one fails here, not in the middle of a run.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch.distributed
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler
from deepspeed.runtime.precision_config import get_float16_config
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

import dpo_scale
from dpo_scale.distributed import engine_state, zero_config
from dpo_scale.distributed.engines import PolicyEngine, _clear_cache
from dpo_scale.errors import UserError

ZERO3 = stage3.DeepSpeedZeroOptimizer_Stage3
SOURCES = Path(dpo_scale.__file__).parent / "distributed"


def names_of(owner: type) -> set[str]:
    """Methods and properties of a class, and the attributes that its code sets on itself."""
    code = "".join(inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__.startswith("deepspeed"))
    assigned = re.findall(r"self\.(\w+)\s*(?:=|:)|self\.__dict__\['(\w+)'\] =", code)
    return set(dir(owner)) | {name for pair in assigned for name in pair}


def used_after(pattern: str, file: str) -> set[str]:
    """Attributes that a file of ours reads from a variable."""
    return set(re.findall(rf"\b{pattern}\.(\w+)", (SOURCES / file).read_text(encoding="utf-8")))


def test_the_zero_3_optimizer_has_every_name_that_checkpoints_need() -> None:
    assert set(engine_state._PRIVATE_NAMES) <= names_of(ZERO3)


def test_the_zero_3_optimizer_has_every_name_that_the_code_reads() -> None:
    used = used_after("zero", "engine_state.py")
    assert {"fp32_partitioned_groups_flat", "loss_scaler", "zenflow"} <= used, "the pattern finds nothing"
    # `deepspeed.zero.GatheredParameters` matches the pattern, and the optimizer is torch's.
    assert used - {"GatheredParameters"} <= names_of(ZERO3)


@pytest.mark.parametrize("file", ["engines.py", "engine_state.py"])
def test_the_engine_has_every_name_that_the_code_reads(file: str) -> None:
    used = used_after("engine", file)
    assert "module" in used, "the pattern finds nothing"
    assert used <= names_of(DeepSpeedEngine)


@pytest.mark.parametrize("installed", ["0.18.9", "0.19.7", "0.20.0", "1.0"])
def test_a_deepspeed_that_is_not_verified_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 0.19.7 a gradient that is no number has a finite norm, and is applied."""
    zero = ZERO3.__new__(ZERO3)
    vars(zero).update(dict.fromkeys(engine_state._PRIVATE_NAMES))
    monkeypatch.setattr(engine_state, "version", lambda package: installed)
    with pytest.raises(UserError, match=rf"deepspeed {installed}: .* from 0\.19\.8 on"):
        engine_state._zero3(SimpleNamespace(optimizer=zero))


def test_the_dynamic_loss_scaler_has_every_name_that_checkpoints_keep() -> None:
    used = used_after("scaler", "engine_state.py")
    assert "cur_scale" in used, "the pattern finds nothing"
    assert used <= names_of(DynamicLossScaler)


def test_the_dynamic_loss_scaler_goes_on_where_it_was() -> None:
    def engine_of(scaler: DynamicLossScaler, steps: int) -> tuple[SimpleNamespace, SimpleNamespace]:
        zero = SimpleNamespace(optimizer=SimpleNamespace(state={}), loss_scaler=scaler)
        return SimpleNamespace(global_steps=steps, skipped_steps=steps // 2), zero

    before, after = (DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 4, False) for _ in range(2))
    before.cur_scale, before.cur_iter, before.last_overflow_iter, before.cur_hysteresis = 2.0**9, 31, 17, 3
    assert all(vars(before)[name] != value for name, value in vars(after).items() if name.startswith("cur_"))
    stored, restored = engine_of(before, 8), engine_of(after, 0)
    engine_state._write_counters(*restored, engine_state._read_counters(*stored))
    assert vars(after) == vars(before)
    assert vars(restored[0]) == vars(stored[0])


def test_a_step_meets_every_loss_scale_before_the_scaler_could_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of the engine; DeepSpeed's own end at the lowest scale would be a bare exception."""
    recipe: Any = SimpleNamespace(model=SimpleNamespace(dtype="float16"))
    settings = get_float16_config(zero_config._precision(recipe)).dynamic_loss_scale_args()
    scaler = CreateLossScaler(torch.half, 0, True, settings)
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    policy = PolicyEngine.__new__(PolicyEngine)
    policy._take_scaler(scaler)
    scales = []
    for _ in range(policy.loss_scales_left()):
        scales.append(scaler.cur_scale)
        scaler.update_scale(overflow=True)
    assert scales == [2.0**power for power in range(16, -1, -1)]
    policy._take_scaler(CreateLossScaler(torch.bfloat16, 0, False, None))
    assert policy.loss_scales_left() == 1


def test_a_sharded_parameter_has_the_names_that_release_and_checkpoints_use() -> None:
    code = inspect.getsource(partition_parameters)
    for name in ("ds_tensor", "ds_secondary_tensor", "ds_shape", "ds_numel", "partition_numel"):
        assert re.search(rf"param\.{name}\b", code), name


def test_the_global_references_to_a_module_are_where_release_looks() -> None:
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    assert "FWD_MODULE_STACK.append" in inspect.getsource(parameter_offload)


def test_the_coordinators_cache_can_be_cleared() -> None:
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    _clear_cache(cached)
    with pytest.raises(AssertionError, match="not where it was"):
        _clear_cache(lambda: None)


def test_torch_has_the_rendezvous_store_that_waiting_ranks_look_into() -> None:
    assert "_get_default_store" in dir(torch.distributed.distributed_c10d)


def test_the_op_that_is_left_out_serves_inference_only() -> None:
    """The table of ops is read in one place, and what it switches off there is called in one other."""
    sources = Path(inspect.getfile(deepspeed)).parent.rglob("*.py")
    readers = {path.name for path in sources if "ops.__compatible_ops__" in path.read_text(encoding="utf-8")}
    assert readers == {"torch.py"}
    users = [
        name
        for name, method in inspect.getmembers(TorchBackend, inspect.isfunction)
        if "shm_" in inspect.getsource(method)
    ]
    assert set(users) - {"inference_all_reduce"} == {"__init__"}


def test_torchs_flash_attention_takes_what_it_is_given() -> None:
    arguments = {a.name: a for a in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    positional = [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert list(arguments)[: len(positional)] == positional
    given = {*positional, "scale", "window_size_left", "window_size_right"}
    assert given <= set(arguments)
    assert all(arguments[name].has_default_value() for name in set(arguments) - given)
