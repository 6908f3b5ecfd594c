"""The arguments of `dpo-scale plan`, and what it prints."""

from __future__ import annotations

import argparse

from dpo_scale.console import Console
from dpo_scale.errors import UserError
from dpo_scale.operations.cluster import GIB, Assumptions, Cluster
from dpo_scale.operations.plan import make_plan
from dpo_scale.operations.plan_report import render
from dpo_scale.operations.workload import AssumedData
from dpo_scale.recipe import Recipe

DOES_NOT_FIT = 1


def run_plan(recipe: Recipe, options: argparse.Namespace) -> int:
    """Print the plan; 0 if the recipe fits as it is, 1 if it does not."""
    cluster = Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_memory=int(options.gpu_memory * GIB),
        host_memory=int(options.host_memory * GIB),
    )
    given = Assumptions(mfu=options.mfu, peak_flops=options.peak_tflops * 1e12, network=options.network * 1e9)
    console = Console()
    plan = make_plan(recipe, cluster, given, options.ds_config, _assumed_data(options), console)
    for part in render(plan):
        if isinstance(part, str):
            console.say(part)
        else:
            console.show(part)
    return 0 if plan.fit.fits else DOES_NOT_FIT


def _assumed_data(options: argparse.Namespace) -> AssumedData | None:
    means = (options.pairs, options.prompt_tokens, options.completion_tokens)
    if means == (None, None, None):
        return None
    if None in means:
        raise UserError("--pairs, --prompt-tokens and --completion-tokens stand in for data together; give all three")
    return AssumedData(*means)
