"""What memory and time of a run depend on: the model without its weights, and the lengths of its pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from dpo_scale.console import Console, counted
from dpo_scale.data.layouts import Layout
from dpo_scale.data.planning import CostModel, Costs, Schedule, Work, layout_costs
from dpo_scale.data.token_pairs import Lengths
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.errors import UserError
from dpo_scale.inputs import hoped_layout, prepare_data, schedule_of
from dpo_scale.model.attention import Kernel
from dpo_scale.model.loading import DTYPES, cost_model, load_config, resolve_folder
from dpo_scale.operations.memory import MicroBatchShape
from dpo_scale.operations.memory_trace import MetaModel, build_meta_model, micro_batch_shape
from dpo_scale.recipe import Recipe

TRACED_TOKENS = 4096
"""Of the micro-batch that is run without storage; others are in proportion."""


@dataclass(frozen=True, slots=True)
class AssumedData:
    """Lengths that stand in for data that are not at hand."""

    pairs: int
    prompt_tokens: int
    """Mean of the prompts."""
    completion_tokens: int
    """Mean of the completions, of which a pair has two."""

    def lengths(self, max_length: int) -> Lengths:
        """int64 [pairs, 3]: log-normal, as lengths of text are, cut at `max_length` for a prompt and a completion.

        The same each time: quantiles of the distribution, spread over the pairs by irrational steps.
        """
        step = np.arange(1, self.pairs + 1)
        columns = []
        for mean, spread, irrational in (
            (self.prompt_tokens, 0.8, 2**0.5),
            (self.completion_tokens, 0.7, 3**0.5),
            (self.completion_tokens, 0.7, 5**0.5),
        ):
            normal = np.array([NormalDist().inv_cdf((n + 0.5) / 1000) for n in range(1000)])
            values = np.exp(spread * normal)
            values *= mean / values.mean()
            columns.append(values[(step * irrational % 1 * 1000).astype(np.int64)])
        lengths: Lengths = np.maximum(1, np.rint(np.column_stack(columns))).astype(np.int64)
        lengths[:, 0] = np.minimum(lengths[:, 0], max(1, max_length // 2))
        lengths[:, 1:] = np.minimum(lengths[:, 1:], max_length - lengths[:, :1])
        return lengths

    def __str__(self) -> str:
        return (
            f"{counted(self.pairs, 'pair')}, prompts of {self.prompt_tokens} and completions of "
            f"{counted(self.completion_tokens, 'token')} on average, log-normal: assumed, not read"
        )


@dataclass(frozen=True)
class Workload:
    """The model and the pairs of a run, as far as memory and time depend on them."""

    recipe: Recipe
    meta: MetaModel
    config: Any
    train: Lengths
    evaluate: Lengths
    assumed: AssumedData | None
    rows: Any
    """Where each training pair came from."""

    @property
    def layout(self) -> Layout:
        return hoped_layout(self.recipe)

    @property
    def dtype_bytes(self) -> int:
        return DTYPES[self.recipe.model.dtype].itemsize

    @property
    def cost(self) -> CostModel:
        return cost_model(self.config)

    @cached_property
    def costs(self) -> Costs:
        """Of the training pairs, in the time by which ranks are balanced."""
        return layout_costs(self.train, self.layout, self.cost.in_time())

    @cached_property
    def macs(self) -> Work:
        """Multiply-accumulates of the forward over each training pair."""
        return layout_costs(self.train, self.layout, self.cost).work

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.recipe, len(self.train))

    @property
    def most_pairs_scored(self) -> int:
        """Pairs in the larger of the two reference passes: over the training pairs that a step takes, and held out."""
        schedule = self.schedule
        return max(min(schedule.num_pairs, schedule.num_steps * schedule.global_pairs), len(self.evaluate))

    @property
    def longest_pair(self) -> int:
        """Tokens of the largest pair: no micro-batch can be smaller."""
        return int(self.costs.tokens_alone.max())

    def typical_micro_batch(self, tokens: int) -> Lengths:
        """Training pairs as they come that fill a budget of tokens, int64 [pairs, 3]."""
        order = self.schedule.pairs_of(0)
        fitting = int(np.searchsorted(np.cumsum(self.costs.tokens[order]), tokens, side="right"))
        return self.train[order[: max(1, fitting)]]

    def shape(self, *, checkpointing: bool, training: bool) -> MicroBatchShape:
        """A micro-batch of typical pairs, to be scaled to any number of tokens."""
        sums = self.train[:, 0] + self.train[:, 1:].max(axis=1)
        longest = self.train[int(np.argmax(sums))]
        return micro_batch_shape(
            self.meta,
            self.typical_micro_batch(TRACED_TOKENS),
            self.layout,
            int(longest[1:].max()),
            checkpointing=checkpointing,
            training=training,
        )


def read_workload(recipe: Recipe, assumed: AssumedData | None, console: Console) -> Workload:
    """The workload of a recipe; `assumed` stands in for its data and tokenizer.

    Raises UserError, DataError among them, for what cannot be read.
    """
    settings = recipe.model
    folder = resolve_folder(settings.path, settings.revision, weights=False)
    config = load_config(folder, trust_remote_code=settings.trust_remote_code)
    if assumed is None:
        try:
            data = prepare_data(recipe, OneProcess(), console, weights=False)
        except UserError as error:
            raise type(error)(
                f"{error}\nwithout data or tokenizer at hand: --pairs N --prompt-tokens MEAN --completion-tokens MEAN"
            ) from error
        train, evaluate, rows = data.train.lengths, data.evaluate.lengths, data.train.rows
    else:
        train = assumed.lengths(recipe.data.max_length)
        evaluate, rows = train[:0], [f"assumed pair {number}" for number in range(assumed.pairs)]
    return Workload(recipe, meta_model(recipe, config), config, train, evaluate, assumed, rows)


def meta_model(recipe: Recipe, config: Any) -> MetaModel:
    """The recipe's model on the meta device, with the attention kernel of half precision on a recent GPU."""
    kernel: Kernel = "sdpa" if recipe.model.dtype == "float32" else "varlen"
    return build_meta_model(
        config, DTYPES[recipe.model.dtype], kernel, trust_remote_code=recipe.model.trust_remote_code
    )
