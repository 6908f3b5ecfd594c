"""`dpo-scale plan`: its arguments, and a plan as tables and lines for a person."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from dpo_scale.console import Console, counted
from dpo_scale.errors import UserError
from dpo_scale.operations.cluster import GIB, Assumptions, Cluster
from dpo_scale.operations.fit import SCORING_BYTES_A_PAIR, Fit
from dpo_scale.operations.memory import Moment
from dpo_scale.operations.plan import STEPS_LOOKED_AT, Plan, make_plan
from dpo_scale.operations.scaling import StepCost, sample_steps
from dpo_scale.operations.workload import AssumedData
from dpo_scale.operations.zero_memory import states
from dpo_scale.recipe import Recipe

DOES_NOT_FIT = 1
CHECKPOINT_BYTES = 12
"""A parameter: fp32 master weight and Adam's two moments."""


def run_plan(recipe: Recipe, options: argparse.Namespace) -> int:
    """Print the plan; 0 if the recipe fits as it is, 1 if it does not."""
    cluster = Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_memory=int(options.gpu_memory * GIB),
        host_memory=int(options.host_memory * GIB),
    )
    assumptions = Assumptions(mfu=options.mfu, peak_flops=options.peak_tflops * 1e12, network=options.network * 1e9)
    console = Console()
    plan = make_plan(recipe, cluster, assumptions, options.ds_config, _assumed_data(options), console)
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


def render(plan: Plan) -> Iterator[RenderableType]:
    """Everything that a plan says, verdict last."""
    yield _run_table(plan)
    yield _memory_table(plan)
    yield _scale_table(plan)
    if any(scale.limits for scale in plan.scales):
        yield (
            "limits: memory: does not fit; idle: ranks wait for the one with the most work, a step holds too few "
            "pairs for so many; network: exchanging weights and gradients takes longer than computing"
        )
    yield "Assumed:"
    if plan.workload.assumed is not None:
        yield f"  {plan.workload.assumed}"
    if plan.workload.recipe.batch.layout == "auto":
        yield "  the shared layout, which the start-up check may refuse for a model"
    for line in plan.assumptions.lines():
        yield f"  {line}"
    yield (
        "  reserved: 2.5 GiB and 5% of each GPU for CUDA, NCCL and fragmentation; 4 GiB of host memory a rank and "
        f"{SCORING_BYTES_A_PAIR} bytes more for each pair of the reference pass; pinned buffers take the next power of "
        "two"
    )
    yield verdict(plan)


def verdict(plan: Plan) -> str:
    """Fits, or does not fit as it is, and what would."""
    where = f"{counted(plan.cluster.nodes, 'node')} of {counted(plan.cluster.gpus_per_node, 'GPU')}"
    lines = []
    if plan.fit.fits:
        lines.append(f"Fits on {where}")
    elif plan.remedy is not None:
        files = [change for change in plan.remedy.setting.change if change.endswith(".json")]
        settings = [change for change in plan.remedy.setting.change if not change.endswith(".json")]
        changes = [*settings, *(f"{file} as DeepSpeed file" for file in files)]
        lines.append(
            f"Does not fit on {where} as it is ({_short_by(plan.fit)}); fits with this change: {' and '.join(changes)}"
        )
    else:
        needed = f"; as it is it fits on {plan.nodes_needed} nodes" if plan.nodes_needed else ""
        lines.append(f"Does not fit on {where} ({_short_by(plan.fit)}){needed}")
    if plan.largest_rank_tokens:
        lines.append(
            f"largest batch.rank_tokens that fits the GPUs with all else as it is: {plan.largest_rank_tokens:,}"
        )
    return "\n".join(lines)


def _short_by(fit: Fit) -> str:
    reasons = []
    over = max(fit.gpu.total, fit.scoring.total) - fit.gpu_usable
    if over > 0:
        worst = fit.gpu if fit.gpu.total >= fit.scoring.total else fit.scoring
        role = "" if worst is fit.gpu else ", reference pass"
        reasons.append(f"each GPU lacks {_gib(over)}{role}, at the {worst.name}")
    if not fit.fits_host:
        lacks = sum(fit.host.values()) - fit.host_usable
        reasons.append(f"node 0 lacks {_gib(lacks)} of host memory")
    return "; ".join(reasons)


