"""What a launcher tells a rank in its environment: the DeepSpeed JSON, and numbers that are not the launcher's.

Pure functions of the environment. What Accelerate's configuration file states arrives here too.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from dpo_scale.errors import RecipeError, UserError
from dpo_scale.shipped_files import shipped_file

LAUNCHERS_TWINS = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "the recipe (model.dtype)"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "the recipe (optim.max_grad_norm)"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "the recipe (batch.rank_tokens)"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", "zero_optimization.stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "offload_optimizer_device",
        "zero_optimization.offload_optimizer.device",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "zero_optimization.offload_param.device"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "zero3_save_16bit_model",
        "nobody (the export needs it not)",
    ),
}
"""What `accelerate launch` sets where its configuration or its command line states a field -> the field, its owner."""

OUT_OF_PLACE = {
    "ACCELERATE_USE_CPU": "drops DeepSpeed (DS_ACCELERATOR=cpu trains on CPUs)",
    "ACCELERATE_USE_FSDP": "asks for another sharding than DeepSpeed's",
    "ACCELERATE_USE_MEGATRON_LM": "asks for another sharding than DeepSpeed's",
    "ACCELERATE_FP8_BACKEND": "asks for a precision that the recipe (model.dtype) has not",
    "ACCELERATE_DYNAMO_BACKEND": "asks for a compiled model, which ZeRO-3's hooks do not get through",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "names mixtures of experts, which are found without it",
    **dict.fromkeys(
        (f"PARALLELISM_CONFIG_{kind}_SIZE" for kind in ("SP", "CP", "TP", "DP_SHARD", "DP_REPLICATE")),
        "splits the ranks into groups, and all of them share one model and one step's pairs",
    ),
}
"""What Accelerate reads from the environment and no run here can use -> why."""

STATES_NOTHING = ("no", "auto", "none", "false", "")
SWITCHED_OFF = (*STATES_NOTHING, "0", "off", "n", "f")

OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
"""What every launcher of ranks sets."""


def policy_config_path(environment: Mapping[str, str]) -> Path:
    """The DeepSpeed JSON that the launcher was given, looked up beside the caller and then in the package.

    Raises UserError without a launcher, without DeepSpeed and without such a file.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true" or not all(map(environment.get, OF_A_LAUNCHER)):
        raise UserError(
            "this command runs under Accelerate with DeepSpeed: accelerate launch --config_file "
            "launch/zero3.yaml -m dpo_scale.train RECIPE (zero3_cpu.yaml without a GPU)"
        )
    named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not named:
        raise UserError(
            "the configuration of accelerate launch: deepspeed_config.deepspeed_config_file is missing; name a "
            "DeepSpeed JSON there, such as ds_configs/zero3.json, in place of fields that it states itself"
        )
    return Path(named) if Path(named).exists() else shipped_file(named)


def check_launcher(environment: Mapping[str, str], path: Path) -> None:
    """Refuse what the launcher or the environment brings and does not own; `path` is the DeepSpeed JSON.

    Raises RecipeError naming both places of each.
    """
    if mistakes := [*_doubled(environment, path), *out_of_place(environment)]:
        raise RecipeError("\n".join(mistakes))


def environment_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a launch with an accelerate configuration of DeepSpeed's kind will bring, as far as it is checked."""
    stated = {"mixed_precision": settings.get("mixed_precision")}
    for section in ("deepspeed_config", "parallelism_config"):
        stated |= settings.get(section) or {}
    variables = {variable: field for variable, (field, _) in LAUNCHERS_TWINS.items()}
    variables |= {name: name.removeprefix("ACCELERATE_").lower() for name in OUT_OF_PLACE}
    return {name: str(stated[field]) for name, field in variables.items() if stated.get(field) is not None}


def forget(environment: MutableMapping[str, str]) -> None:
    """Remove what was checked or read, before Accelerate reads it.

    It would take the JSON for a second source of the configuration that it is given, the name alone of a field that
    states nothing ("no", "auto", "none") for a contradiction, and "auto" for a number.
    """
    for name in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS", *LAUNCHERS_TWINS):
        environment.pop(name, None)


def _doubled(environment: Mapping[str, str], path: Path) -> list[str]:
    lines = []
    for variable, (field, owner) in LAUNCHERS_TWINS.items():
        value = environment.get(variable, "no")
        if value.lower() not in STATES_NOTHING:
            place = f"{path} ({owner})" if owner.startswith("zero_") else owner
            lines.append(
                f"{field}: {value} in the configuration or the options of accelerate launch belongs to {place}; "
                "remove it there"
            )
    return lines


def out_of_place(environment: Mapping[str, str]) -> list[str]:
    """What stands in the environment, left there or put there by the launcher, and no run here can use."""
    return [
        f"{variable}={value} {why}; unset it, or remove it from the configuration of accelerate launch"
        for variable, why in OUT_OF_PLACE.items()
        if (value := environment.get(variable, "no")).lower()
        not in (("1", *SWITCHED_OFF) if variable.endswith("_SIZE") else SWITCHED_OFF)
    ]
