"""The run's folder: its recipe, its lock, its records. One run, one folder, one recipe."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dpo_scale.errors import RecipeError
from dpo_scale.files import write_atomically, write_json
from dpo_scale.recipe import Recipe, dump_recipe
from dpo_scale.reference.fingerprint import ReferenceFingerprint, explain_difference, read_fingerprint
from dpo_scale.training import locks

HARMLESS = (
    "model.attention",
    "model.activation_checkpointing",
    "reference.schedule",
    "reference.offload",
    "reference.nvme_path",
    "reference.cache_dir",
    "reference.rank_tokens",
    "data.workers",
    "data.cache_dir",
    "batch.rank_tokens",
    "batch.layout",
    "evaluate.",
    "data.evaluate",
    "checkpoint.",
    "track.",
    "run.output_dir",
    "run.resume",
    "run.stop_after",
    "run.stall_after",
)
"""Settings that do not change what is trained beyond rounding; names that end in a dot are whole sections."""


def trajectory_of(recipe: Recipe, train_digest: str, reference_key: str) -> dict[str, Any]:
    """All that determines the trajectory: the settings that matter, and what training and reference files hold."""
    values = {name: value for name, value in flatten(recipe).items() if not name.startswith(HARMLESS)}
    return {**values, "tokens of the training pairs": train_digest, "files of the reference": reference_key}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """`section.field` -> value."""
    return {
        f"{section}.{field}": value
        for section, fields in recipe.model_dump(mode="json").items()
        for field, value in fields.items()
    }


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What changed between two flattened recipes, one line each: what matters, and what is harmless."""
    matters: list[str] = []
    harmless: list[str] = []
    for line in differences(before, after):
        (harmless if line.startswith(HARMLESS) else matters).append(line)
    return matters, harmless


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, a line for each name."""
    return [
        f"{name}: was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


class RunFolder:
    """The folder as the main rank sees it; holds the lock until the process ends."""

    def __init__(self, recipe: Recipe) -> None:
        """Take the folder for a recipe and note what differs from the recipe that is in it.

        Raises RecipeError if another process works in it, or another recipe did.
        """
        self.path = Path(recipe.run.output_dir)
        self._lock = locks.take(self.path / ".lock")
        self.harmless_changes: list[str] = []
        recipe_path = self.path / "recipe.yaml"
        if recipe_path.exists():
            self._compare(yaml.safe_load(recipe_path.read_text(encoding="utf-8")), recipe)
        write_atomically(recipe_path, lambda path: _write_text(path, dump_recipe(recipe)))

    def _compare(self, stored: dict[str, Any], recipe: Recipe) -> None:
        before = {f"{section}.{field}": value for section, fields in stored.items() for field, value in fields.items()}
        matters, self.harmless_changes = changed_settings(before, flatten(recipe))
        if matters and any((self.path / name).exists() for name in ("checkpoints", "model")):
            raise RecipeError(
                f"run.output_dir: {self.path} holds a run of another recipe\n"
                + "\n".join(f"  {line}" for line in matters)
                + "\nchoose another folder, or restore these settings"
            )

    def keep_reference(self, reference: ReferenceFingerprint) -> None:
        """Note in `reference.json` what this run is trained against.

        Raises RecipeError where the folder holds checkpoints of a run against another one: files that were replaced
        under the same path, or another precision, would change the objective in the middle of a run.
        """
        before = read_fingerprint(self.path)
        if before is not None and before.key != reference.key and self.checkpoints.exists():
            raise RecipeError(
                f"run.output_dir: {self.path} was trained against another reference\n"
                + "\n".join(f"  {line.replace('store', 'this run')}" for line in explain_difference(reference, before))
                + f"\nchoose another folder, or restore the files of {before.source}"
            )
        write_json(self.path / "reference.json", reference.to_json())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_environment(self, world_size: int, device: str) -> None:
        """`environment.json`: what this attempt runs on."""
        packages = ("torch", "transformers", "deepspeed", "accelerate", "safetensors", "dpo_scale")
        write_json(
            self.path / "environment.json",
            {
                "python": sys.version.split()[0],
                "platform": platform.platform(),
                "packages": {name: metadata.version(name) for name in packages},
                "commit": _commit(),
                "world_size": world_size,
                "device": device,
                "host": socket.gethostname(),
                "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            },
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _commit() -> str | None:
    """The commit of a checkout that the package runs from."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git in this container
        return None
    return found.stdout.strip() or None
