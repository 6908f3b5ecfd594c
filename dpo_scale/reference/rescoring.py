"""Stored log-probs against ones that one process computes anew: no ZeRO, no packing, no shared prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dpo_scale.console import Console
from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.errors import UserError
from dpo_scale.inputs import prepare_data
from dpo_scale.model.layout_check import TOLERANCE
from dpo_scale.model.loading import DTYPES, load_model
from dpo_scale.recipe import Recipe
from dpo_scale.reference.cache import ReferenceStore
from dpo_scale.reference.fingerprint import explain_difference, read_fingerprint
from dpo_scale.reference.parts import Keys, LogProbs
from dpo_scale.reference.scoring import ReferenceRows
from dpo_scale.reference.source import find_reference


@dataclass(frozen=True, slots=True)
class RowComparison:
    """Stored log-probs against ones that were scored anew."""

    rows: int
    """Rows compared."""
    tokens: int
    largest_gap: float
    """Largest difference of a token's two log-probs, in nats."""


def rescore(recipe: Recipe, folder: Path, rows: int) -> RowComparison:
    """Score some random rows of a recipe's data with its reference, and compare with a store.

    Raises UserError if the store is of another reference, or holds no row of this data.
    """
    ranks, console = OneProcess(), Console()
    data = prepare_data(recipe, ranks, console)
    source = find_reference(recipe, data, ranks, console)
    stored = read_fingerprint(folder)
    if stored is None or stored.key != source.fingerprint.key:
        reasons = explain_difference(source.fingerprint, stored) if stored else ["reference.json is missing or damaged"]
        raise UserError(f"{folder}: not the store of this recipe's reference: {'; '.join(reasons)}")
    needed = ReferenceRows.of_pairs(TokenPairs.from_pairs([*data.train, *data.evaluate]))
    store = ReferenceStore(folder, source.fingerprint)
    store.refresh()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(source.folder, recipe.model).to(device).eval()

    @torch.no_grad()
    def score(positions: npt.NDArray[np.intp]) -> list[LogProbs]:
        found = []
        for position in positions.tolist():
            pair = needed.pairs[position // 2]
            row = PromptCompletions(pair.prompt, (pair.rejected if position % 2 else pair.chosen,))
            batch = collate([row], "padded", data.pad_id)
            found.append(model(batch.to(device)).float().cpu().numpy())
        return found

    return compare_rows(store, needed.of(np.arange(len(needed.pairs))), score, rows)


def compare_rows(
    store: ReferenceStore,
    keys: Keys,
    rescore: Callable[[npt.NDArray[np.intp]], Sequence[LogProbs]],
    rows: int,
    seed: int = 0,
) -> RowComparison:
    """Score some random rows anew and compare.

    Args:
        store: where the stored log-probs are.
        keys: uint8 [candidates, 16], of rows whose tokens the caller has; draws stored ones.
        rescore: positions in `keys` -> per-token log-probs in that order.
        rows: how many to draw.
        seed: of the draw.

    Raises UserError if the store holds none of them, or one with another number of tokens.
    """
    held = np.flatnonzero(store.contains(keys))
    if not len(held):
        raise UserError(f"{store.folder}: holds none of the {len(keys)} rows of this data")
    drawn = np.sort(np.random.default_rng(seed).choice(held, min(rows, len(held)), replace=False))
    tokens, largest_gap = 0, 0.0
    for stored, scored in zip(store.lookup(keys[drawn]), rescore(drawn), strict=True):
        if stored.shape != scored.shape:
            raise UserError(
                f"{store.folder}: a row has {len(stored)} log-probs, scored anew it has "
                f"{len(scored)}; the stored ones are of another scoring path: prune this store"
            )
        gap = float(np.abs(stored.astype(np.float64) - scored).max(initial=0.0))
        largest_gap = max(largest_gap, gap if gap == gap else math.inf)  # NaN is the largest gap
        tokens += len(stored)
    return RowComparison(rows=len(drawn), tokens=tokens, largest_gap=largest_gap)


def tolerance(recipe: Recipe) -> float:
    """Largest gap of a token's log-prob, in nats, that another kernel explains."""
    return TOLERANCE[DTYPES[recipe.model.dtype]]
