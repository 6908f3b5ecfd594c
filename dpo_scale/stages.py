"""The stages that run under `accelerate launch`, each from a recipe to an exit code."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dpo_scale.console import Console, counted
from dpo_scale.distributed import runtime
from dpo_scale.distributed.lockstep import by_main
from dpo_scale.errors import UserError
from dpo_scale.inputs import agreed_digest, prepare_data
from dpo_scale.operations.conclusion import conclude
from dpo_scale.recipe import Recipe
from dpo_scale.reference.session import Reference
from dpo_scale.training import loop
from dpo_scale.training.interruption import (
    Interruption,
    StopRequestedError,
    heed,
    reason_of_any,
    unless_stopped,
)
from dpo_scale.training.run_folder import RunFolder, take_lock
from dpo_scale.training.status import UNFINISHED, StatusFile
from dpo_scale.watch import Watch


def train(recipe: Recipe, console: Console, watch: Watch) -> int:
    """Reference scoring, training, evaluation, export."""
    started = runtime.start(recipe, console.say)
    watch.outlive_launcher()
    if recipe.loss.doubt:
        console.say(recipe.loss.doubt)
    folder = _take_folder(recipe, started.ranks, console)
    status = folder.open_status() if folder else StatusFile(None, "train")
    code = loop.train(recipe, started, console, folder, status, watch)
    watch.rest()
    if folder is not None:
        conclude(folder.path, console)
    started.ranks.barrier()  # after a stop, a rank that leaves takes the launch down, the main one too
    watch.close()
    started.accelerator.end_training()
    return code


def score(recipe: Recipe, console: Console, watch: Watch) -> int:
    """Reference log-probs of training and held-out pairs, into the store; resumable."""
    started = runtime.start(recipe, console.say)
    watch.outlive_launcher()
    run = Path(recipe.run.output_dir)
    lock = by_main(started.ranks, lambda: take_lock(run / ".score.lock", console.say))
    status = StatusFile(run if started.ranks.is_main else None, "score", lock)
    status.enter("preparing data")
    interruption = Interruption(run, None, watch.started)

    def between_batches() -> None:
        watch.moved("a micro-batch of scoring")
        status.go_on()
        heed(interruption, started.ranks)

    reference = None
    try:
        data = unless_stopped(partial(prepare_data, recipe, started.ranks, console), interruption, started.ranks)
        agreed_digest(data, started.ranks)
        status.enter("scoring")
        reference = Reference(recipe, started, data, console, between_batches)
        reference.score_all(reference.train_rows, reference.evaluate_rows)
    except StopRequestedError:
        if reference is not None:
            reference.release()
        reason = reason_of_any(interruption, started.ranks)
        status.stop(reason)
        console.say(f"Stopped by {reason}; what was scored is kept, and the same command goes on")
        interruption.consume_file()
        started.ranks.barrier()  # a rank that leaves takes the launch down, the main one too
        return UNFINISHED
    status.finish()
    interruption.consume_file()  # made too late to be heard
    console.say(f"Done: {counted(reference.rows_computed, 'row')} scored, in {reference.store.folder}")
    if lock is not None:
        lock.close()
    return 0


def evaluate(recipe: Recipe, console: Console, watch: Watch) -> int:
    """Held-out metrics of the run's newest checkpoint, or of model.path where there is none.

    It changes no checkpoint and listens for no request to stop: it ends with its launcher. Raises UserError where
    data.evaluate names nothing.
    """
    started = runtime.start(recipe, console.say)
    if not recipe.data.evaluate:
        raise UserError("no held-out data to evaluate on: name files in data.evaluate")
    loop.evaluate_only(recipe, started, console, _take_folder(recipe, started.ranks, console), watch)
    return 0


def _take_folder(recipe: Recipe, ranks: runtime.Ranks, console: Console) -> RunFolder | None:
    """The run's folder, held by the main rank; what is wrong with it is raised on every rank."""
    folder = by_main(ranks, lambda: RunFolder(recipe, console.say))
    for change in folder.harmless_changes if folder is not None else ():
        console.say(f"Changed since the last start: {change}")
    return folder
