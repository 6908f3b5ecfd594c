"""Data in tokens, checked against the model's configuration: what every stage needs before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dpo_scale.console import Console
from dpo_scale.data.planning import CostModel
from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.data.report import DataReport, overlap
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.errors import UserError
from dpo_scale.model.loading import check_vocabulary, cost_model, load_config, resolve_folder
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSource, Recipe

T = TypeVar("T")


class Ranks(Protocol):
    """What set-up needs of the ranks."""

    @property
    def is_local_main(self) -> bool: ...
    def gather_objects(self, value: T) -> list[T]: ...


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


def prepare_data(recipe: Recipe, ranks: Ranks, console: Console) -> Data:
    """Resolve the model, read and tokenize the data once a machine, and check what can be checked without weights."""
    settings = recipe.model
    folder = once_a_machine(ranks, lambda: resolve_folder(settings.path, settings.revision))
    config = load_config(folder, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(
        settings.tokenizer or str(folder), trust_remote_code=settings.trust_remote_code
    )

    def prepare(sources: list[DataSource]) -> tuple[TokenPairs, DataReport | None]:
        if not sources:
            return TokenPairs.from_pairs([]), None
        return prepare_pairs(sources, recipe.data, tokenizer, seed=recipe.run.seed)

    train, train_report = once_a_machine(ranks, lambda: prepare(recipe.data.train))
    evaluate, evaluate_report = once_a_machine(ranks, lambda: prepare(recipe.data.evaluate))
    largest = max(train.largest_token_id, evaluate.largest_token_id)
    check_vocabulary(largest, config, "model.tokenizer" if settings.tokenizer else "model.path")
    report: dict[str, Any] = {}
    for name, held in (("train", train_report), ("evaluate", evaluate_report)):
        if held is not None:
            report[name] = held.to_json()
            console.show(held.table(name))
    if len(evaluate):
        both = overlap(train, evaluate)
        report["overlap"] = {name: getattr(both, name) for name in both.__slots__}
    pad_id = tokenizer.pad_token_id
    return Data(train, evaluate, tokenizer, pad_id or 0, folder, config, report)


def once_a_machine(ranks: Ranks, action: Callable[[], T]) -> T:
    """The result of an action that fills a cache: first on one rank of every machine, then on the others.

    A mistake that one rank finds is raised on all of them.
    """
    results: list[T] = []
    for turn_of_local_main in (True, False):
        mistake = None
        if ranks.is_local_main == turn_of_local_main:
            try:
                results.append(action())
            except UserError as error:
                mistake = error
        found = [other for other in ranks.gather_objects(mistake) if other is not None]
        if found:
            raise found[0]
    return results[0]
