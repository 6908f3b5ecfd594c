"""Time and traffic of a step on a cluster that nobody has booked yet. Pure arithmetic on stated assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_scale.data.planning import Costs, Indices, Schedule, StepPlan, Work, plan_step
from dpo_scale.operations.cluster import Assumptions, Cluster
from dpo_scale.operations.zero_memory import Gathered, ZeroSettings


@dataclass(frozen=True, slots=True)
class StepCost:
    """A typical optimizer step on some number of ranks."""

    ranks: int
    micro_batches: float
    pairs_a_rank: float
    rank_tokens: float
    """Tokens of a rank's micro-batch, on average."""
    idle: float
    """Share of the computing time that ranks spend waiting for the one with the most work, or have no pair at all."""
    compute_seconds: float
    communication_seconds: float
    offload_seconds: float
    seconds: float
    traffic: float
    """Bytes that a rank receives and sends for weights and gradients."""
    mfu: float
    """Of the whole step: the model's own work over what the GPUs could do in that time."""


def sample_steps(schedule: Schedule, most: int) -> list[int]:
    """Full steps spread evenly over the run, all of them if there are no more than `most`.

    The smaller last step of an epoch would weigh as much as hundreds of others; it counts where all are such steps.
    """
    epochs, rest = divmod(schedule.num_steps, schedule.steps_per_epoch)
    of_an_epoch = max(1, schedule.num_pairs // schedule.global_pairs)
    full = epochs * of_an_epoch + min(rest, of_an_epoch)
    sampled = np.linspace(0, full - 1, min(full, most)).astype(np.int64)
    return [int(n // of_an_epoch * schedule.steps_per_epoch + n % of_an_epoch) for n in sampled]


def sample_pairs(schedule: Schedule, most: int) -> dict[int, Indices]:
    """The pairs of the sampled steps, copied: of ten million, the order of an epoch takes seconds and 80 MB."""
    return {step: schedule.pairs_of(step).copy() for step in sample_steps(schedule, most)}


def plan_steps(costs: Costs, sampled: Mapping[int, Indices], *, ranks: int, rank_tokens: int) -> list[StepPlan]:
    """The trainer's own plans of some steps."""
    return [
        plan_step(pairs, costs, world_size=ranks, rank_tokens=rank_tokens, step=step) for step, pairs in sampled.items()
    ]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Weights and gradients that ranks exchange."""

    parameters: int
    dtype_bytes: int
    gathered: Gathered
    zero: ZeroSettings

    def bytes_and_seconds(
        self, micro_batches: float, cluster: Cluster, assumptions: Assumptions
    ) -> tuple[float, float]:
        """What one rank receives and sends in a step, and how long that takes.

        With hpZ only the first gather of each weight in a step leaves the node.
        """
        ranks, hpz = cluster.ranks, self.zero.hpz_partition_size
        wide = assumptions.link_between_ranks(cluster)
        near = assumptions.link_efficiency * assumptions.node_link
        weights = micro_batches * self.gathered.fetched * self.dtype_bytes
        first = float(self.gathered.fetched - self.gathered.fetched_again) * self.dtype_bytes if hpz > 1 else weights
        gathers = micro_batches * self.gathered.gathers
        wide_gathers = self.gathered.gathers / 2 if hpz > 1 else gathers
        over_all = (ranks - 1) / ranks * (first + micro_batches * self.parameters * self.dtype_bytes)
        inside = (hpz - 1) / hpz * (weights - first)
        buckets = micro_batches * max(1.0, self.parameters / self.zero.reduce_bucket_size)
        hops = (wide_gathers + buckets) * (ranks - 1) + (gathers - wide_gathers) * (hpz - 1)
        return over_all + inside, over_all / wide + inside / near + hops * assumptions.hop_seconds


def offload_seconds(traffic: Traffic, micro_batches: float, cluster: Cluster, assumptions: Assumptions) -> float:
    """Seconds that offload adds to a step: gradients and weights over the host link, AdamW on the CPU, NVMe both ways.

    Weights that rest on the host travel for every gather, behind computation; they count where they take longer.
    """
    zero, own = traffic.zero, traffic.parameters / cluster.ranks
    seconds = 0.0
    if zero.offload_optimizer != "none":
        seconds += own * (4 * micro_batches + traffic.dtype_bytes) / assumptions.host_link
        seconds += traffic.parameters / cluster.nodes * 28 / assumptions.host_memory_rate
    if zero.offload_optimizer == "nvme":
        seconds += traffic.parameters / cluster.nodes * 2 * 12 / assumptions.nvme
    return seconds


def step_cost(
    plans: Sequence[StepPlan],
    costs: Costs,
    macs: Work,
    traffic: Traffic,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    checkpointing: bool,
) -> StepCost:
    """Average over some planned steps.

    Ranks wait for each other in every micro-batch, so the heaviest one sets its time.

    Args:
        costs: in time, as the trainer balances them.
        macs: float64 [pairs], multiply-accumulates of the forward, which MFU counts.
    """
    per_mac = 6 * (4 / 3 if checkpointing else 1) / (assumptions.peak_flops * assumptions.mfu)
    useful = heaviest = computed = 0.0
    rounds = tokens = empty = pairs = 0
    for plan in plans:
        for round_ in plan.micro_batches:
            work = [float(costs.work[indices].sum()) for indices in round_]
            heaviest += max(work)
            useful += sum(work)
            rounds += 1
            empty += sum(not len(indices) for indices in round_)
            tokens += sum(int(costs.tokens[indices].sum()) for indices in round_)
        pairs += plan.num_pairs
        computed += float(macs[plan.pairs()].sum())
    steps = len(plans)
    micro_batches = rounds / steps
    traffic_bytes, communication = traffic.bytes_and_seconds(micro_batches, cluster, assumptions)
    hidden_weights = 0.0
    if traffic.zero.offload_param != "none":
        per_gather = traffic.gathered.fetched * traffic.dtype_bytes / cluster.ranks
        hidden_weights = micro_batches * per_gather / assumptions.host_link
        if traffic.zero.offload_param == "nvme":
            hidden_weights += micro_batches * per_gather * cluster.gpus_per_node / assumptions.nvme
    compute = heaviest * per_mac / steps
    exposed = max(compute, communication, hidden_weights)
    offload = offload_seconds(traffic, micro_batches, cluster, assumptions)
    seconds = exposed + offload
    ranks = cluster.ranks
    return StepCost(
        ranks=ranks,
        micro_batches=micro_batches,
        pairs_a_rank=pairs / steps / ranks,
        rank_tokens=tokens / max(1, rounds * ranks - empty),
        idle=1 - useful / (ranks * heaviest),
        compute_seconds=compute,
        communication_seconds=communication,
        offload_seconds=offload,
        seconds=seconds,
        traffic=traffic_bytes,
        mfu=6 * computed / steps / (seconds * ranks * assumptions.peak_flops),
    )
