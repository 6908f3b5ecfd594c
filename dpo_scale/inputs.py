"""Data in tokens, checked against the model's configuration: what every stage needs before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout
from dpo_scale.data.planning import CostModel, Costs, Indices, Schedule, check_budget, layout_costs
from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.data.report import DataReport, overlap
from dpo_scale.data.samples import sample_pairs
from dpo_scale.data.sources import HELD_OUT_SEED
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.lockstep import Ranks, once_a_machine
from dpo_scale.errors import DataError
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

    def costs(self, pairs: TokenPairs, layout: Layout) -> Costs:
        """What ranks are balanced by: the time that each of some pairs takes."""
        return layout_costs(pairs.lengths, layout, self.cost.in_time())

    def forward_macs(self, pairs: Indices, layout: Layout) -> float:
        """Multiply-accumulates of the forward pass over these training pairs."""
        return float(layout_costs(self.train.lengths[pairs], layout, self.cost).work.sum())


def hoped_layout(recipe: Recipe) -> Layout:
    """The layout before a model has been tried: `auto` begins with shared."""
    return "shared" if recipe.batch.layout == "auto" else recipe.batch.layout


def check_budgets(recipe: Recipe, data: Data, layout: Layout) -> None:
    """Raise DataError for a training or held-out pair that takes more than `batch.rank_tokens` by itself."""
    for pairs in (data.train, data.evaluate):
        check_budget(data.costs(pairs, layout), recipe.batch.rank_tokens, pairs.rows, "batch.rank_tokens")


def agreed_digest(data: Data, ranks: Ranks) -> str:
    """Digest of the training pairs. Collective.

    Raises DataError on all ranks where a machine has other pairs than the main one: what its ranks score would be
    stored under the keys of pairs that they never saw.
    """
    own: list[tuple[str, str]] = []
    ranks.on_local_mains(lambda: own.append((data.train.digest(), data.evaluate.digest())))
    found = ranks.gather_objects(own)
    ((first, held_out),) = found[0]
    differing = [rank for rank, digests in enumerate(found) for digest in digests if digest != (first, held_out)]
    if differing:
        setting = "data.train" if any(found[rank][0][0] != first for rank in differing) else "data.evaluate"
        raise DataError(
            f"{setting}: the machine{'s' * (len(differing) > 1)} of rank {', '.join(map(str, differing))} "
            "read other pairs than that of rank 0; give all machines the same files and tokenizer"
        )
    return first


def schedule_of(recipe: Recipe, num_pairs: int) -> Schedule:
    """The steps of a run on that many training pairs."""
    run = recipe.run
    return Schedule(num_pairs, recipe.batch.global_pairs, run.seed, run.epochs, run.max_steps)


def prepare_data(
    recipe: Recipe,
    ranks: Ranks,
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

    def prepare(name: str, setting: str, sources: list[DataSource], seed: int) -> tuple[TokenPairs, DataReport | None]:
        if not sources:
            return TokenPairs.from_pairs([]), None
        with console.progress(f"Tokenizing {name} pairs", None, "rows") as bar:

            def progress(rows: int) -> None:
                bar.advance(rows)
                if between_blocks is not None:
                    between_blocks()

            return prepare_pairs(sources, recipe.data, tokenizer, seed=seed, setting=setting, progress=progress)

    train, train_report = once_a_machine(
        ranks, lambda: prepare("training", "data.train", recipe.data.train, recipe.run.seed)
    )
    evaluate, evaluate_report = once_a_machine(
        ranks, lambda: prepare("held-out", "data.evaluate", recipe.data.evaluate, HELD_OUT_SEED)
    )
    largest = max(train.largest_token_id, evaluate.largest_token_id)
    check_vocabulary(largest, config, "model.tokenizer" if settings.tokenizer else "model.path")
    report: dict[str, Any] = {}
    if console.is_main:  # the only one that writes and shows it
        for name, pairs, data_report in (("train", train, train_report), ("evaluate", evaluate, evaluate_report)):
            if data_report is not None:
                samples = sample_pairs(pairs, tokenizer, seed=recipe.run.seed)
                report[name] = {**data_report.to_json(), "samples": [asdict(sample) for sample in samples]}
                for table in data_report.tables("Training data" if name == "train" else "Held-out data"):
                    console.show(table)
        if len(evaluate):
            report["evaluate"]["digest"] = evaluate.short_digest()
            both = overlap(train, evaluate)
            report["overlap"] = asdict(both)
            console.say(both.describe(len(evaluate)))
    sequences = [pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1) for pairs in (train, evaluate)]
    longest = int(np.concatenate(sequences).max(initial=0))
    made_for = getattr(config.get_text_config(), "max_position_embeddings", None)
    if made_for and longest > made_for:
        console.say(
            f"The longest sequence has {longest:,} tokens, the model was made for {made_for:,} "
            f"(max_position_embeddings); data.max_length: {made_for} would drop or cut what is longer"
        )
    return Data(train, evaluate, tokenizer, _pad_id(tokenizer, config), folder, config, report)


def _pad_id(tokenizer: Any, config: Any) -> int:
    """Any id will do, no padding is looked at; but many a tokenizer's own is none that the model embeds."""
    pad_id = tokenizer.pad_token_id or 0
    return pad_id if pad_id < config.get_text_config().vocab_size else 0
