"""Stored log-probs against ones that one process computes anew: no ZeRO, no packing, no shared prompts."""

from __future__ import annotations

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
from dpo_scale.reference.commands import RowComparison, compare_rows
from dpo_scale.reference.fingerprint import explain_difference, read_fingerprint
from dpo_scale.reference.parts import LogProbs
from dpo_scale.reference.scoring import ReferenceRows
from dpo_scale.reference.source import find_reference


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


def tolerance(recipe: Recipe) -> float:
    """Largest gap of a token's log-prob, in nats, that another kernel explains."""
    return TOLERANCE[DTYPES[recipe.model.dtype]]
