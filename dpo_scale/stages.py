"""The stages that run under `accelerate launch`, each from a recipe to an exit code."""

from __future__ import annotations

from pathlib import Path

from dpo_scale.console import Console
from dpo_scale.distributed import runtime
from dpo_scale.errors import UserError
from dpo_scale.inputs import prepare_data
from dpo_scale.operations.conclusion import conclude
from dpo_scale.recipe import Recipe
from dpo_scale.reference.session import Reference
from dpo_scale.training import loop
from dpo_scale.training.run_folder import RunFolder, flatten


def train(recipe: Recipe, console: Console) -> int:
    """Reference scoring, training, evaluation, export."""
    started = runtime.start(recipe)
    folder = _take_folder(recipe, started.ranks, console)
    settings = {name: str(value) for name, value in flatten(recipe).items()}
    output = Path(recipe.run.output_dir)
    # By itself wandb would write into the current folder, and invent a name.
    named = {"wandb": {"dir": str(output), "name": output.name}}
    started.accelerator.init_trackers("dpo_scale", settings, init_kwargs=named)
    code = loop.train(recipe, started, console, folder)
    started.accelerator.end_training()
    if folder is not None:
        conclude(folder.path, console)
    return code


def score(recipe: Recipe, console: Console) -> int:
    """Reference log-probs of training and held-out pairs, into the store; resumable."""
    started = runtime.start(recipe)
    data = prepare_data(recipe, started.ranks, console)
    reference = Reference(recipe, started, data, console)
    reference.score_all(reference.rows(data.train), reference.rows(data.evaluate))
    console.say(f"Done: {reference.rows_computed:,} rows scored, in {reference.store.folder}")
    return 0


def evaluate(recipe: Recipe, console: Console) -> int:
    """Held-out metrics of the run's newest checkpoint, or of model.path where there is none."""
    started = runtime.start(recipe)
    if not recipe.data.evaluate:
        raise UserError("data.evaluate: no held-out data to evaluate on")
    loop.evaluate_only(recipe, started, console, _take_folder(recipe, started.ranks, console))
    return 0


def _take_folder(recipe: Recipe, ranks: runtime.Ranks, console: Console) -> RunFolder | None:
    """The run's folder, held by the main rank; what is wrong with it is raised on every rank."""
    folder, mistake = None, None
    if ranks.is_main:
        try:
            folder = RunFolder(recipe)
            for change in folder.harmless_changes:
                console.say(f"Changed since the last start: {change}")
        except UserError as error:
            mistake = error
    mistake = ranks.broadcast_object(mistake)
    if mistake is not None:
        raise mistake
    return folder
