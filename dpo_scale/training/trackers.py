"""Trackers beside metrics.jsonl, started so that a run which goes on does so in the same place."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dpo_scale.recipe import Recipe
from dpo_scale.training.run_folder import flatten

PROJECT = "dpo_scale"
CONTINUED = ("wandb", "tensorboard")


class Tracking(Protocol):
    """What is needed of Accelerate."""

    def init_trackers(self, project_name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None: ...


def new_run_ids(recipe: Recipe) -> dict[str, str]:
    """Ids for the trackers that take one from us."""
    return {"wandb": uuid.uuid4().hex[:12]} if "wandb" in recipe.track.to else {}


def start_trackers(accelerator: Tracking, recipe: Recipe, run_ids: Mapping[str, str], step: int) -> list[str]:
    """Start the recipe's trackers at a step; returns those that begin another run where ours goes on.

    What an attempt that died had logged beyond the checkpoint is logged again, with the same values: wandb keeps the
    first, and tensorboard is told to drop it.
    """
    options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1 if step else 0}}
    if "wandb" in run_ids:
        # By itself wandb writes into the current folder, and invents a name.
        named = {"dir": recipe.run.output_dir, "name": Path(recipe.run.output_dir).name}
        options["wandb"] = {"id": run_ids["wandb"], "resume": "allow", **named}
    settings = {name: str(value) for name, value in flatten(recipe).items()}
    accelerator.init_trackers(PROJECT, settings, init_kwargs=options)
    return [name for name in recipe.track.to if step and name not in ("jsonl", *CONTINUED)]