def _run_table(plan: Plan) -> Table:
    workload, step, schedule = plan.workload, plan.step, plan.workload.schedule
    table = _table("Run")
    count = workload.meta.num_parameters
    table.add_row("parameters", f"{count:,}")
    tokens = int(workload.costs.tokens.sum())
    table.add_row("pairs", f"{len(workload.train):,} in training, {len(workload.evaluate):,} held out")
    table.add_row(
        "tokens an epoch", f"{tokens:,} in the {workload.layout} layout, longest pair {workload.longest_pair:,}"
    )
    epochs = f"{schedule.num_steps / schedule.steps_per_epoch:.3g}"  # the last step of an epoch may be smaller
    epochs += " epoch" if epochs == "1" else " epochs"
    table.add_row("steps", f"{schedule.num_steps:,} of {counted(schedule.global_pairs, 'pair')}, {epochs}")
    looked = len(sample_steps(schedule, STEPS_LOOKED_AT))
    table.add_row(
        "micro-batches a step",
        f"{step.micro_batches:.1f} on each of {counted(step.ranks, 'rank')}, {step.rank_tokens:,.0f} of "
        f"{workload.recipe.batch.rank_tokens:,} tokens filled (means of {counted(looked, 'step')})",
    )
    table.add_row("ranks idle", f"{step.idle:.0%} of their time, waiting for the one with the most work")
    table.add_row("seconds a step", f"{step.seconds:.3g} ({_parts(step)}); MFU {step.mfu:.0%} of the whole")
    reference = plan.reference
    table.add_row(
        "reference pass",
        f"{_time(reference.seconds)}, once: {counted(reference.tokens, 'token')} in "
        f"{counted(reference.micro_batches, 'micro-batch', 'micro-batches')}",
    )
    table.add_row("training", _time(plan.train_seconds))
    if plan.evaluations:
        table.add_row("held-out passes", f"{_time(plan.evaluate_seconds)} in all {plan.evaluations}")
    table.add_row("together", _time(reference.seconds + plan.train_seconds + plan.evaluate_seconds))
    keep = workload.recipe.checkpoint.keep_last
    size = CHECKPOINT_BYTES * count
    kept = f"{keep} {'is' if keep == 1 else 'are'} kept"
    table.add_row("a checkpoint", f"{_gib(size)}; {_gib((keep + 1) * size)} of disk while {kept}")
    table.add_row("exported model", _gib(count * workload.dtype_bytes))
    return table


def _parts(step: StepCost) -> str:
    parts = [f"computing {step.compute_seconds:.3g}", f"communicating {step.communication_seconds:.3g} meanwhile"]
    if step.offload_seconds:
        parts.append(f"offload {step.offload_seconds:.3g}")
    return ", ".join(parts)


def _memory_table(plan: Plan) -> Table:
    workload, fit, setting = plan.workload, plan.fit, plan.fit.setting
    table = _table(f"Memory, {plan.deepspeed}")
    held = states(plan.memory.parameters, setting.zero, plan.cluster.ranks, workload.dtype_bytes, cpu=False)
    for name, size in held.device.items():
        if size:
            table.add_row(f"GPU: {name}", _gib(size))
    for checkpointing in (False, True):
        moments = plan.memory.moments(replace(setting, checkpointing=checkpointing), plan.cluster.ranks)
        kept = max(moment.activations for moment in moments)
        chosen = ", in use" if checkpointing == setting.checkpointing else ""
        how = "with" if checkpointing else "without"
        table.add_row(f"GPU: activations, {how} checkpointing{chosen}", _gib(kept))
    moments = plan.memory.moments(setting, plan.cluster.ranks)
    labels = {
        "gathered": "gathered weights",
        "head": "head and its chunk of logits",
        "gradients": "whole gradients beside the bucket",
        "update": "optimizer step",
    }
    for name, label in labels.items():
        table.add_row(f"GPU: {label}, at most", _gib(max(getattr(moment, name) for moment in moments)))
    table.add_section()
    table.add_row(f"GPU: peak of training, {fit.gpu.name}", _of(fit.gpu, fit))
    table.add_row(f"GPU: peak of the reference pass, {fit.scoring.name}", _of(fit.scoring, fit))
    for name, size in fit.host.items():
        if size:
            table.add_row(f"node 0: {name}", _gib(size))
    table.add_row("node 0: together", f"{_gib(sum(fit.host.values()))} of {_gib(fit.host_usable)}")
    if held.nvme:
        size = sum(held.nvme.values()) * plan.cluster.gpus_per_node
        table.add_row("NVMe of a node", _gib(size))
    return table


def _of(moment: Moment, fit: Fit) -> str:
    return f"{_gib(moment.total)} of {_gib(fit.gpu_usable)}"


def _scale_table(plan: Plan) -> Table:
    title = "Scaling of the same recipe: GiB of a GPU; micro-batches, pairs of a rank, GiB sent and seconds of a step"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("GPUs", "GiB", "micro-b.", "pairs", "sent", "seconds", "hours", "MFU", "limit"):
        table.add_column(name, justify="left" if name == "limit" else "right")
    steps = plan.workload.schedule.num_steps
    for scale in plan.scales:
        step = scale.step
        table.add_row(
            f"{scale.cluster.ranks:,}",
            f"{scale.gpu_bytes / GIB:.1f}",
            f"{step.micro_batches:.1f}",
            f"{step.pairs_a_rank:.3g}",
            f"{step.traffic / GIB:,.0f}",
            f"{step.seconds:.3g}",
            f"{steps * step.seconds / 3600:.3g}",
            f"{step.mfu:.0%}",
            "; ".join(scale.limits),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=SIMPLE_HEAD, pad_edge=False)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
