"""Which model the reference is: its folder, its configuration, and the fingerprint of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_scale.console import BYTES, Console
from dpo_scale.distributed.lockstep import Ranks, once_a_machine, together
from dpo_scale.errors import RecipeError, UserError
from dpo_scale.files import known_sha256, remembered_sha256
from dpo_scale.inputs import Data
from dpo_scale.model.loading import check_vocabulary, load_config, resolve_folder
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import Recipe, reference_cache_dir
from dpo_scale.reference.fingerprint import ReferenceFingerprint, fingerprint_model, weight_files


@dataclass(frozen=True, slots=True)
class ReferenceSource:
    """The reference of a recipe, as its files have it."""

    folder: Path
    config: Any
    fingerprint: ReferenceFingerprint


def find_reference(recipe: Recipe, data: Data, ranks: Ranks, console: Console) -> ReferenceSource:
    """Find the reference and hash its files, without loading a weight. Collective.

    Raises RecipeError for a reference that does not score the policy's tokens.
    """
    folder = once_a_machine(
        ranks, lambda: resolve_folder(recipe.reference_path, recipe.reference_revision, "reference.path")
    )
    config = load_config(folder, trust_remote_code=recipe.model.trust_remote_code, setting="reference.path")
    if folder != data.model_folder:
        check_same_tokens(folder, config, recipe, data)
    return ReferenceSource(folder, config, _fingerprint(folder, recipe, ranks, console))


def check_same_tokens(folder: Path, config: Any, recipe: Recipe, data: Data) -> None:
    """A reference of its own must give the same token ids: its log-probs are of the policy's tokens.

    Raises RecipeError if it does not.
    """
    ours = data.tokenizer.get_vocab()
    theirs = load_tokenizer(str(folder), trust_remote_code=recipe.model.trust_remote_code).get_vocab()
    differing = [token for token, id_ in ours.items() if theirs.get(token) != id_]
    if differing:
        raise RecipeError(
            f"reference.path: {folder} has another tokenizer ({len(differing)} tokens differ, first "
            f"{differing[0]!r}); a reference scores the policy's tokens and must share its vocabulary"
        )
    largest = max(data.train.largest_token_id, data.evaluate.largest_token_id)
    check_vocabulary(largest, config, "reference.path")


def known_fingerprint(recipe: Recipe) -> ReferenceFingerprint | None:
    """The fingerprint of a recipe's reference where no weight has to be read for it: all digests are remembered."""
    folder = resolve_folder(recipe.reference_path, recipe.reference_revision, "reference.path", weights=False)
    try:
        digests = {file.name: known_sha256(file, reference_cache_dir(recipe)) for file in weight_files(folder)}
    except UserError:  # a hub model that is not fetched yet
        return None
    known = {name: digest for name, digest in digests.items() if digest is not None}
    if len(known) < len(digests):
        return None
    return fingerprint_model(folder, recipe.model.dtype, known, trust_remote_code=recipe.model.trust_remote_code)


def _fingerprint(folder: Path, recipe: Recipe, ranks: Ranks, console: Console) -> ReferenceFingerprint:
    """Fingerprint of the reference's files, each hashed by one rank."""
    files, memory = weight_files(folder), reference_cache_dir(recipe)

    def digests() -> dict[str, str]:
        mine = files[ranks.rank :: ranks.world_size]
        with console.progress("Hashing the reference", sum(file.stat().st_size for file in mine), BYTES) as bar:
            return {file.name: remembered_sha256(file, memory, bar.advance) for file in mine}

    gathered = together(ranks, digests, RecipeError)
    return fingerprint_model(
        folder,
        recipe.model.dtype,
        {name: digest for part in gathered for name, digest in part.items()},
        trust_remote_code=recipe.model.trust_remote_code,
    )
