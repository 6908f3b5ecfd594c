"""The run's folder: its recipe, its lock, its records. One run, one folder, one recipe.

What needs torch is imported where it is used: `dpo-scale status` compares recipes without it.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_scale import locks
from dpo_scale.errors import RecipeError, UserError
from dpo_scale.files import make_folder, write_json, write_whole
from dpo_scale.recipe import Recipe, dump_recipe
from dpo_scale.reference.fingerprint import (
    ReferenceFingerprint,
    explain_difference,
    read_fingerprint,
)
from dpo_scale.training.status import StatusFile, committed_step, last_known_commit, read_status

if TYPE_CHECKING:
    from dpo_scale.training.checkpoints import Checkpoint

Say = Callable[[str], None]

HASHED = ("model.path", "model.revision")
"""Where a policy lies that starts as the reference, whose files are hashed. Nobody hashes the weights of another."""
HARMLESS = (
    "model.tokenizer",
    "reference.path",
    "reference.revision",
    "data.train.path",
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
"""Settings that do not change what is trained beyond rounding; names that end in a dot are whole sections.

Files may move: what they hold is in the trajectory, not where they lie.
"""


REFERENCE, POLICY_SETTINGS = "files of the reference", "config.json of the policy"
"""Names in a trajectory, beside those of settings."""


def trajectory_of(
    recipe: Recipe, train_digest: str, reference_key: str, policy_settings: str | None = None
) -> dict[str, Any]:
    """All that determines the trajectory: the settings that matter, and what training and reference files hold.

    `policy_settings` is the digest of the policy's config.json where the reference is another model.
    """
    values = what_matters(flatten(recipe))
    values |= {"tokens of the training pairs": train_digest, REFERENCE: reference_key}
    return values if policy_settings is None else {**values, POLICY_SETTINGS: policy_settings}


def what_matters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of flattened settings those that change what is trained, be they of this version or of an older one."""
    harmless = _harmless(settings)
    return {name: value for name, value in _paths_apart(settings).items() if not name.startswith(harmless)}


def _harmless(*recipes: Mapping[str, Any]) -> tuple[str, ...]:
    """Of flattened recipes that are compared. One without `reference.path` is a trajectory, and holds what matters."""
    starts_as_reference = all(settings.get("reference.path", "") is None for settings in recipes)
    return (*HASHED, *HARMLESS) if starts_as_reference else HARMLESS


