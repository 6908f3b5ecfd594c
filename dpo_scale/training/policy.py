"""The policy as training goes on with it: loaded, resumed, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout
from dpo_scale.distributed.engines import PolicyEngine, loading_for
from dpo_scale.distributed.runtime import Runtime
from dpo_scale.inputs import Data
from dpo_scale.model.layout_check import check_layout
from dpo_scale.model.loading import DTYPES, checkpoint_activations, load_model, register_attention, stored_elements
from dpo_scale.recipe import Recipe
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.optimizer import build_optimizer
from dpo_scale.training.resume import resume


def load_policy(
    recipe: Recipe, runtime: Runtime, console: Console, data: Data, trajectory: Mapping[str, Any]
) -> tuple[PolicyEngine, Layout, RunState]:
    """Load the policy, resume it if there is something to resume, and check its layout. Collective. The order matters:

    1. weights are loaded sharded, and the optimizer is built on the shards;
    2. the stored state replaces both, before any forward, whose trace it would invalidate;
    3. the layout is checked on the weights that training goes on with.
    """
    ranks = runtime.ranks
    register_attention(recipe.model, ranks.device)
    torch.manual_seed(recipe.run.seed)
    console.say(f"Loading the policy from {data.model_folder}")
    with (
        console.progress("Loading the policy", stored_elements(data.model_folder), "parameters") as bar,
        loading_for(runtime.accelerator, "policy", bar.advance),
    ):
        model = load_model(data.model_folder, recipe.model)
    if recipe.model.activation_checkpointing:
        checkpoint_activations(model, dropout=recipe.model.dropout)
    with console.progress("Building the engine", None):
        optimizer = build_optimizer(model, recipe.optim)
        policy = PolicyEngine(runtime.accelerator, model, optimizer, recipe)
    console.say(policy.describe())
    state = resume(recipe, ranks, console, policy.engine, trajectory)
    policy.train(False)  # with dropout, two layouts would differ
    with console.progress("Checking the layout", None):
        layout = check_layout(
            policy,
            data.train,
            wanted=recipe.batch.layout,
            dtype=DTYPES[recipe.model.dtype],
            device=ranks.device,
            pad_id=data.pad_id,
        )
    for line in layout.describe("policy"):
        console.say(line)
    policy.train()
    return policy, layout.layout, state
