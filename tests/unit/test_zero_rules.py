"""What a DeepSpeed JSON may state, and that the rest is told before DeepSpeed would, or instead of its silence."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from dpo_scale.distributed.zero_rules import FILLED_IN, LEFT_TO_THE_FILE, TRAINED_WITH, mistakes_in


def _mistakes(zero: dict[str, Any] | None = None, **top: Any) -> list[str]:
    return mistakes_in({"zero_optimization": {"stage": 3, **(zero or {})}, **top})


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0, and this trainer runs with 1.0"),
        (
            {"prescale_gradients": True},
            "prescale_gradients is true, for which zero_optimization.reduce_scatter must be",
        ),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types is {"grad_accum_dtype": "bf16"}, and this trainer'),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer is true, and this trainer runs with fals"),
        ({"bfloat16": {"enabled": True}}, "'bfloat16' belongs to the recipe (model.dtype); remove it here"),
        ({"torch_autocast": {"enabled": True}}, "'torch_autocast' belongs to the recipe (model.dtype)"),
        ({"activation_checkpointing": {}}, "'activation_checkpointing' belongs to the recipe (model.activation_checkp"),
    ],
)
def test_what_changes_a_number_of_the_training_is_refused(top: dict[str, Any], said: str) -> None:
    (mistake,) = _mistakes(**top)
    assert mistake.startswith(said)


@pytest.mark.parametrize(
    "key",
    [
        *("communication_data_type", "sequence_parallel_size", "data_parallel_size", "elasticity", "hybrid_engine"),
        *("tensor_parallel", "sparse_gradients", "gradient_allreduce_op", "compile", "amp", "checkpoint", "_comment"),
    ],
)
def test_what_nobody_needs_is_refused(key: str) -> None:
    assert _mistakes(**{key: 2}) == [f"{key!r} has no place here; remove it"]


def test_a_misspelt_key_gets_the_nearest_name() -> None:
    assert mistakes_in({"zero_optimisation": {}, "zero_optimization": {"stage": 3}}) == [
        "'zero_optimisation' has no place here; did you mean 'zero_optimization'?"
    ]
    assert _mistakes(wall_clock_brakdown=True)[0].endswith("did you mean 'wall_clock_breakdown'?")


def test_logging_and_what_this_trainer_does_anyway_may_stand_there() -> None:
    values = {dict: {"enabled": True}, bool: True, str: "info", (int, float): 10}
    harmless = {key: values[kind] for key, (kind, _) in LEFT_TO_THE_FILE.items() if key != "zero_optimization"}
    assert _mistakes({"reduce_scatter": False}, **harmless, **TRAINED_WITH) == []


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"aio": 3}, "aio is 3; it takes an object"),
        ({"flops_profiler": True}, "flops_profiler is true; it takes an object"),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown is "auto"; it takes true or false'),
        ({"steps_per_print": "often"}, 'steps_per_print is "often"; it takes a number'),
    ],
)
def test_a_harmless_key_has_its_type(top: dict[str, Any], said: str) -> None:
    assert _mistakes(**top) == [said]


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"overlap_com": True}, "overlap_com: DeepSpeed has no such key; did you mean 'overlap_comm'?"),
        ({"mics_shard_size": 4}, "mics_shard_size: DeepSpeed has no such key; remove it"),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memry": True}},
            "offload_optimizer.pin_memry: DeepSpeed has no such key; did you mean 'pin_memory'?",
        ),
        (
            {"offload_optimizer": {"device": "disk"}},
            "offload_optimizer.device is \"disk\"; it should be 'none', 'cpu' or 'nvme'",
        ),
        (
            {"offload_param": True},
            "offload_param is true; it takes an object of settings: "
            "device, nvme_path, buffer_count, buffer_size, max_in_cpu, pin_memory",
        ),
        ({"reduce_bucket_size": -5}, "reduce_bucket_size is -5; it should be greater than 0"),
        ({"leaf_module": 3}, "leaf_module configuration must be a mapping"),
        ({"cpu_offload": True}, "cpu_offload is an old name; use offload_optimizer"),
        (
            {"zenflow": {"topk_ratio": 0.1}},
            'zenflow is {"topk_ratio": 0.1}, and this trainer runs without; remove it h',
        ),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio is 0.5, and this trainer ru"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights is true, and this trainer runs with false"),
        ({"overlap_comm": "auto"}, 'overlap_comm is "auto", which nobody fills in; name a value, or remove it'),
        ({"offload_optimizer": {"device": "auto"}}, 'offload_optimizer.device is "auto", which nobody fills in; name'),
        ({"offload_param": {"device": "cpu", "pin_memory": "auto"}}, 'offload_param.pin_memory is "auto", which nobod'),
    ],
)
def test_what_deepspeed_cannot_do_is_told_before_it_is_asked(zero: dict[str, Any], said: str) -> None:
    (mistake,) = _mistakes(zero)
    assert mistake.removeprefix("zero_optimization").lstrip(".: ").startswith(said)


def test_a_section_that_is_no_object_is_told_of() -> None:
    (mistake,) = _mistakes({"offload_optimizer": "cpu"})
    assert mistake.startswith('zero_optimization.offload_optimizer is "cpu"; it takes an object of settings: device')


def test_auto_may_stand_where_somebody_fills_it_in() -> None:
    assert _mistakes(dict.fromkeys(FILLED_IN, "auto")) == []


def test_a_look_at_a_file_is_silent() -> None:
    """DeepSpeed warns of a machine without GPUs as soon as it is imported, and of old settings."""
    code = (
        "import sys; from dpo_scale.distributed.zero_rules import mistakes_in; assert 'deepspeed' not in sys.modules; "
        "assert not mistakes_in({'zero_optimization': {'stage': 3, 'elastic_checkpoint': True}})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout + done.stderr == ""