def _paths_apart(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattened settings with the training files under a name of their own, apart from what is taken of them."""
    apart, sources = dict(settings), settings.get("data.train")
    if isinstance(sources, list) and all(isinstance(source, dict) and "path" in source for source in sources):
        apart["data.train"] = [{key: value for key, value in source.items() if key != "path"} for source in sources]
        apart["data.train.path"] = [source["path"] for source in sources]
    return apart


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
    names = _harmless(before, after)
    for line in differences(_paths_apart(before), _paths_apart(after)):
        (harmless if line.startswith(names) else matters).append(line)
    return matters, harmless


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, a line for each name."""
    return [
        f"{name}: was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def compare_with_stored(recipe: Recipe) -> list[str]:
    """What differs, without changing what is trained, from the recipe in the run's folder. Reads only.

    Raises RecipeError if another recipe trained there, or the file is no run's.
    """
    folder = Path(recipe.run.output_dir)
    if not (folder / "recipe.yaml").exists():
        return []
    try:
        before = _stored_settings(folder)
    except RecipeError:
        if committed_step(folder) is None:
            raise
        return ["recipe.yaml: cannot be read"]  # the checkpoints know what the run is
    matters, harmless = changed_settings(before, flatten(recipe))
    if matters and ((folder / "model").exists() or last_known_commit(folder) is not None):
        raise RecipeError(
            f"run.output_dir: {folder} holds a run of another recipe\n"
            + "\n".join(f"  {line}" for line in matters)
            + "\nchoose another folder, or restore these settings"
        )
    return harmless


def _stored_settings(folder: Path) -> dict[str, Any]:
    """The recipe in a run's folder, flattened. Raises RecipeError if it is none, or none that a run wrote."""
    text = ""
    stored: Any = None
    with suppress(UnicodeDecodeError, yaml.YAMLError):
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        stored = yaml.safe_load(text)
    # A run's own has no comment in it. Beside what else a run leaves it may have got one since, and the run must go on.
    is_run = (folder / "status.json").exists() or committed_step(folder) is not None
    is_recipe = isinstance(stored, dict) and all(isinstance(fields, dict) for fields in stored.values())
    if not is_recipe or not (is_run or text == yaml.safe_dump(stored, sort_keys=False)):
        raise RecipeError(
            f"run.output_dir: {folder} holds a recipe.yaml that no run wrote, and a run writes its own there; "
            "choose another folder"
        )
    return {f"{section}.{field}": value for section, fields in stored.items() for field, value in fields.items()}


def _set_aside_unreadable(folder: Path) -> list[str]:
    """Move away what cannot be read beside committed checkpoints, which know what the run is; a line for each file."""
    if committed_step(folder) is None:
        return []
    moved = []
    for name, read in (("recipe.yaml", _stored_settings), ("status.json", partial(read_status, command="train"))):
        try:
            if (folder / name).exists():
                read(folder)
        except UserError:
            os.replace(folder / name, folder / f"{name}.unreadable")
            moved.append(f"{name}: could not be read, and begins anew; the old one is {name}.unreadable")
    return moved


def take_lock(path: Path, say: Say = locks.logger.warning, *, lease_s: float = locks.LEASE_S) -> locks.Lock:
    """Hold a lock in a run's folder until it is closed or this process ends; the folder is made.

    A process on another host is waited for (see `locks.take`).

    Raises RecipeError if another process holds it, or nobody can.
    """
    folder = path.parent
    try:
        return locks.Lock(path, locks.take(path, say, lease_s=lease_s))
    except locks.HeldError as error:
        in_use = f"run.output_dir: {folder} is in use by {error.holder}; stop that run, or choose another folder"
        raise RecipeError(in_use + error.remedy, may_pass=error.is_elsewhere) from error
    except locks.NoLocksError as error:
        raise RecipeError(
            f"run.output_dir: {folder}: its file system locks no files ({error.strerror}); have it mounted with locks "
            "(Lustre: -o flock; NFS: with its lock service), or choose another folder"
        ) from error
    except OSError as error:
        raise RecipeError(f"run.output_dir: {folder}: {error.strerror}") from error


def _make_writable(folder: Path) -> None:
    """Make the folder of checkpoints, which may be on another disk. Raises RecipeError if no file can be made there."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        is_dangling = folder.is_symlink() and not folder.exists()
        problem = f"a link to {folder.readlink()}, which is not there" if is_dangling else error.strerror
        raise RecipeError(f"run.output_dir: {folder}: {problem}; checkpoints are to be written there") from error


def refuse_another_run(checkpoint: Checkpoint, trajectory: Mapping[str, Any]) -> None:
    """Raise UserError for the checkpoint of another run, naming what differs."""
    differing = differences(what_matters(checkpoint.commit.trajectory), trajectory)
    if differing:
        raise UserError(
            f"{checkpoint.path}: the checkpoint of another run\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nchoose another run.output_dir, or restore what changed"
        )


def refuse_lost_checkpoints(folder: Path) -> None:
    """Raise UserError where a step was committed and no checkpoint is there: a start anew would go over the run."""
    step = last_known_commit(folder)
    lacks_its_name = any((folder / "checkpoints").glob(".step-*.partial/commit.json"))  # its run died before the rename
    if step is not None and committed_step(folder) is None and not lacks_its_name:
        raise UserError(
            f"{folder / 'checkpoints'}: no checkpoint is there, and step {step} was committed; bring the folder back "
            "(is its disk mounted?), choose another run.output_dir, or start anew with run.resume=never"
        )


class RunFolder:
    """The folder as the main rank sees it; holds the lock until the process ends."""

    def __init__(self, recipe: Recipe, say: Say = locks.logger.warning) -> None:
        """Take the folder for a recipe and note what differs from the recipe that is in it; `say` tells of a wait.

        Raises RecipeError if another process works in it, another recipe did, or no checkpoint could be written.
        """
        self.path, self._resume = Path(recipe.run.output_dir), recipe.run.resume
        self._lock = take_lock(self.path / ".lock", say)
        self.harmless_changes = _set_aside_unreadable(self.path) + compare_with_stored(recipe)
        _make_writable(self.checkpoints)
        self._recipe = dump_recipe(recipe)
        begun = last_known_commit(self.path) is not None or (self.path / "data_report.json").exists()
        if not begun or not (self.path / "recipe.yaml").exists():
            self.note_recipe()

    def open_status(self) -> StatusFile:
        """The notes of a training in this folder, which keep its lock where it is."""
        return StatusFile(self.path, "train", self._lock)

    def claim(self, reference: ReferenceFingerprint, trajectory: Mapping[str, Any]) -> None:
        """See that the folder is free for what is to be trained, before anything is computed for it.

        Raises UserError where it was trained against another reference or on other pairs, holds another model, or
        lost its checkpoints.
        """
        from dpo_scale.training.checkpoints import digest_of
        from dpo_scale.training.export import check_replaceable

        self.keep_reference(reference)
        newest = self._newest_checkpoint()
        if self._resume == "auto":
            refuse_lost_checkpoints(self.path)
            if newest is not None:
                refuse_another_run(newest, trajectory)
        check_replaceable(self.path / "model", digest_of(trajectory))
        self.note_recipe()

    def note_recipe(self) -> None:
        """Write `recipe.yaml`, by which exports, reports and the next start go.

        Over that of a run which has begun, only by a training of which nothing is refused any more: its numbers are not
        of the recipe of an `evaluate`.
        """
        write_whole(self.path / "recipe.yaml", self._recipe)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """By its commit record alone: whether its contents are whole is looked at when it is read."""
        from dpo_scale.training.checkpoints import CheckpointError, open_checkpoint

        for path in sorted(self.checkpoints.glob("step-*"), reverse=True):
            with suppress(CheckpointError):
                return open_checkpoint(path)
        return None

    def keep_reference(self, reference: ReferenceFingerprint) -> None:
        """Note in `reference.json` what this run is trained against.

        Raises RecipeError where the folder holds checkpoints of a run against another one: files that were replaced
        under the same path, or another precision, would change the objective in the middle of a run.
        """
        before = read_fingerprint(self.path)
        if before is not None and before.key != reference.key and last_known_commit(self.path) is not None:
            raise RecipeError(
                f"run.output_dir: {self.path} was trained against another reference\n"
                + "\n".join(f"  {line.replace('store', 'this run')}" for line in explain_difference(reference, before))
                + f"\nchoose another folder, or restore the files of {before.source}"
            )
        write_json(self.path / "reference.json", reference.to_json())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_environment(self, world_size: int, device: str, say: Say = locks.logger.warning) -> None:
        """`environment.json`: what this attempt runs on. Says which versions are others than at the last start."""
        path = self.path / "environment.json"
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": package_versions(),
            "commit": _commit(),
            "world_size": world_size,
            "device": device,
            "host": socket.gethostname(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        before, after = {}, _versions(environment)
        with suppress(OSError, ValueError, TypeError, KeyError):  # the first start, or a file that a person changed
            before = _versions(json.loads(path.read_text(encoding="utf-8")))
        names = [name for name, version in after.items() if before.get(name, version) != version]
        if names:
            changed = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in names)
            say(f"Changed since the last start: {changed}")
        write_json(path, environment)


def package_versions() -> dict[str, str]:
    """What a run's numbers depend on."""
    names = ("torch", "transformers", "deepspeed", "accelerate", "safetensors", "dpo_scale")
    return {name: metadata.version(name) for name in names}


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Those in an `environment.json`, by what they are of."""
    commit = {"dpo_scale's commit": environment["commit"][:12]} if environment["commit"] else {}
    return {"Python": environment["python"], **environment["packages"], **commit}


def _commit() -> str | None:
    """The commit of a checkout that the package runs from."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    # Of a checkout that is another user's, git says nothing unless told that it is safe.
    command = ["git", "-c", f"safe.directory={root.resolve()}", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git in this container
        return None
    return found.stdout.strip() or None
