"""The reference in a run: which model it is, which rows are missing, the engine while it is needed, the values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.engines import ReferenceEngine, loading_for
from dpo_scale.distributed.runtime import Runtime
from dpo_scale.errors import RecipeError
from dpo_scale.files import remembered_sha256
from dpo_scale.model.layout_check import LayoutChoice, check_layout
from dpo_scale.model.loading import (
    DTYPES,
    check_vocabulary,
    cost_model,
    load_config,
    load_model,
    register_attention,
    resolve_folder,
)
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import Recipe, cache_root
from dpo_scale.reference.cache import ReferenceStore, near_misses
from dpo_scale.reference.fingerprint import ReferenceFingerprint, fingerprint_model, weight_files
from dpo_scale.reference.scoring import (
    ReferenceRows,
    missing_everywhere,
    plan_scoring,
    score,
    share,
)
from dpo_scale.training.lockstep import together
from dpo_scale.training.setup import Data, once_a_machine

Indices = npt.NDArray[np.int64]


class Reference:
    """The reference's log-probs for any pairs of a run, scored when and where they are missing."""

    def __init__(self, recipe: Recipe, runtime: Runtime, data: Data, console: Console) -> None:
        self._recipe, self._runtime, self._data, self._console = recipe, runtime, data, console
        self._ranks = runtime.ranks
        self._engine: ReferenceEngine | None = None
        self._layout: LayoutChoice | None = None
        self.rows_cached = 0
        self.rows_computed = 0
        self._folder = once_a_machine(
            self._ranks,
            lambda: resolve_folder(
                recipe.reference_path, recipe.reference_revision, "reference.path"
            ),
        )
        self._config = load_config(
            self._folder,
            trust_remote_code=recipe.model.trust_remote_code,
            setting="reference.path",
        )
        self._check_same_tokens()
        cache_dir = Path(recipe.reference.cache_dir or cache_root() / "reference")
        fingerprint = self._fingerprint(cache_dir)
        self.store = ReferenceStore.open(cache_dir, fingerprint)
        self._near_misses = near_misses(cache_dir, fingerprint)

    def _check_same_tokens(self) -> None:
        """A reference of its own must give the same token ids: its log-probs are of the policy's tokens."""
        if self._folder == self._data.model_folder:
            return
        ours = self._data.tokenizer.get_vocab()
        theirs = load_tokenizer(
            str(self._folder), trust_remote_code=self._recipe.model.trust_remote_code
        ).get_vocab()
        differing = [token for token, id_ in ours.items() if theirs.get(token) != id_]
        if differing:
            raise RecipeError(
                f"reference.path: {self._folder} has another tokenizer ({len(differing)} tokens differ, first "
                f"{differing[0]!r}); a reference scores the policy's tokens and must share its vocabulary"
            )
        largest = max(self._data.train.largest_token_id, self._data.evaluate.largest_token_id)
        check_vocabulary(largest, self._config, "reference.path")

    def _fingerprint(self, cache_dir: Path) -> ReferenceFingerprint:
        """Fingerprint of the reference's files, each hashed by one rank."""
        ranks, files = self._ranks, weight_files(self._folder)

        def digests() -> dict[str, str]:
            mine = files[ranks.rank :: ranks.world_size]
            return {file.name: remembered_sha256(file, cache_dir) for file in mine}

        gathered = together(ranks, digests, RecipeError)
        return fingerprint_model(
            self._folder,
            self._recipe.model.dtype,
            {name: digest for part in gathered for name, digest in part.items()},
            trust_remote_code=self._recipe.model.trust_remote_code,
        )

    @property
    def is_the_policys_start(self) -> bool:
        """Whether the policy starts as this reference."""
        return self._folder == self._data.model_folder

    def rows(self, pairs: TokenPairs) -> ReferenceRows:
        """Keys of the rows that pairs need; rows that a rank's disk lacks are fetched from the others."""
        return ReferenceRows.of_pairs(pairs)

    def score_all(self, *needed: ReferenceRows) -> None:
        """Score everything that is missing, and release the engine. Collective."""
        for name, rows in zip(("training", "held-out"), needed, strict=False):
            if len(rows.pairs):
                self._say_what_is_needed(name, rows)
                self.ensure(rows, np.arange(len(rows.pairs)))
        self.release()

    def _say_what_is_needed(self, name: str, rows: ReferenceRows) -> None:
        keys = rows.of(np.arange(len(rows.pairs)))
        unique = np.unique(keys, axis=0)
        to_score = int(missing_everywhere(self.store, unique, self._ranks).sum())
        line = f"Reference, {name}: {len(unique):,} rows, {len(unique) - to_score:,} cached, {to_score:,} to score"
        self._console.say(line)
        if to_score == len(unique):
            for reason in self._near_misses[:3]:
                self._console.say(f"  a similar store does not serve: {reason}")

    def ensure(self, rows: ReferenceRows, indices: Indices) -> None:
        """Make the rows of some pairs readable on every rank. Collective.

        All ranks pass the same pairs, and leave with the same answer on what was scored.
        """
        keys = rows.of(indices)
        missing = missing_everywhere(self.store, keys, self._ranks)
        plan = plan_scoring(rows, indices, missing)
        self.rows_cached += len(keys) - int(missing.sum())
        self.rows_computed += int(missing.sum())
        if plan.num_rows:
            together(self._ranks, self.store.ensure_writable, RecipeError)
            engine, layout = self._open_engine(rows.pairs)
            score(
                plan,
                engine,
                self.store,
                self._ranks,
                self._console,
                layout=layout,
                rank_tokens=self._recipe.scoring_rank_tokens,
                cost=cost_model(self._config),
                pad_id=self._data.pad_id,
            )
        share(self.store, keys, self._ranks)

    def _open_engine(self, pairs: TokenPairs) -> tuple[ReferenceEngine, Layout]:
        """The engine, built on first use, with the layout that it was checked in."""
        recipe, ranks = self._recipe, self._ranks
        if self._engine is None or self._layout is None:
            register_attention(recipe.model, ranks.device)
            self._console.say(f"Loading the reference from {self._folder}")
            with loading_for(self._runtime.accelerator, "reference"):
                model = load_model(self._folder, recipe.model)
                self._engine = ReferenceEngine(self._runtime.accelerator, model)
            self._layout = check_layout(
                self._engine,
                pairs,
                wanted=recipe.batch.layout,
                dtype=DTYPES[recipe.model.dtype],
                device=ranks.device,
                pad_id=self._data.pad_id,
            )
            for line in self._layout.describe("reference"):
                self._console.say(line)
        return self._engine, self._layout.layout

    def release(self) -> None:
        """Free the engine, if it was ever built."""
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
