"""Go on where a run was left: the newest valid checkpoint, put into the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_scale.console import BYTES, Console
from dpo_scale.distributed import engine_state
from dpo_scale.distributed.lockstep import Ranks, by_main
from dpo_scale.errors import UserError
from dpo_scale.recipe import Recipe
from dpo_scale.training.checkpoints import CUT_SHORT, Checkpoint, RunState, find_checkpoint
from dpo_scale.training.run_folder import refuse_another_run, refuse_lost_checkpoints
from dpo_scale.training.stored_state import StoredState, check_fits


def resume(recipe: Recipe, ranks: Ranks, console: Console, engine: Any, trajectory: Mapping[str, Any]) -> RunState:
    """Put the checkpoint to go on from into the engine and return its state; a fresh state where there is none.

    Collective. Raises UserError for a checkpoint of another run, naming what differs.
    """
    found = _find(recipe, ranks, console)
    if found is None:
        return RunState()
    refuse_another_run(found, trajectory)
    snapshot = engine_state.snapshot(engine)
    check_fits(found, snapshot.parameters)
    with (
        StoredState(found) as stored,
        console.progress("Restoring the checkpoint", snapshot.stored_bytes, BYTES) as bar,
    ):
        engine_state.restore(engine, stored.watched(bar.advance), stored.buffers(), found.commit.counters)
        stored.restore_random_state(ranks)
    console.say(f"Resuming from {found.path}")
    before = found.commit.run
    return replace(before, resumes=before.resumes + 1, origin=_origin(recipe.run.resume) or before.origin)


def _origin(named: str) -> str:
    """The checkpoint that run.resume names, by a path that is always the same; empty if it names none."""
    return "" if named in ("auto", "never") else str(Path(named).resolve())


def _find(recipe: Recipe, ranks: Ranks, console: Console) -> Checkpoint | None:
    """The checkpoint that the recipe asks for; of one named by path, the newest that went on from it in this folder."""
    folder, named = Path(recipe.run.output_dir) / "checkpoints", recipe.run.resume
    if origin := _origin(named):
        newest, _ = find_checkpoint(folder, "auto", ranks, origin=origin)
        if newest is not None:
            return newest  # else each preemption would send the run back
    with console.progress("Verifying checkpoints", None):
        found, passed_over = find_checkpoint(folder, named, ranks)
    for line in passed_over:
        console.say(f"Passed over {line}")
    if found is None and any(CUT_SHORT not in line for line in passed_over):
        raise UserError(
            f"{folder}: no checkpoint is whole, and starting anew would overwrite what is left of this run; "
            "restore one, or move the folder away"
        )
    if found is None and named == "auto":
        by_main(ranks, lambda: refuse_lost_checkpoints(folder.parent))
    return found
