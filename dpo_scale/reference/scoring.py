"""Frozen model -> log-probs that can be trusted: find what is missing, score it in lockstep, store it.

The engine is built only if a row is missing. What a row is worth does not depend on who scored it, so ranks, jobs
and machines without a shared disk can fill the same store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.data.planning import CostModel, Costs, arrange, check_budget, layout_costs, pack_pass
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.reference.cache import NonFiniteLogProbsError, ReferenceStore
from dpo_scale.reference.key_index import first_positions
from dpo_scale.reference.parts import Keys, LogProbs
from dpo_scale.reference.row_keys import pair_row_keys, row_keys

SECONDS_BETWEEN_COMMITS = 30.0
"""Work that a kill costs; each commit leaves one part a rank, until it merges them."""
PARTS_BEFORE_A_MERGE = 16
"""Of one rank. Every rank of later launches opens all parts, so a pass must not end with thousands."""
ROWS_IN_AN_EXCHANGE = 4096
MOST_COMPLETIONS_OF_A_PROMPT = 16
"""In one stretch of the shared layout: beyond it little is saved, and ranks are harder to balance."""

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Scorer(Protocol):
    """An engine in inference mode: completion log-probs, fp32 [C], of a micro-batch."""

    def __call__(self, batch: MicroBatch) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """The rows that a set of pairs needs: chosen and rejected of each pair."""

    pairs: TokenPairs
    keys: Keys
    """uint8 [pairs, 2, 16]."""

    @classmethod
    def of_pairs(cls, pairs: TokenPairs) -> ReferenceRows:
        return cls(pairs, pair_row_keys(pairs))

    def of(self, indices: Indices) -> Keys:
        """Keys of some pairs, uint8 [2 * indices, 16], chosen and rejected in turn."""
        return np.ascontiguousarray(self.keys[indices].reshape(-1, self.keys.shape[-1]))


@dataclass(frozen=True, slots=True)
class Presence:
    """Where rows are, bool [rows]: the same answer on every rank, with or without a shared disk."""

    missing: Flags
    """No rank has it."""
    lacking: Flags
    """Some rank does not have it."""

    @classmethod
    def agreed(cls, here: Flags, ranks: Ranks) -> Presence:
        """Put together what each rank has. Collective."""
        both = torch.from_numpy(np.stack([here, ~here]).astype(np.uint8))
        some_has, some_lacks = ranks.max(both.to(ranks.device)).cpu().numpy().astype(np.bool_)
        return cls(~some_has, some_lacks)


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows that share a prompt, together. A row is numbered 2 * pair + (0 chosen, 1 rejected)."""

    needed: ReferenceRows
    rows: Indices
    """int64 [rows], the groups end to end."""
    starts: Indices
    """int64 [groups + 1], where each group starts in `rows`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _rows(self, group: int) -> Indices:
        return self.rows[self.starts[group] : self.starts[group + 1]]

    def keys(self, group: int) -> Keys:
        """uint8 [completions, 16]."""
        rows = self._rows(group)
        return self.needed.keys[rows // 2, rows % 2]

    def completions(self, group: int) -> PromptCompletions:
        """The tokens of a group."""
        pairs = [(self.needed.pairs[row // 2], row % 2) for row in self._rows(group).tolist()]
        return PromptCompletions(pairs[0][0].prompt, tuple((p.chosen, p.rejected)[side] for p, side in pairs))

    def names(self, group: int) -> list[str]:
        """Where the rows of a group came from: `file.jsonl:17 chosen`."""
        rows = self._rows(group).tolist()
        return [f"{self.needed.pairs[row // 2].row} {('chosen', 'rejected')[row % 2]}" for row in rows]

    def lengths(self) -> Indices:
        """int64 [groups, 1 + most completions]: tokens of the prompt and of each completion, 0 where there is none."""
        tokens, counts = self.needed.pairs.lengths, np.diff(self.starts)
        lengths = np.zeros((len(self), 1 + int(counts.max(initial=0))), np.int64)
        lengths[:, 0] = tokens[self.rows[self.starts[:-1]] // 2, 0]
        group = np.repeat(np.arange(len(self)), counts)
        lengths[group, 1 + np.arange(len(self.rows)) - self.starts[group]] = tokens[self.rows // 2, 1 + self.rows % 2]
        return lengths


def row_numbers(pairs: Indices) -> Indices:
    """Numbers of the rows of pairs, int64 [2 * pairs], chosen and rejected in turn."""
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()


def join(first: Groups, second: Groups) -> Groups:
    """The groups of both; those of the second come after those of the first."""
    starts = np.concatenate([first.starts[:-1], first.starts[-1] + second.starts])
    return Groups(first.needed, np.concatenate([first.rows, second.rows]), starts)


def group_rows(needed: ReferenceRows, rows: Indices, *, layout: Layout, rank_tokens: int) -> Groups:
    """Put together what can share a prompt, up to a number of completions and a budget of tokens."""
    pairs, pair_of_row = np.unique(rows // 2, return_inverse=True)
    prompts = row_keys((needed.pairs[p].prompt for p in pairs), needed.pairs.lengths[pairs, 0].tolist())
    prompt_of_row = first_positions(prompts).astype(np.int64)[pair_of_row]
    order = np.argsort(prompt_of_row, kind="stable")
    rows, prompt_of_row = rows[order], prompt_of_row[order]
    most = MOST_COMPLETIONS_OF_A_PROMPT if layout == "shared" else 1  # the other layouts repeat the prompt
    starts = _cut(prompt_of_row, needed.pairs.lengths[rows // 2], rows % 2, most, rank_tokens)
    return Groups(needed, rows, starts)


def _cut(prompts: Indices, lengths: Indices, sides: Indices, most: int, rank_tokens: int) -> Indices:
    """Where groups start: at another prompt, and where a group would grow beyond a number of rows or tokens."""
    completions = lengths[np.arange(len(sides)), 1 + sides].tolist()
    starts: list[int] = []
    before, tokens = -1, 0
    for position, (prompt, completion) in enumerate(zip(prompts.tolist(), completions, strict=True)):
        tokens += completion
        if prompt != before or position - starts[-1] == most or tokens > rank_tokens:
            starts.append(position)
            tokens = int(lengths[position, 0]) + completion
        before = prompt
    return np.array([*starts, len(sides)], np.int64)


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """Which rows are scored together, each once."""

    groups: Groups
    costs: Costs
    """Of each group."""
    micro_batches: list[Indices]
    """Groups of each; a group that is in none is not scored."""

    @property
    def num_rows(self) -> int:
        """Rows that are scored."""
        sizes = np.diff(self.groups.starts)
        return sum(int(sizes[batch].sum()) for batch in self.micro_batches)


def plan_scoring(
    needed: ReferenceRows, indices: Indices, missing: Flags, *, layout: Layout, rank_tokens: int, cost: CostModel
) -> ScoringPlan:
    """Take each missing row once, in micro-batches that do not depend on where an earlier pass was interrupted.

    They are laid out over all rows, present or not, and scored as they are where every row is missing: to the last bit,
    a log-prob depends on the shapes of the products that it came from. What is missing elsewhere is laid out anew.

    Args:
        indices: int64 [n], pairs.
        missing: bool [2 * n], their rows that have to be scored, chosen and rejected in turn.

    Raises DataError if one row alone is over the token budget.
    """
    rows = row_numbers(indices)
    first = first_positions(needed.keys[rows // 2, rows % 2])
    is_wanted = np.zeros(2 * len(needed.pairs), np.bool_)
    is_wanted[rows[first[missing]]] = True

    groups = group_rows(needed, rows[np.unique(first)], layout=layout, rank_tokens=rank_tokens)
    costs = layout_costs(groups.lengths(), layout, cost.in_time())
    is_whole = np.logical_and.reduceat(is_wanted[groups.rows], groups.starts[:-1])
    micro_batches = [batch for batch in pack_pass(costs, rank_tokens=rank_tokens) if is_whole[batch].all()]

    is_planned = np.zeros(len(groups), np.bool_)
    for batch in micro_batches:
        is_planned[batch] = True
    is_left = is_wanted[groups.rows] & ~np.repeat(is_planned, np.diff(groups.starts))
    if is_left.any():
        left = groups.rows[is_left]
        others = group_rows(needed, left, layout=layout, rank_tokens=rank_tokens)
        their_costs = layout_costs(others.lengths(), layout, cost.in_time())
        micro_batches += [len(groups) + batch for batch in pack_pass(their_costs, rank_tokens=rank_tokens)]
        groups, costs = join(groups, others), costs.followed_by(their_costs)
    plan = ScoringPlan(groups, costs, micro_batches)
    _check_rows(plan, rank_tokens)
    return plan


def _check_rows(plan: ScoringPlan, rank_tokens: int) -> None:
    scored = np.concatenate([np.zeros(0, np.int64), *plan.micro_batches])
    costs = plan.costs.of(scored)
    if (costs.tokens_alone > rank_tokens).any():  # a million names take fifteen seconds
        names = [plan.groups.names(group)[0] for group in scored.tolist()]
        check_budget(costs, rank_tokens, names, "reference.rank_tokens")


class FreshRows:
    """Rows that ranks have scored: readable at once, written every half minute, on every disk in the end.

    A rank merges its parts only until the next `settle`: no other rank of the launch looks for new parts before.
    """

    def __init__(self, store: ReferenceStore, ranks: Ranks) -> None:
        self._store, self._ranks = store, ranks
        self._scored_here: list[Keys] = []
        self._unseen: list[Path] = []
        self._written_at = self._settled_at = time.monotonic()

    def add(self, keys: Keys, rows: Sequence[LogProbs]) -> None:
        """Take rows that this rank scored."""
        self._store.hold(keys, rows)
        self._scored_here.append(keys)
        if time.monotonic() - self._written_at > SECONDS_BETWEEN_COMMITS:
            self.write()

    def write(self) -> None:
        """Commit what this rank scored, as one part."""
        if self._scored_here:
            self._unseen += self._store.write_held(np.concatenate(self._scored_here))
        self._scored_here, self._written_at = [], time.monotonic()
        if len(self._unseen) >= PARTS_BEFORE_A_MERGE:
            self._unseen = self._store.merge(self._unseen)[-1:]  # the others are full

    def share(self, keys: Keys) -> int:
        """Let every rank read some rows: what one lacks is sent by the lowest rank that has it. Collective.

        Returns how many rows travelled; 0 where all ranks found them on a disk.
        """
        lacking = Presence.agreed(self._store.contains(keys), self._ranks).lacking
        wanted = np.flatnonzero(lacking)
        for start in range(0, len(wanted), ROWS_IN_AN_EXCHANGE):
            if start:
                self.settle()  # what was received does not pile up in memory
            self._exchange(keys[wanted[start : start + ROWS_IN_AN_EXCHANGE]])
        return len(wanted)

    def _exchange(self, keys: Keys) -> None:
        store, ranks = self._store, self._ranks
        have = store.contains(keys)
        rank_if_here = np.where(have, -ranks.rank, -ranks.world_size)
        owner = -ranks.max(torch.from_numpy(rank_if_here).to(ranks.device)).cpu().numpy()
        sent = [row.tobytes() for row in store.lookup(keys[owner == ranks.rank])]
        for rank, received in enumerate(ranks.gather_objects(sent)):
            new = ~have[owner == rank]
            rows = [np.frombuffer(row, np.float32) for row in received]
            store.hold(keys[owner == rank][new], [rows[i] for i in np.flatnonzero(new)])

    def settle_if_due(self) -> bool:
        """Settle if half a minute has passed on some rank; returns whether it had. Collective."""
        overdue = time.monotonic() - self._settled_at > SECONDS_BETWEEN_COMMITS
        due = bool(self._ranks.max(torch.tensor(int(overdue), device=self._ranks.device)).item())
        if due:
            self.settle()
        return due

    def settle(self) -> None:
        """Bring all rows to all disks: whoever scored writes, and then each machine what it still lacks. Collective."""
        self.write()
        self._store.merge(self._unseen)
        self._unseen = []
        self._ranks.barrier()
        self._store.refresh()
        if self._ranks.is_local_main:
            self._store.write_held(self._store.held)
        self._ranks.barrier()
        self._store.refresh()
        self._store.let_go()
        self._settled_at = time.monotonic()


def score(
    plan: ScoringPlan,
    scorer: Scorer,
    fresh: FreshRows,
    ranks: Ranks,
    console: Console,
    *,
    layout: Layout,
    pad_id: int,
    between_batches: Callable[[], None] = lambda: None,
) -> None:
    """Score the planned rows in lockstep over ranks; all of them call `between_batches`, which may raise to stop.

    Raises NonFiniteLogProbsError, on the rank that finds them, for log-probs that are no numbers; what was scored
    before is committed then.
    """
    groups, costs = plan.groups, plan.costs
    sizes = np.diff(groups.starts)
    shortest = int(np.argmin(costs.tokens))
    started, tokens = time.monotonic(), 0
    with console.progress("Reference log-probs", plan.num_rows, "sequences") as bar:
        for round_ in arrange(plan.micro_batches, costs, ranks.world_size):
            between_batches()
            mine = round_[ranks.rank].tolist()
            # A rank without work computes filler, to stay in lockstep, and drops it.
            tensors = collate([groups.completions(group) for group in mine or [shortest]], layout, pad_id)
            logps_C = scorer(tensors.to(ranks.device)).float().cpu()
            if mine:
                rows_logps = [row.numpy() for row in logps_C.split(tensors.lengths.tolist())]
                _take(groups, mine, rows_logps, fresh)
            tokens += sum(int(costs.tokens[batch].sum()) for batch in round_)
            rate = tokens / (time.monotonic() - started)
            bar.advance(sum(int(sizes[batch].sum()) for batch in round_), f"{rate:,.0f} tokens/s")


def _take(groups: Groups, mine: list[int], rows: Sequence[LogProbs], fresh: FreshRows) -> None:
    """Keep the rows of a micro-batch; those that are not finite end the pass, with their names."""
    finite = np.array([np.isfinite(row).all() for row in rows])
    keys = np.concatenate([groups.keys(group) for group in mine])
    fresh.add(keys[finite], [row for row, is_finite in zip(rows, finite, strict=True) if is_finite])
    if not finite.all():
        fresh.write()
        names = np.array([name for group in mine for name in groups.names(group)])
        raise NonFiniteLogProbsError(names[~finite].tolist())
