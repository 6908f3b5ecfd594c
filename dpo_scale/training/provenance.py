"""What an exported model says of where it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dpo_scale import __version__
from dpo_scale.recipe import Recipe


def provenance(recipe: Recipe, source_model: str) -> dict[str, Any]:
    """Which program, recipe and model it comes from, as JSON values; of each absolute path only the name is told.

    An exported folder is made to be given away: it says which data, model and settings it is of, and nothing about the
    machine on which they lie.
    """
    values = {"recipe": recipe.model_dump(mode="json"), "source_model": source_model}
    return {"made_by": f"dpo_scale {__version__}", **_without_folders(values)}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
