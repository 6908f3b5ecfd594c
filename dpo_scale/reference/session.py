"""The reference in a run: which rows are missing, the engine while it is needed, the values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.engines import ReferenceEngine, loading_for, pin_where_it_fits
from dpo_scale.distributed.lockstep import together
from dpo_scale.distributed.runtime import Runtime
from dpo_scale.errors import RecipeError
from dpo_scale.inputs import Data, schedule_of
from dpo_scale.model.layout_check import check_layout
from dpo_scale.model.loading import DTYPES, cost_model, load_model, register_attention, stored_elements
from dpo_scale.recipe import Recipe, reference_cache_dir
from dpo_scale.reference.cache import ReferenceStore, near_misses
from dpo_scale.reference.fingerprint import ReferenceFingerprint
from dpo_scale.reference.key_index import first_positions
from dpo_scale.reference.scoring import (
    FreshRows,
    Indices,
    Presence,
    ReferenceRows,
    plan_scoring,
    row_numbers,
    score,
)
from dpo_scale.reference.source import find_reference

NEAR_MISSES_SHOWN = 3


class Reference:
    """The reference's log-probs for any pairs of a run, scored when and where they are missing.

    Attributes:
        store: what is computed already.
        train_rows, evaluate_rows: the rows that the run's pairs need.
        rows_cached: rows that were asked for and found.
        rows_computed: rows that were scored.
    """

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        data: Data,
        console: Console,
        between_batches: Callable[[], None] = lambda: None,
    ) -> None:
        """All ranks call `between_batches` between two micro-batches; what it raises ends the scoring."""
        self._recipe, self._runtime, self._data, self._console = recipe, runtime, data, console
        self._between_batches = between_batches
        self._ranks = runtime.ranks
        self._source = find_reference(recipe, data, self._ranks, console)
        self.store = ReferenceStore.open(reference_cache_dir(recipe), self._source.fingerprint)
        self.train_rows = ReferenceRows.of_pairs(data.train)
        self.evaluate_rows = ReferenceRows.of_pairs(data.evaluate)
        self._trained_on = schedule_of(recipe, len(data.train)).pairs_reached()
        self.rows_cached = 0
        self.rows_computed = 0
        self._fresh = FreshRows(self.store, self._ranks)
        self._unsettled = False  # whether some disk may lack a row that was scored or sent; equal on all ranks
        self._announced: list[TokenPairs] = []
        self._engine: ReferenceEngine | None = None
        self._layout: Layout | None = None

    @property
    def fingerprint(self) -> ReferenceFingerprint:
        """Which model the log-probs are of."""
        return self._source.fingerprint

    @property
    def is_the_policys_start(self) -> bool:
        """Whether the policy starts as this reference."""
        return self._source.folder == self._data.model_folder

    def score_all(self, *needed: ReferenceRows) -> None:
        """Score all that the run reads and that is missing, commit it, and release the engine. Collective."""
        for rows in needed:
            self.ensure(rows, self._read(rows))
        self.release()

    def _read(self, rows: ReferenceRows) -> Indices:
        """The pairs whose rows the run reads: where it ends before its first epoch does, not all of them."""
        return self._trained_on if rows.pairs is self._data.train else np.arange(len(rows.pairs))

    def ensure(self, rows: ReferenceRows, indices: Indices) -> None:
        """Make the rows of some pairs readable on every rank; all ranks pass the same pairs. Collective."""
        if not len(indices):
            return
        keys = rows.of(indices)
        presence = self._announce(rows, indices) or self._presence(keys)
        self.rows_cached += len(keys) - int(presence.missing.sum())
        if presence.missing.any():
            self._score(rows, indices, presence.missing)
        if presence.lacking.any() or self._unsettled:
            self._unsettled = not self._fresh.settle_if_due()
        if presence.lacking.any():
            self._unsettled |= self._fresh.share(keys) > 0

    def _presence(self, keys: npt.NDArray[np.uint8]) -> Presence:
        return Presence.agreed(self.store.contains(keys), self._ranks)

    def _announce(self, rows: ReferenceRows, indices: Indices) -> Presence | None:
        """Say what a set of pairs needs when it first comes up; returns that of `indices`."""
        if any(pairs is rows.pairs for pairs in self._announced):
            return None
        self._announced.append(rows.pairs)
        keys = rows.of(np.arange(len(rows.pairs)))
        presence = self._presence(keys)
        read = row_numbers(self._read(rows))
        is_first = first_positions(keys[read]) == np.arange(len(read))
        needed, to_score = int(is_first.sum()), int((is_first & presence.missing[read]).sum())
        name = "training" if rows.pairs is self._data.train else "held-out"
        self._console.say(f"Reference, {name}: {needed:,} rows, {needed - to_score:,} cached, {to_score:,} to score")
        if to_score == needed and self._ranks.is_main:
            for reason in near_misses(self.store.folder.parent, self._source.fingerprint)[:NEAR_MISSES_SHOWN]:
                self._console.say(f"  a similar store does not serve: {reason}")
        mine = row_numbers(indices)
        return Presence(presence.missing[mine], presence.lacking[mine])

    def _score(self, rows: ReferenceRows, indices: Indices, missing: npt.NDArray[np.bool_]) -> None:
        together(self._ranks, self.store.ensure_writable, RecipeError)
        engine, layout = self._open_engine(rows.pairs)
        self._unsettled = True
        plan = plan_scoring(
            rows,
            indices,
            missing,
            layout=layout,
            rank_tokens=self._recipe.scoring_rank_tokens,
            cost=cost_model(self._source.config),
        )
        score(
            plan,
            engine,
            self._fresh,
            self._ranks,
            self._console,
            layout=layout,
            pad_id=self._data.pad_id,
            between_batches=self._between_batches,
        )
        self.rows_computed += plan.num_rows

    def _open_engine(self, pairs: TokenPairs) -> tuple[ReferenceEngine, Layout]:
        """The engine, built on first use, with the layout that it was checked in."""
        recipe, ranks = self._recipe, self._ranks
        if self._engine is None or self._layout is None:
            register_attention(recipe.model, ranks.device)
            folder, accelerator = self._source.folder, self._runtime.accelerator
            dtype, elements = DTYPES[recipe.model.dtype], stored_elements(folder)
            self._console.say(f"Loading the reference from {folder}")
            if pin_where_it_fits(accelerator, "reference", (elements or 0) * dtype.itemsize):
                self._console.say("  its shards are not pinned: they would take more than half of the free memory")
            with (
                self._console.progress("Loading the reference", elements, "parameters") as bar,
                loading_for(accelerator, "reference", bar.advance),
            ):
                model = load_model(folder, recipe.model)
                self._engine = ReferenceEngine(accelerator, model)
            with self._console.progress("Checking the layout", None):
                choice = check_layout(
                    self._engine,
                    pairs,
                    wanted=recipe.batch.layout,
                    dtype=dtype,
                    device=ranks.device,
                    pad_id=self._data.pad_id,
                )
            for line in choice.describe("reference"):
                self._console.say(line)
            self._layout = choice.layout
        return self._engine, self._layout

    def commit(self) -> None:
        """Bring the rows that were scored since the last commit to the disks. Collective."""
        if self._unsettled:
            self._fresh.settle()
            self._unsettled = False

    def release(self) -> None:
        """Commit, and free the engine if it was ever built. Collective."""
        self.commit()
        if self._engine is not None:
            self._engine.release()
            self._engine = None

    def logps(self, rows: ReferenceRows, indices: Indices) -> npt.NDArray[np.float64]:
        """Reduced log-probs of pairs, float64 [pairs, 2], chosen and rejected."""
        sums, counts = self.store.sums_and_counts(rows.of(indices))
        reduced = sums if self._recipe.loss.reduction == "sum" else sums / np.maximum(counts, 1)
        return reduced.reshape(-1, 2)

    def token_logps(self, rows: ReferenceRows, indices: Indices) -> npt.NDArray[np.float32]:
        """Log-probs of every completion token of pairs, float32 [tokens], in the order of a micro-batch."""
        return np.concatenate(self.store.lookup(rows.of(indices)))
