"""Takes three steps under every shipped DeepSpeed configuration, and writes the losses as JSON.

Sizes are made small where they would hide what happens with large models: two sub-groups and more of the optimizer, and
most weights of the reference, lie in files where they belong on NVMe.

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
from checkpoint_worker import LENGTH, VOCABULARY, NextToken, train
from plain_async_io import stand_in_where_libaio_is_absent
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dpo_scale.distributed import exchange, zero_config
from dpo_scale.distributed.engines import check_buffers, mark_leaves
from dpo_scale.distributed.ops import leave_out_unused_ops
from dpo_scale.model.fused import fuse
from dpo_scale.recipe import Recipe, load_recipe

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS = 3
SUB_GROUP = 1_000_000
LARGEST_SHARD = 400_000


def make_source(folder: Path) -> None:
    """A random model folder; of each matrix of a layer, each of two ranks holds more than 1 MiB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)


def engine_of(config: dict[str, Any], source: Path, *, trains: bool) -> Any:
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an earlier engine
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained builds sharded models
    model = NextToken(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    fuse(model)
    mark_leaves(model)
    check_buffers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if trains else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    del keep
    engine.train(trains)
    return engine


def policy_losses(path: Path, recipe: Recipe, source: Path) -> list[float]:
    config = zero_config.policy_config(zero_config.read_policy_config(path), recipe)
    if "nvme" in path.name:
        zero = config["zero_optimization"]
        zero["sub_group_size"] = SUB_GROUP
        zero["offload_optimizer"]["nvme_path"] = str(source)
    config = zero_config.fit_to_node(
        config, path, own_folder=path.stem, ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"])
    )
    engine = engine_of(config, source, trains=True)
    losses = train(engine, 0, STEPS)
    engine.destroy()
    return losses


@torch.no_grad()
def reference_losses(path: Path, recipe: Recipe, source: Path) -> list[float]:
    config = zero_config.reference_config(zero_config.read_config(path), recipe)
    if "nvme" in path.name:
        config["zero_optimization"]["offload_param"] |= {
            "nvme_path": str(source / path.stem),
            "buffer_size": LARGEST_SHARD,
        }
    engine = engine_of(config, source, trains=False)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    losses = [engine(tokens).item() for _ in range(STEPS)]
    engine.destroy()
    return losses


def main() -> None:
    recipe, result = load_recipe(sys.argv[1], sys.argv[3:]), Path(sys.argv[2])
    torch.set_num_threads(1)
    leave_out_unused_ops()
    stand_in_where_libaio_is_absent()
    deepspeed.init_distributed("gloo")
    exchange.use_for_zero()
    source = result.parent / "source"
    if dist.get_rank() == 0:
        make_source(source)
    dist.barrier()
    found = {}
    for path in sorted(DS_CONFIGS.glob("*.json")):
        losses_of = reference_losses if path.name.startswith("reference") else policy_losses
        losses = losses_of(path, recipe, source)
        files = list((source / path.stem).rglob(f"rank{dist.get_rank()}/*.swp"))
        found[path.name] = losses, len(files)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the program's ranks: threads of libraries that outlive the interpreter may abort it


if __name__ == "__main__":
    main()
