"""`dpo-scale check`: everything that can be wrong before weights are loaded."""

from __future__ import annotations

from pathlib import Path

from dpo_scale.console import Console
from dpo_scale.data.planning import Schedule, check_budget, layout_costs
from dpo_scale.data.samples import sample_pairs, show
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.inputs import prepare_data
from dpo_scale.model.loading import load_config, resolve_folder
from dpo_scale.recipe import Recipe
from dpo_scale.reference.fingerprint import weight_files


def check(recipe: Recipe) -> None:
    """Read the data, the tokenizer and both models' configurations, and say what a run would do.

    Raises UserError for the first stage that finds mistakes, listing all that it finds.
    """
    console = Console()
    data = prepare_data(recipe, OneProcess(), console)
    console.show(show(sample_pairs(data.train, data.tokenizer, seed=recipe.run.seed)))
    weight_files(data.model_folder)
    reference = resolve_folder(recipe.reference_path, recipe.reference_revision, "reference.path")
    load_config(reference, trust_remote_code=recipe.model.trust_remote_code, setting="reference.path")
    weight_files(reference)
    layout = "shared" if recipe.batch.layout == "auto" else recipe.batch.layout
    for pairs in (data.train, data.evaluate):
        costs = layout_costs(pairs.lengths, layout, data.cost)
        check_budget(costs, recipe.batch.rank_tokens, pairs.rows, "batch.rank_tokens")
    schedule = Schedule(
        len(data.train),
        recipe.batch.global_pairs,
        recipe.run.seed,
        recipe.run.epochs,
        recipe.run.max_steps,
    )
    console.say(
        f"{len(data.train):,} training pairs, {len(data.evaluate):,} held out, {schedule.num_steps:,} steps of "
        f"{recipe.batch.global_pairs} pairs; results go to {Path(recipe.run.output_dir)}"
    )
    console.say("Nothing is wrong with this recipe")
