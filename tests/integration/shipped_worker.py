"""Takes two steps under every shipped DeepSpeed configuration that this machine can run, and writes the losses as JSON.

Usage: accelerate launch ... shipped_worker.py RECIPE RESULT [section.field=value ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_worker import LENGTH, VOCABULARY, NextToken, make_source, train
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dpo_scale.distributed import zero_config
from dpo_scale.distributed.ops import leave_out_unused_ops
from dpo_scale.recipe import Recipe, load_recipe

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS = 2


def engine_of(config: dict[str, Any], source: Path, *, trains: bool) -> Any:
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an earlier engine
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained builds sharded models
    model = NextToken(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if trains else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    del keep
    engine.train(trains)
    return engine


def policy_losses(path: Path, recipe: Recipe, source: Path) -> list[float]:
    config = zero_config.policy_config(zero_config.read_policy_config(path), recipe)
    config = zero_config.fit_to_node(
        config, path, own_folder="shipped", ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"])
    )
    engine = engine_of(config, source, trains=True)
    losses = train(engine, 0, STEPS)
    engine.destroy()
    return losses


@torch.no_grad()
def reference_loss(path: Path, recipe: Recipe, source: Path) -> list[float]:
    config = zero_config.reference_config(zero_config.read_reference_config(path), recipe, str(source / "nvme"))
    engine = engine_of(config, source, trains=False)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    losses = [engine(tokens).item() for _ in range(STEPS)]
    engine.destroy()
    return losses


def main() -> None:
    recipe, result = load_recipe(sys.argv[1], sys.argv[3:]), Path(sys.argv[2])
    torch.set_num_threads(1)
    leave_out_unused_ops()
    deepspeed.init_distributed("gloo")
    source = result.parent / "source"
    if dist.get_rank() == 0:
        make_source(source, {})
    dist.barrier()
    losses: dict[str, list[float] | str] = {}
    for path in sorted(DS_CONFIGS.glob("*.json")):
        if "nvme" in path.name and not AsyncIOBuilder().is_compatible(verbose=False):
            losses[path.name] = "no libaio"
        elif path.name.startswith("reference"):
            losses[path.name] = reference_loss(path, recipe, source)
        else:
            losses[path.name] = policy_losses(path, recipe, source)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the program's ranks: threads of libraries that outlive the interpreter may abort it


if __name__ == "__main__":
    main()
