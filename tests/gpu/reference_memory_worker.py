"""Scores with a reference of 0.4 GiB on one GPU and writes what the device held; started by test_reference_memory.py.

Usage: reference_memory_worker.py FOLDER OFFLOAD, with a model in FOLDER/model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.distributed.engines import ReferenceEngine, loading_for
from dpo_scale.distributed.runtime import start
from dpo_scale.model.loading import load_model, register_attention
from dpo_scale.recipe import Recipe

folder, offload = Path(sys.argv[1]), sys.argv[2]
recipe = Recipe.model_validate(
    {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "reference": {"offload": offload},
        "data": {"train": ["unused"]},
        "batch": {"global_pairs": 1},
        "loss": {"beta": 1.0},
        "run": {"output_dir": str(folder)},
    }
)
runtime = start(recipe)
device = runtime.ranks.device
register_attention(recipe.model, device)
# The shipped file prefetches more than this small model has: all of it would be gathered at once.
plugin = runtime.accelerator.state.get_deepspeed_plugin("reference")
plugin.deepspeed_config["zero_optimization"]["stage3_prefetch_bucket_size"] = 10_000_000
with loading_for(runtime.accelerator, "reference"):
    engine = ReferenceEngine(runtime.accelerator, load_model(folder / "model", recipe.model))
tokens = np.arange(1, 65, dtype=np.int32)
batch = collate([PromptCompletions(tokens, (tokens, tokens))], "shared").to(device)
size = sum(parameter.ds_numel * 2 for parameter in engine.model.parameters())
for _ in range(3):
    engine(batch)
torch._C._cuda_clearCublasWorkspaces()  # 32 MiB on a Hopper, and no part of the model
torch.cuda.reset_peak_memory_stats()
engine(batch)
torch._C._cuda_clearCublasWorkspaces()
measured = {
    "model": size,
    "peak": torch.cuda.max_memory_allocated(),
    "resting": torch.cuda.memory_allocated(),
    "resident_elements": sum(parameter.numel() for parameter in engine.model.parameters()),
}
engine.release()
measured["released"] = torch.cuda.memory_allocated()
(folder / f"{offload}.json").write_text(json.dumps(measured))
torch.distributed.destroy_process_group()
