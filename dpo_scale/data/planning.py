"""Which pairs form step n, and how the ranks pack them. Pure functions of numbers: no torch, no process group.

Membership of a step depends on (seed, epoch, step) alone. How its pairs are spread over ranks and micro-batches is a
second question, answered anew for each world size and token budget, and never changes the gradient.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dpo_scale.data.hashing import splitmix64
from dpo_scale.errors import DataError

Indices = npt.NDArray[np.int64]
Work = npt.NDArray[np.float64]

ATTENTION_SLOWNESS = 1.5
"""How much longer an attention kernel takes for a multiply-accumulate than a matrix product does: 1.4 on two CPU cores,
measured by the CPU seconds of two ranks of which one had a pair of ten times the others' length.
"""

ITEMS_AT_ONCE = 2**20
"""Items whose costs are worked out together: of many millions, the intermediate numbers would need a gigabyte."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Work of a pair as multiples of one: every model token, every scored token, every (query, key) position."""

    per_token: float = 1.0
    per_scored_token: float = 0.0
    per_attended_position: float = 0.0

    def in_time(self) -> CostModel:
        """What ranks wait for, where this counts multiply-accumulates."""
        return replace(self, per_attended_position=ATTENTION_SLOWNESS * self.per_attended_position)


@dataclass(frozen=True, slots=True)
class Costs:
    """What each item, a prompt with its completions, costs in a layout.

    Args:
        tokens: int64 [items], tokens that the model processes.
        work: float64 [items], estimated compute.
        padded_rows: rows an item takes in the padded layout, where a micro-batch costs rows times the longest;
            0 where rows are packed end to end.
    """

    tokens: Indices
    work: Work
    padded_rows: int = 0

    @property
    def tokens_alone(self) -> Indices:
        """Tokens of a micro-batch that holds one item alone, int64 [items]."""
        return self.tokens * max(1, self.padded_rows)

    def of(self, items: Indices) -> Costs:
        """Those of some items."""
        return Costs(self.tokens[items], self.work[items], self.padded_rows)

    def followed_by(self, others: Costs) -> Costs:
        """Those of these items and of others in the same layout."""
        tokens = np.concatenate([self.tokens, others.tokens])
        return Costs(tokens, np.concatenate([self.work, others.work]), self.padded_rows)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The micro-batches of one optimizer step: `micro_batches[m][rank]` holds indices of pairs, maybe none."""

    step: int
    num_pairs: int
    micro_batches: tuple[tuple[Indices, ...], ...]

    def pairs(self) -> Indices:
        """All pairs of the step, int64 [num_pairs], in the order of micro-batches and ranks."""
        return np.concatenate([indices for round_ in self.micro_batches for indices in round_])


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps there are and which pairs each one takes.

    Every pair comes up once an epoch; the last step of an epoch may be partial.
    """

    num_pairs: int
    global_pairs: int
    seed: int
    epochs: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_pairs / self.global_pairs)

    @property
    def num_steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that a step counted from 0 belongs to."""
        return step // self.steps_per_epoch

    def pairs_of(self, step: int) -> Indices:
        """Indices of the pairs of a step, int64 [at most global_pairs]."""
        position = step % self.steps_per_epoch
        order = epoch_order(self.num_pairs, self.seed, self.epoch_of(step))
        return order[position * self.global_pairs : (position + 1) * self.global_pairs]

    def pairs_reached(self) -> Indices:
        """Indices of the pairs that any step takes, int64, ascending: all, unless the run ends in its first epoch."""
        if self.num_steps >= self.steps_per_epoch:
            return np.arange(self.num_pairs)
        return np.sort(epoch_order(self.num_pairs, self.seed, 0)[: self.num_steps * self.global_pairs])


_last_order: tuple[tuple[int, int, int], Indices] | None = None


def epoch_order(num_pairs: int, seed: int, epoch: int) -> Indices:
    """A permutation of the pairs, int64 [num_pairs], that is the same on every machine and library version.

    Pairs are sorted by a SplitMix64 hash of (seed, epoch, index): numpy does not promise that its own generators
    give the same stream in the next release.
    """
    global _last_order
    if _last_order is None or _last_order[0] != (num_pairs, seed, epoch):
        start = splitmix64([seed]) ^ np.uint64(epoch)
        keys = splitmix64(splitmix64(start) + np.arange(num_pairs, dtype=np.uint64))
        _last_order = (num_pairs, seed, epoch), np.argsort(keys, kind="stable")
    return _last_order[1]


def layout_costs(lengths: npt.NDArray[np.int64], layout: str, cost: CostModel) -> Costs:
    """Tokens and estimated work of items in a layout.

    Args:
        lengths: int64 [items, 1 + completions], tokens of the prompt and of each completion (0 where an item has
            fewer); for pairs that is prompt, chosen and rejected.
        layout: shared, packed or padded.
        cost: relative costs, see `CostModel`.
    """
    tokens, work = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.float64)
    for start in range(0, len(lengths), ITEMS_AT_ONCE):
        block = slice(start, start + ITEMS_AT_ONCE)
        tokens[block], work[block] = _costs_of_block(lengths[block], layout, cost)
    return Costs(tokens, work, padded_rows=lengths.shape[1] - 1 if layout == "padded" else 0)


def _costs_of_block(lengths: npt.NDArray[np.int64], layout: str, cost: CostModel) -> tuple[Indices, Work]:
    prompt, completions = lengths[:, :1], lengths[:, 1:]
    sequences = np.where(completions > 0, prompt + completions, 0)
    scored = completions.sum(axis=1)
    if layout == "shared":
        tokens = prompt[:, 0] + scored
        attended = prompt[:, 0] ** 2 / 2 + (prompt * completions + completions**2 / 2).sum(axis=1)
    else:
        tokens = sequences.sum(axis=1)
        attended = (sequences**2 / 2).sum(axis=1)
    work = cost.per_token * tokens + cost.per_scored_token * scored + cost.per_attended_position * attended
    return (sequences.max(axis=1) if layout == "padded" else tokens), work


def check_budget(costs: Costs, rank_tokens: int, rows: Sequence[str], setting: str) -> None:
    """Raise DataError if a single item is over the token budget of a micro-batch."""
    tokens = costs.tokens_alone
    over = np.flatnonzero(tokens > rank_tokens)
    if len(over):
        worst = int(over[np.argmax(tokens[over])])
        raise DataError(
            f"{rows[worst]}: this pair takes {tokens[worst]} tokens and {setting} is {rank_tokens} "
            f"({len(over)} such pairs); raise {setting} to {tokens[worst]}, or lower data.max_length"
        )


def plan_step(pairs: Indices, costs: Costs, *, world_size: int, rank_tokens: int, step: int) -> StepPlan:
    """Spread a step's pairs over ranks and micro-batches.

    The number of micro-batches is the smallest that the packing finds under `rank_tokens`, equal on all ranks.
    Micro-batches that run at the same time get similar work, since ZeRO-3 makes ranks wait for each other at every
    layer, and the ranks' totals are balanced too.
    """
    assert int(costs.tokens_alone[pairs].max()) <= rank_tokens, "a pair is over the budget"
    count = math.ceil(int(costs.tokens_alone[pairs].sum()) / (rank_tokens * world_size))
    while True:
        bins = _pack(pairs, costs, count * world_size, rank_tokens)
        if bins is not None:
            break
        count += 1
    plan = StepPlan(step, len(pairs), arrange(bins, costs, world_size))
    assert np.array_equal(np.sort(plan.pairs()), np.sort(pairs)), "ranks share or lack a pair"
    return plan


def plan_pass(costs: Costs, *, world_size: int, rank_tokens: int) -> StepPlan:
    """Spread all items over ranks and micro-batches for one forward pass over everything, in O(n log n)."""
    rounds = arrange(pack_pass(costs, rank_tokens=rank_tokens), costs, world_size)
    return StepPlan(0, len(costs.tokens), rounds)


def pack_pass(costs: Costs, *, rank_tokens: int) -> list[Indices]:
    """Micro-batches for one forward pass over everything, whatever the number of ranks; int64 [items] each.

    Items are taken from the largest down, so that a budget too large for the memory shows at once and each
    micro-batch holds items of one length.
    """
    order = np.argsort(-costs.work, kind="stable").astype(np.int64)
    bins: list[list[int]] = []
    current = _Bin()
    for index in order:
        item = int(index)
        if current.items and current.tokens_with(item, costs) > rank_tokens:
            bins.append(current.items)
            current = _Bin()
        current.add(item, costs)
    if current.items:
        bins.append(current.items)
    return [np.array(items, np.int64) for items in bins]


class _Bin:
    """A micro-batch in the making."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.tokens = 0
        self.longest = 0
        self.work = 0.0

    def tokens_with(self, item: int, costs: Costs) -> int:
        tokens = int(costs.tokens[item])
        if costs.padded_rows:
            return max(self.longest, tokens) * costs.padded_rows * (len(self.items) + 1)
        return self.tokens + tokens

    def add(self, item: int, costs: Costs) -> None:
        self.tokens += int(costs.tokens[item])
        self.longest = max(self.longest, int(costs.tokens[item]))
        self.work += float(costs.work[item])
        self.items.append(item)


