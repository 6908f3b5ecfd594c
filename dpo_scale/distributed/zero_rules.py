"""What a policy's DeepSpeed JSON may state: stage 3, buckets, offload and logging, and nothing that changes a number.

Pure: a parsed file in, its mistakes out. DeepSpeed itself says what it cannot do once the policy's engine is built,
after the reference pass; of some keys it says nothing, and trains something else.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Config = dict[str, Any]

OWNED_BY_THE_RECIPE = {
    "train_batch_size": "batch.global_pairs",
    "train_micro_batch_size_per_gpu": "batch.rank_tokens",
    "gradient_accumulation_steps": "batch.rank_tokens",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "model.activation_checkpointing",
}
"""Key of a DeepSpeed JSON -> the recipe's key for the same thing."""

LEFT_TO_THE_FILE: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("zero_optimization", "aio", "comms_logger", "flops_profiler", "timers"), (dict, "an object")),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), (dict, "an object")),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), (bool, "true or false")),
    "steps_per_print": ((int, float), "a number"),
    "log_level": (str, "a string"),
    "prescale_gradients": (bool, "true or false"),
}
"""What may stand in the file as its author likes -> the type of its value, and how that is called."""

TRAINED_WITH = {
    # DeepSpeed's default is the model's dtype.
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_allow_untested_optimizer": True,
    # Else an offloaded optimizer is swapped for DeepSpeed's, which a C++ compiler builds for minutes at the first
    # start; a start that is killed meanwhile leaves a lock that later ones wait for.
    "zero_force_ds_cpu_optimizer": False,
    # Without reduce_scatter, stage 3 divides by the factor and never multiplies by it again.
    "gradient_predivide_factor": 1.0,
}
"""Top-level keys that have one value here, which a file may repeat."""

ZERO_TRAINED_WITH = {
    # Rounded weights are not those that the reference pass saw, and rounded gradients not those of the loss.
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    # These need DeepSpeed's own Adam.
    "offload_optimizer.ratio": 1.0,
    "offload_optimizer.super_offload": False,
    "zenflow": None,
}
"""The same inside of zero_optimization."""

FILLED_IN = (
    *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_gather_16bit_weights_on_model_save", "zero_hpz_partition_size"),
)
"""Keys of zero_optimization whose "auto" becomes a value: by Accelerate, or by `fit_to_node`."""


def mistakes_in(config: Config) -> list[str]:
    """What is wrong with a policy's DeepSpeed configuration, a line each. Nulls state nothing."""
    stated = {key: value for key, value in config.items() if value is not None}
    zero = stated.get("zero_optimization")
    zero = {key: value for key, value in zero.items() if value is not None} if isinstance(zero, dict) else {}
    mistakes = [*_top_level(stated), *_not_as_trained(stated, TRAINED_WITH), *_zero(zero)]
    if stated.get("prescale_gradients") is True and zero.get("reduce_scatter") is not False:
        mistakes.append("prescale_gradients is true, for which zero_optimization.reduce_scatter must be false")
    return mistakes


def _top_level(stated: Config) -> Iterator[str]:
    for key, owner in OWNED_BY_THE_RECIPE.items():
        if stated.get(key, "auto") != "auto":
            yield f"{key!r} belongs to the recipe ({owner}); remove it here"
    for key, value in stated.items():
        if key in LEFT_TO_THE_FILE:
            kind, called = LEFT_TO_THE_FILE[key]
            if key != "zero_optimization" and not isinstance(value, kind):
                yield f"{key} is {json.dumps(value)}; it takes {called}"
            for name in _autos(value, key):
                yield f'{name} is "auto", which nobody fills in; name a value, or remove it'
        elif key not in OWNED_BY_THE_RECIPE and key not in TRAINED_WITH:
            near = difflib.get_close_matches(key, LEFT_TO_THE_FILE, n=1, cutoff=0.85)
            yield f"{key!r} has no place here; {f'did you mean {near[0]!r}?' if near else 'remove it'}"


def _autos(value: Any, within: str) -> Iterator[str]:
    """Dotted names of what a section leaves at "auto" for ever. A stage is told of by itself."""
    for key, part in value.items() if isinstance(value, dict) else ():
        name = f"{within}.{key}"
        if part == "auto" and name.removeprefix("zero_optimization.") not in ("stage", *FILLED_IN):
            yield name
        yield from _autos(part, name)


def _not_as_trained(stated: Config, only: Config, prefix: str = "") -> Iterator[str]:
    for name, value in only.items():
        found: Any = stated
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found not in (None, "auto", value):
            runs = "without" if value is None else f"with {json.dumps(value)}"
            yield f"{prefix}{name} is {json.dumps(found)}, and this trainer runs {runs}; remove it here"


def _zero(zero: Config) -> Iterator[str]:
    if zero.get("stage") != 3:
        yield f"zero_optimization.stage is {json.dumps(zero.get('stage'))}; this trainer runs stage 3"
    size = zero.get("zero_hpz_partition_size", "auto")
    if size != "auto" and not (isinstance(size, int) and size >= 1):
        yield (
            f"zero_optimization.zero_hpz_partition_size is {json.dumps(size)}; it takes a number of ranks from "
            '1 on, or "auto"'
        )
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        # It lacks buffers in its first forward, or shows placeholders to what looks for weights that are not finite.
        yield (
            "zero_optimization.offload_param.device is nvme, where DeepSpeed cannot train reliably; "
            "use cpu, and nvme for offload_optimizer alone"
        )
    yield from _not_as_trained(zero, ZERO_TRAINED_WITH, "zero_optimization.")
    told_of = {"stage", "zero_hpz_partition_size", *ZERO_TRAINED_WITH}
    yield from _refused_by_deepspeed({key: value for key, value in zero.items() if key not in told_of})


def _refused_by_deepspeed(zero: Config) -> Iterator[str]:
    """Names, types and ranges, as DeepSpeed itself judges them."""
    with _silent_logs():  # imported only here, which takes 0.2 s; it has opinions on machines without GPUs
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        old = {
            name: extra["new_param"]
            for name, field in DeepSpeedZeroConfig.model_fields.items()
            if name in zero and isinstance(extra := field.json_schema_extra, dict) and "new_param" in extra
        }
        yield from (f"zero_optimization.{name} is an old name; use {new}" for name, new in old.items())
        try:
            DeepSpeedZeroConfig(stage=3, **{key: value for key, value in zero.items() if key not in old})
        except ValidationError as error:
            yield from (_explain(item, DeepSpeedZeroConfig) for item in error.errors())
        except TypeError as error:  # its checks of leaf_module take it for what it should be
            yield f"zero_optimization: {error}"


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Inside, no logger says what is no error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _explain(item: Any, model: type[BaseModel]) -> str:
    location: tuple[str, ...] = item["loc"]
    name = ".".join(("zero_optimization", *map(str, location)))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _keys(model, location[:-1]), n=1)
        return f"{name}: DeepSpeed has no such key; {f'did you mean {near[0]!r}?' if near else 'remove it'}"
    reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if item["type"] == "model_type":
        reason = f"it takes an object of settings: {', '.join(_keys(model, location))}"
    return f"{name} is {json.dumps(item['input'])}; {reason}" if location else f"{name}: {reason}"


def _keys(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    """The names that a file may use in a section of a configuration."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if not location:
        return [key for key, field in fields.items() if not field.json_schema_extra]
    annotation = fields[location[0]].annotation
    parts = (annotation, *get_args(annotation))
    section = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return _keys(section, location[1:])
