"""Frozen model -> log-probs that can be trusted: find what is missing, score it in lockstep, store it.

The engine is built only if a row is missing. What a row is worth does not depend on who scored it, so ranks, jobs
and nodes without a shared disk can fill the same store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.data.planning import CostModel, check_budget, layout_costs, plan_pass
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.reference.cache import ReferenceStore, pair_row_keys
from dpo_scale.reference.parts import Keys, LogProbs

SECONDS_BETWEEN_COMMITS = 30.0
ROWS_IN_AN_EXCHANGE = 4096


class Ranks(Protocol):
    """The collectives that scoring uses."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_local_main(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def barrier(self) -> None: ...
    def gather_objects(self, value: list[bytes]) -> list[list[bytes]]: ...
    def max(self, values: Tensor) -> Tensor: ...


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
        chosen, rejected = pair_row_keys(pairs)
        return cls(pairs, np.stack([chosen, rejected], axis=1))

    def of(self, indices: npt.NDArray[np.int64]) -> Keys:
        """Keys of some pairs, uint8 [2 * indices, 16], chosen and rejected in turn."""
        return np.ascontiguousarray(self.keys[indices].reshape(-1, self.keys.shape[-1]))


@dataclass(frozen=True, slots=True)
class MissingRow:
    """A row to score: a pair and 0 for its chosen, 1 for its rejected completion."""

    pair: int
    side: int
    key: bytes


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """Missing rows, grouped by prompt: each is scored once however many pairs share it."""

    groups: tuple[PromptCompletions, ...]
    keys: tuple[tuple[bytes, ...], ...]
    rows: tuple[str, ...]
    """Where the first pair of each group came from, for messages."""

    @property
    def num_rows(self) -> int:
        return sum(len(keys) for keys in self.keys)

    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [groups, 1 + most completions]: tokens of the prompt and of each completion, else 0."""
        width = max((len(group.completions) for group in self.groups), default=0)
        lengths = np.zeros((len(self.groups), 1 + width), np.int64)
        for row, group in zip(lengths, self.groups, strict=True):
            row[0] = len(group.prompt)
            row[1 : 1 + len(group.completions)] = [len(c) for c in group.completions]
        return lengths


def missing_everywhere(store: ReferenceStore, keys: Keys, ranks: Ranks) -> npt.NDArray[np.bool_]:
    """Which of the rows no rank has, bool [rows]: the same answer on every rank, with or without a shared disk."""
    found = torch.from_numpy(store.contains(keys).astype(np.uint8)).to(ranks.device)
    missing: npt.NDArray[np.bool_] = ranks.max(found).cpu().numpy() == 0
    return missing


def plan_scoring(
    needed: ReferenceRows, indices: npt.NDArray[np.int64], missing: npt.NDArray[np.bool_]
) -> ScoringPlan:
    """Group the missing rows of some pairs by prompt, each row once.

    Args:
        indices: int64 [n], pairs.
        missing: bool [2 * n], their rows that have to be scored, chosen and rejected in turn.
    """
    by_prompt: dict[bytes, list[MissingRow]] = {}
    seen: set[bytes] = set()
    keys = needed.of(indices)
    for flat in np.flatnonzero(missing):
        key = keys[flat].tobytes()
        if key in seen:
            continue
        seen.add(key)
        pair = int(indices[flat // 2])
        prompt = needed.pairs[pair].prompt.tobytes()
        by_prompt.setdefault(prompt, []).append(MissingRow(pair, int(flat % 2), key))
    groups = [_group(needed.pairs, rows) for rows in by_prompt.values()]
    return ScoringPlan(
        groups=tuple(groups),
        keys=tuple(tuple(row.key for row in rows) for rows in by_prompt.values()),
        rows=tuple(needed.pairs[rows[0].pair].row for rows in by_prompt.values()),
    )


def _group(pairs: TokenPairs, rows: Sequence[MissingRow]) -> PromptCompletions:
    completions = []
    for row in rows:
        pair = pairs[row.pair]
        completions.append(pair.rejected if row.side else pair.chosen)
    return PromptCompletions(pairs[rows[0].pair].prompt, tuple(completions))


def score(
    plan: ScoringPlan,
    scorer: Scorer,
    store: ReferenceStore,
    ranks: Ranks,
    console: Console,
    *,
    layout: Layout,
    rank_tokens: int,
    cost: CostModel,
    pad_id: int,
) -> None:
    """Score the planned rows in lockstep over ranks and store them; at most half a minute of work is uncommitted.

    Raises DataError if one group alone is over the token budget.
    """
    if not plan.num_rows:
        return
    costs = layout_costs(plan.lengths(), layout, cost)
    check_budget(costs, rank_tokens, plan.rows, "reference.rank_tokens")
    rounds = plan_pass(costs, world_size=ranks.world_size, rank_tokens=rank_tokens).micro_batches
    shortest = plan.groups[int(np.argmin(costs.tokens))]
    waiting = _Uncommitted(store)
    started, tokens = time.monotonic(), 0
    with console.progress("Reference log-probs", len(plan.groups), "prompts") as bar:
        for round_ in rounds:
            mine = round_[ranks.rank]
            groups = [plan.groups[index] for index in mine] or [shortest]
            batch = collate(groups, layout, pad_id)
            token_logps = scorer(batch.to(ranks.device)).float().cpu()
            if len(
                mine
            ):  # the filler of a rank without work is computed to stay in lockstep, and dropped
                keys = [key for index in mine for key in plan.keys[index]]
                waiting.add(keys, token_logps.split(batch.lengths.tolist()))
            tokens += sum(int(costs.tokens[indices].sum()) for indices in round_)
            rate = tokens / (time.monotonic() - started)
            bar.advance(sum(len(indices) for indices in round_), f"{rate:,.0f} tokens/s")
    waiting.commit()


class _Uncommitted:
    """Scored rows that wait to be written as one part."""

    def __init__(self, store: ReferenceStore) -> None:
        self._store = store
        self._keys: list[bytes] = []
        self._rows: list[LogProbs] = []
        self._since = time.monotonic()

    def add(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> None:
        self._keys += keys
        self._rows += [row.numpy() for row in rows]
        if time.monotonic() - self._since > SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        if self._keys:
            keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(len(self._keys), -1)
            self._store.append(keys, self._rows)
        self._keys, self._rows, self._since = [], [], time.monotonic()


def share(store: ReferenceStore, keys: Keys, ranks: Ranks) -> int:
    """Let every rank read all the rows: those that a rank does not find on its disk are sent by one that does.

    Returns how many rows travelled; 0 with a shared disk.
    """
    ranks.barrier()  # every rank has committed
    store.refresh()
    lacking = torch.from_numpy((~store.contains(keys)).astype(np.uint8)).to(ranks.device)
    wanted = np.flatnonzero(ranks.max(lacking).cpu().numpy())
    for start in range(0, len(wanted), ROWS_IN_AN_EXCHANGE):
        chunk = keys[wanted[start : start + ROWS_IN_AN_EXCHANGE]]
        _exchange(store, chunk, ranks)
    ranks.barrier()
    store.refresh()
    return len(wanted)


def _exchange(store: ReferenceStore, keys: Keys, ranks: Ranks) -> None:
    """Send rows from the lowest rank that has each to the disks that lack it."""
    have = store.contains(keys)
    rank_if_here = torch.where(torch.from_numpy(have), -ranks.rank, -ranks.world_size)
    owner = -ranks.max(rank_if_here.to(ranks.device)).cpu().numpy()
    mine = np.flatnonzero(owner == ranks.rank)
    sent = [row.tobytes() for row in store.lookup(keys[mine])]
    received = ranks.gather_objects(sent)
    if ranks.is_local_main and not have.all():  # one writer a node
        rows: dict[int, LogProbs] = {}
        for rank, payload in enumerate(received):
            for position, row in zip(np.flatnonzero(owner == rank), payload, strict=True):
                rows[int(position)] = np.frombuffer(row, np.float32)
        absent = np.flatnonzero(~have)
        store.append(keys[absent], [rows[int(position)] for position in absent])
