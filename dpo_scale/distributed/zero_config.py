"""DeepSpeed configurations: the JSON owns stage, buckets and offload; the recipe owns everything else.

Pure functions of dicts: a number stated by the file that does not own it is an error that names both places.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_scale.console import counted
from dpo_scale.distributed.nvme_folders import own_folder
from dpo_scale.distributed.zero_rules import OWNED_BY_THE_RECIPE, TRAINED_WITH, Config, mistakes_in
from dpo_scale.errors import RecipeError
from dpo_scale.recipe import Recipe


def read_policy_config(path: Path) -> Config:
    """A DeepSpeed JSON for the policy, without what it leaves open: nulls, and the recipe's keys at "auto".

    Raises RecipeError with all mistakes of a file that is no ZeRO-3 config or states what is not its own.
    """
    config = read_config(path)
    if mistakes := mistakes_in(config):
        raise RecipeError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    zero = {key: value for key, value in config["zero_optimization"].items() if value is not None}
    kept = {key: value for key, value in config.items() if key not in OWNED_BY_THE_RECIPE and value is not None}
    return {**kept, "zero_optimization": zero}


def fit_to_node(config: Config, path: Path, *, own_folder: str, ranks_per_node: int) -> Config:
    """A policy's configuration with what depends on where it runs; `path` is its file, for messages.

    Its folder on NVMe becomes `own_folder` inside the one it names: DeepSpeed writes over what it finds there, so no
    other run or role may use it. A secondary partition (hpZ) of `auto` becomes the ranks of one node. Raises
    RecipeError for a folder that this node lacks and a partition that does not divide a node.
    """
    config = copy.deepcopy(config)
    zero = config["zero_optimization"]
    mistakes = []
    offload = zero.get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        folder = offload.get("nvme_path")
        if folder is None or not Path(folder).is_dir():
            mistakes.append(
                f"{path}: zero_optimization.offload_optimizer.nvme_path: {folder or 'not set'}: no such folder on this "
                "node; name one on its NVMe disk"
            )
        else:
            offload["nvme_path"] = str(Path(folder) / own_folder)
    size = zero.get("zero_hpz_partition_size", 1)
    if size == "auto":
        zero["zero_hpz_partition_size"] = ranks_per_node
    elif ranks_per_node % size:
        mistakes.append(
            f"{path}: zero_optimization.zero_hpz_partition_size is {size}, and the launcher starts "
            f'{counted(ranks_per_node, "rank")} on a node; "auto" takes that number'
        )
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return config


def nvme_folders(*configs: Config) -> list[Path]:
    """Where complete configurations keep shards on NVMe."""
    offloads = [
        value for config in configs for value in config["zero_optimization"].values() if isinstance(value, dict)
    ]
    return [Path(offload["nvme_path"]) for offload in offloads if offload.get("device") == "nvme"]


def policy_config(base: Config, recipe: Recipe) -> Config:
    """The policy's complete DeepSpeed configuration from its JSON and the recipe.

    DeepSpeed's own batch arithmetic is switched off with ones: the planner decides micro-batches, and the loss is
    divided by the true number of pairs.
    """
    numbers = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.max_grad_norm,
    }
    return copy.deepcopy(base | TRAINED_WITH) | _precision(recipe) | numbers


def reference_config(base: Config, recipe: Recipe) -> Config:
    """The reference's complete DeepSpeed configuration: stage 3, no optimizer.

    Its folder on NVMe is this run's and role's alone: DeepSpeed empties it when the engine is built.
    """
    config = copy.deepcopy(base) | _precision(recipe)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    if recipe.reference.nvme_path and recipe.reference.offload == "nvme":
        folder = Path(recipe.reference.nvme_path) / own_folder(recipe.run.output_dir, "reference")
        config["zero_optimization"]["offload_param"]["nvme_path"] = str(folder)
    return config


def pinning_fits(model_bytes: int, machines_share: float, available_bytes: int) -> bool:
    """Whether a node may page-lock its share of an offloaded model: at most half of the memory that is free.

    Pinned memory makes copies to a GPU twice as fast, and the kernel cannot take it back.
    """
    return model_bytes * machines_share <= available_bytes / 2


def reference_file(offload: str) -> str:
    """The shipped DeepSpeed JSON for a reference that is offloaded so (`reference.offload`)."""
    return f"ds_configs/reference_{'gpu' if offload == 'none' else offload}.json"


def _precision(recipe: Recipe) -> Config:
    # auto_cast would round every float input of a forward to half precision. A step that overflows is done again, at
    # once with a lower loss scale: hysteresis would have it overflow once more.
    return {
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.model.dtype == "float16", "auto_cast": False, "hysteresis": 1},
    }


def read_config(path: Path) -> Config:
    """A DeepSpeed JSON as it is, such as one of the reference's. Raises RecipeError for a file that is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise RecipeError(f"{path}: {error} stands in it twice; keep one") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a DeepSpeed JSON file") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: a DeepSpeed configuration is a JSON object")
    return config


class _RepeatedKeyError(Exception):
    """A key that an object has twice. JSON allows it and the last one counts."""


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> Config:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise _RepeatedKeyError(repr(repeated[0]))
    return dict(pairs)
