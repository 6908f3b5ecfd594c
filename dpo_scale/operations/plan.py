"""`dpo-scale plan`: memory, steps, tokens and time of a run, before anything is booked and without a weight.

The model is built from its configuration on the meta device, the data are read in their real token lengths, and the
trainer's own planner packs them. What remains to be assumed is stated in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpo_scale.console import Console
from dpo_scale.data.planning import Indices, check_budget, layout_costs, plan_pass
from dpo_scale.distributed.zero_config import read_config, read_policy_config, reference_file
from dpo_scale.errors import UserError
from dpo_scale.operations.cluster import Assumptions, Cluster
from dpo_scale.operations.fit import Fit, MemoryPlan, Setting
from dpo_scale.operations.scaling import StepCost, Traffic, plan_steps, sample_pairs, step_cost
from dpo_scale.operations.workload import AssumedData, Workload, read_workload
from dpo_scale.operations.zero_memory import ZeroSettings, gathered
from dpo_scale.recipe import Recipe
from dpo_scale.shipped_files import shipped_file

STEPS_LOOKED_AT = 32
PAIRS_LOOKED_AT_A_SCALE = 2**14
"""In each line of the table of scaling, where large steps vary little and take long to lay out: four of 4,096 pairs."""
SCALES = tuple(8 * 2**n for n in range(10))
"""Numbers of GPUs in the table of scaling: 8 to 4,096."""
MOST_NODES = 512
IDLE_WORTH_A_WORD = 0.05


@dataclass(frozen=True, slots=True)
class ReferencePass:
    """Scoring every completion once, before training."""

    micro_batches: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Scale:
    """One line of the table of scaling."""

    cluster: Cluster
    gpu_bytes: int
    """Peak of a GPU."""
    fits: bool
    step: StepCost

    @property
    def limits(self) -> list[str]:
        """Why this number of GPUs does not serve or does not pay; empty if it does."""
        limits = [] if self.fits else ["memory"]
        if self.step.idle > IDLE_WORTH_A_WORD:
            limits.append(f"{self.step.idle:.0%} idle")
        if self.step.communication_seconds > self.step.compute_seconds:
            limits.append("network")
        return limits


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    workload: Workload
    cluster: Cluster
    assumptions: Assumptions
    deepspeed: str
    """The policy's DeepSpeed JSON."""
    memory: MemoryPlan
    fit: Fit
    """Of the recipe as it is."""
    remedy: Fit | None
    """The first change that makes it fit."""
    nodes_needed: int | None
    """Where nothing fits on these nodes: how many hold the recipe as it is."""
    largest_rank_tokens: int
    """That fit, with everything else as it is; 0 if not even one pair does."""
    step: StepCost
    reference: ReferencePass
    scales: tuple[Scale, ...]

    @property
    def train_seconds(self) -> float:
        return self.workload.schedule.num_steps * self.step.seconds

    @property
    def evaluations(self) -> int:
        """Held-out passes of the run."""
        settings, steps = self.workload.recipe.evaluate, self.workload.schedule.num_steps
        if not len(self.workload.evaluate):
            return 0
        every = settings.every_steps
        return int(settings.at_start) + (1 if every is None else -(-steps // every))

    @property
    def evaluate_seconds(self) -> float:
        """Of all held-out passes: forwards only."""
        if not self.evaluations:
            return 0.0
        workload = self.workload
        costs = layout_costs(workload.evaluate, workload.layout, workload.cost)
        rate = self.assumptions.peak_flops * self.assumptions.mfu * self.cluster.ranks
        return self.evaluations * 2 * float(costs.work.sum()) / rate


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    assumptions: Assumptions,
    deepspeed: Path | None,
    assumed: AssumedData | None,
    console: Console,
) -> Plan:
    """Plan a recipe on a cluster.

    Args:
        deepspeed: the policy's DeepSpeed JSON; None means zero3.json.
        assumed: stands in for the recipe's data.

    Raises UserError for whatever cannot be read, or a pair that no micro-batch can hold.
    """
    zero, name = policy_zero(deepspeed, cluster.gpus_per_node)
    workload = read_workload(recipe, assumed, console)
    check_budget(workload.costs, recipe.batch.rank_tokens, workload.rows, "batch.rank_tokens")
    memory = MemoryPlan(workload, reference_zero(recipe))
    setting = Setting(zero, recipe.model.activation_checkpointing, recipe.batch.rank_tokens)
    fit = memory.fit(setting, cluster)
    remedy, nodes_needed = None, None
    if not fit.fits:
        tried = (memory.fit(other, cluster) for other in memory.remedies(setting, cluster))
        remedy = next((other for other in tried if other.fits), None)
        nodes_needed = None if remedy else _nodes_needed(memory, setting, cluster)
    sampled = sample_pairs(workload.schedule, steps_looked_at_a_scale(workload.schedule.global_pairs))
    return Plan(
        workload=workload,
        cluster=cluster,
        assumptions=assumptions,
        deepspeed=name,
        memory=memory,
        fit=fit,
        remedy=remedy,
        nodes_needed=nodes_needed,
        largest_rank_tokens=memory.largest_rank_tokens(setting, cluster),
        step=_step(workload, setting, cluster, assumptions, sample_pairs(workload.schedule, STEPS_LOOKED_AT)),
        reference=_reference_pass(memory, cluster, assumptions),
        scales=tuple(_scale(memory, setting, cluster, assumptions, gpus, sampled) for gpus in SCALES),
    )


def policy_zero(path: Path | None, ranks_per_node: int) -> tuple[ZeroSettings, str]:
    """The policy's DeepSpeed settings, and the file they stand in. Raises UserError for a file of the reference."""
    wanted = path or Path("ds_configs/zero3.json")
    if f"ds_configs/{wanted.name}" in map(reference_file, ("none", "cpu", "nvme")):
        raise UserError(f"{wanted}: its settings are the reference's; the policy's are ds_configs/zero3*.json")
    found = wanted if wanted.exists() else shipped_file(str(wanted))
    return ZeroSettings.of_config(read_policy_config(found), ranks_per_node), str(wanted)


def reference_zero(recipe: Recipe) -> ZeroSettings:
    """The DeepSpeed settings that the recipe's reference runs under."""
    return ZeroSettings.of_config(read_config(shipped_file(reference_file(recipe.reference.offload))))


def _nodes_needed(memory: MemoryPlan, setting: Setting, cluster: Cluster) -> int | None:
    nodes = cluster.nodes
    while nodes < MOST_NODES:
        nodes *= 2
        if memory.fit(setting, replace(cluster, nodes=nodes)).fits:
            return nodes
    return None


def _step(
    workload: Workload, setting: Setting, cluster: Cluster, assumptions: Assumptions, sampled: Mapping[int, Indices]
) -> StepCost:
    plans = plan_steps(workload.costs, sampled, ranks=cluster.ranks, rank_tokens=setting.rank_tokens)
    whole = gathered(workload.meta.units, setting.zero, recompute=setting.checkpointing)
    traffic = Traffic(workload.meta.num_parameters, workload.dtype_bytes, whole, setting.zero)
    return step_cost(
        plans, workload.costs, workload.macs, traffic, cluster, assumptions, checkpointing=setting.checkpointing
    )


def steps_looked_at_a_scale(global_pairs: int) -> int:
    """How many steps a line of the table of scaling is a mean of, at most."""
    return min(STEPS_LOOKED_AT, max(4, PAIRS_LOOKED_AT_A_SCALE // global_pairs))


def _scale(
    memory: MemoryPlan,
    setting: Setting,
    cluster: Cluster,
    assumptions: Assumptions,
    gpus: int,
    sampled: Mapping[int, Indices],
) -> Scale:
    per_node = min(gpus, cluster.gpus_per_node)
    there = replace(cluster, nodes=-(-gpus // per_node), gpus_per_node=per_node)
    fit = memory.fit(setting, there)
    step = _step(memory.workload, setting, there, assumptions, sampled)
    return Scale(there, max(fit.gpu.total, fit.scoring.total), fit.fits, step)


def _reference_pass(memory: MemoryPlan, cluster: Cluster, assumptions: Assumptions) -> ReferencePass:
    """All pairs that the run reads, once, forward only; weights on the host travel for every micro-batch."""
    workload, zero = memory.workload, memory.reference_zero
    pairs = np.concatenate([workload.train[workload.schedule.pairs_reached()], workload.evaluate])
    costs = layout_costs(pairs, workload.layout, workload.cost.in_time())
    tokens = workload.recipe.scoring_rank_tokens
    rounds = plan_pass(costs, world_size=cluster.ranks, rank_tokens=max(tokens, workload.longest_pair)).micro_batches
    heaviest = sum(max(float(costs.work[indices].sum()) for indices in round_) for round_ in rounds)
    compute = 2 * heaviest / (assumptions.peak_flops * assumptions.mfu)
    weights = workload.meta.num_parameters * workload.dtype_bytes
    travel = len(rounds) * weights / assumptions.link_between_ranks(cluster)
    if zero.offload_param == "cpu":
        travel = max(travel, len(rounds) * weights / cluster.ranks / assumptions.host_link)
    elif zero.offload_param == "nvme":
        travel = max(travel, len(rounds) * weights / cluster.nodes / assumptions.nvme)
    return ReferencePass(len(rounds), int(costs.tokens.sum()), max(compute, travel))
