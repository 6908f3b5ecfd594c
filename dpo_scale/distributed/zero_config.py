"""DeepSpeed configurations: the JSON owns stage, buckets and offload; the recipe owns everything else.

Pure functions of dicts: a number stated by the file that does not own it is an error that names both places.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from dpo_scale.console import counted
from dpo_scale.errors import RecipeError
from dpo_scale.recipe import Recipe

Config = dict[str, Any]

OWNED_BY_THE_RECIPE = {
    "train_batch_size": "batch.global_pairs",
    "train_micro_batch_size_per_gpu": "batch.rank_tokens",
    "gradient_accumulation_steps": "batch.rank_tokens",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}
"""Key of a DeepSpeed JSON -> the recipe's key for the same thing."""


def read_policy_config(path: Path) -> Config:
    """A DeepSpeed JSON for the policy, without what it leaves open: a null of zero_optimization.

    Raises RecipeError for a file that is no ZeRO-3 config or states owned keys.
    """
    config = read_config(path)
    mistakes = [
        f"{path}: {key!r} belongs to the recipe ({owner}); remove it here"
        for key, owner in OWNED_BY_THE_RECIPE.items()
        if config.get(key, "auto") != "auto"
    ]
    stated = config.get("zero_optimization")
    zero = {key: value for key, value in stated.items() if value is not None} if isinstance(stated, dict) else {}
    if zero.get("stage") != 3:
        mistakes.append(f"{path}: zero_optimization.stage is {zero.get('stage')}; this trainer runs stage 3")
    size = zero.get("zero_hpz_partition_size", "auto")
    if size != "auto" and not (isinstance(size, int) and size >= 1):
        mistakes.append(
            f"{path}: zero_optimization.zero_hpz_partition_size is {json.dumps(size)}; it takes a number of ranks from "
            '1 on, or "auto"'
        )
    if zero.get("offload_param", {}).get("device") == "nvme":
        # It lacks buffers in its first forward, or shows placeholders to what looks for weights that are not finite.
        mistakes.append(
            f"{path}: zero_optimization.offload_param.device is nvme, where DeepSpeed cannot train reliably; "
            "use cpu, and nvme for offload_optimizer alone"
        )
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    kept = {key: value for key, value in config.items() if key not in OWNED_BY_THE_RECIPE}
    return {**kept, "zero_optimization": zero}


def fit_to_node(config: Config, path: Path, *, own_folder: str, ranks_per_node: int) -> Config:
    """A policy's configuration with what depends on where it runs; `path` is its file, for messages.

    Its folder on NVMe becomes `own_folder` inside the one it names: DeepSpeed empties it when the engine is built, so
    no other run or role may use it. A secondary partition (hpZ) of `auto` becomes the ranks of one node. Raises
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


def own_folder(recipe: Recipe, role: str) -> str:
    """Where a role of a run keeps shards below a node's NVMe folder: the same at each start, and nobody else's."""
    run = hashlib.sha256(str(Path(recipe.run.output_dir).absolute()).encode()).hexdigest()[:12]
    return f"dpo_scale-{run}/{role}"


def policy_config(base: Config, recipe: Recipe) -> Config:
    """The policy's complete DeepSpeed configuration from its JSON and the recipe.

    DeepSpeed's own batch arithmetic is switched off with ones: the planner decides micro-batches, and the loss is
    divided by the true number of pairs.
    """
    config = copy.deepcopy(base)
    config |= _precision(recipe)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Else an offloaded optimizer is swapped for DeepSpeed's, which a C++ compiler builds for minutes at the first
        # start; a start that is killed meanwhile leaves a lock that later ones wait for.
        "zero_force_ds_cpu_optimizer": False,
    }
    config["data_types"] = {"grad_accum_dtype": "fp32"}  # DeepSpeed's default is the model's dtype
    return config


def reference_config(base: Config, recipe: Recipe) -> Config:
    """The reference's complete DeepSpeed configuration: stage 3, no optimizer.

    Its folder on NVMe is this run's and role's alone: DeepSpeed empties it when the engine is built.
    """
    config = copy.deepcopy(base) | _precision(recipe)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    if recipe.reference.nvme_path and recipe.reference.offload == "nvme":
        folder = Path(recipe.reference.nvme_path) / own_folder(recipe, "reference")
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a DeepSpeed JSON file") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: a DeepSpeed configuration is a JSON object")
    return config
