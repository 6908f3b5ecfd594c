"""Data in tokens, checked against the model's configuration: what every stage needs before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout
from dpo_scale.data.planning import CostModel, Indices, Schedule, layout_costs
from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.data.report import DataReport, overlap
from dpo_scale.data.samples import sample_pairs
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import MachineRanks, once_a_machine
from dpo_scale.model.loading import check_vocabulary, cost_model, load_config, resolve_folder
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSource, Recipe


@dataclass(frozen=True)
class Data:
    """Training and held-out pairs in tokens, and the models they were checked against."""

    train: TokenPairs
    evaluate: TokenPairs
    tokenizer: Any
    pad_id: int
    model_folder: Path
    model_config: Any
    report: dict[str, Any]

    @property
    def cost(self) -> CostModel:
        return cost_model(self.model_config)

    def forward_macs(self, pairs: Indices, layout: Layout) -> float:
        """Multiply-accumulates of the forward pass over these training pairs."""
        return float(layout_costs(self.train.lengths[pairs], layout, self.cost).work.sum())


def schedule_of(recipe: Recipe, num_pairs: int) -> Schedule:
    """The steps of a run on that many training pairs."""
    run = recipe.run
    return Schedule(num_pairs, recipe.batch.global_pairs, run.seed, run.epochs, run.max_steps)


def prepare_data(
    recipe: Recipe,
    ranks: MachineRanks,
    console: Console,
    between_blocks: Callable[[], None] | None = None,
    *,
    weights: bool = True,
) -> Data:
    """Resolve the model, read and tokenize the data once a machine, and check what can be checked without weights.

    Args:
        between_blocks: called after each block of rows that is tokenized; a UserError from it ends the work on all
            ranks.
        weights: whether those of a hub model are fetched, for a run that follows.
    """
    settings = recipe.model
    folder = once_a_machine(ranks, lambda: resolve_folder(settings.path, settings.revision, weights=weights))
    config = load_config(folder, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(settings.tokenizer or str(folder), trust_remote_code=settings.trust_remote_code)

    def prepare(name: str, setting: str, sources: list[DataSource]) -> tuple[TokenPairs, DataReport | None]:
        if not sources:
            return TokenPairs.from_pairs([]), None
        with console.progress(f"Tokenizing {name} pairs", None, "rows") as bar:

            def progress(rows: int) -> None:
                bar.advance(rows)
                if between_blocks is not None:
                    between_blocks()

            return prepare_pairs(
                sources, recipe.data, tokenizer, seed=recipe.run.seed, setting=setting, progress=progress
            )

    train, train_report = once_a_machine(ranks, lambda: prepare("training", "data.train", recipe.data.train))
    evaluate, evaluate_report = once_a_machine(
        ranks, lambda: prepare("held-out", "data.evaluate", recipe.data.evaluate)
    )
    largest = max(train.largest_token_id, evaluate.largest_token_id)
    check_vocabulary(largest, config, "model.tokenizer" if settings.tokenizer else "model.path")
    report: dict[str, Any] = {}
    if console.is_main:  # the only one that writes and shows it
        for name, pairs, held in (("train", train, train_report), ("evaluate", evaluate, evaluate_report)):
            if held is not None:
                samples = sample_pairs(pairs, tokenizer, seed=recipe.run.seed)
                report[name] = {**held.to_json(), "samples": [sample.to_json() for sample in samples]}
                for table in held.tables("Training data" if name == "train" else "Held-out data"):
                    console.show(table)
        if len(evaluate):
            both = overlap(train, evaluate)
            report["overlap"] = asdict(both)
            console.say(both.describe(len(evaluate)))
    pad_id = tokenizer.pad_token_id
    return Data(train, evaluate, tokenizer, pad_id or 0, folder, config, report)