def _pack(pairs: Indices, costs: Costs, num_bins: int, budget: int) -> list[Indices] | None:
    """Pack under the budget into `num_bins` bins of similar work, or None if no packing was found.

    First the heaviest pair into the lightest bin that has room (balanced); if that fails, the longest pair into the
    first bin that has room (tight).
    """
    for balanced in (True, False):
        bins = [_Bin() for _ in range(num_bins)]
        queue = [(0.0, n) for n in range(num_bins)]  # (work, bin): a heap while balancing
        sizes = costs.work if balanced else costs.tokens
        for pair in pairs[np.argsort(-sizes[pairs], kind="stable")]:
            target = _first_with_room(bins, queue, int(pair), costs, budget, balanced)
            if target is None:
                break
            bins[target].add(int(pair), costs)
            if balanced:
                heapq.heappush(queue, (bins[target].work, target))
        else:
            return [np.array(bin_.items, np.int64) for bin_ in bins]
    return None


def _first_with_room(
    bins: list[_Bin],
    queue: list[tuple[float, int]],
    item: int,
    costs: Costs,
    budget: int,
    balanced: bool,
) -> int | None:
    """The lightest bin with room, taken off the heap; or, unbalanced, the first one in order."""
    if not balanced:
        return next((n for _, n in queue if bins[n].tokens_with(item, costs) <= budget), None)
    full: list[tuple[float, int]] = []
    target = None
    while queue and target is None:
        work, n = heapq.heappop(queue)
        if bins[n].tokens_with(item, costs) <= budget:
            target = n
        else:
            full.append((work, n))
    for entry in full:
        heapq.heappush(queue, entry)
    return target


def arrange(bins: list[Indices], costs: Costs, world_size: int) -> tuple[tuple[Indices, ...], ...]:
    """Arrange bins as [micro-batch][rank]: neighbours in work run together, totals of the ranks stay close.

    Empty ones are added where there are too few for every rank.
    """
    bins = bins + [np.zeros(0, np.int64)] * (-len(bins) % world_size)
    work = [float(costs.work[items].sum()) for items in bins]
    order = sorted(range(len(bins)), key=lambda n: -work[n])
    totals = [0.0] * world_size
    rounds: list[tuple[Indices, ...]] = []
    for start in range(0, len(order), world_size):
        together = order[start : start + world_size]
        row: list[Indices] = [np.zeros(0, np.int64)] * world_size
        ranks = sorted(range(world_size), key=lambda rank: totals[rank])
        for n, rank in zip(together, ranks, strict=True):  # the heaviest to the rank that is behind
            row[rank] = bins[n]
            totals[rank] += work[n]
        rounds.append(tuple(row))
    return tuple(rounds)
