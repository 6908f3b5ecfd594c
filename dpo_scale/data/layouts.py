"""Token ids -> one micro-batch of tensors, in one of three layouts.

shared: a prompt and all its completions in one stretch of a single row, `prompt chosen rejected`; the prompt is
        computed once, positions restart after it for each completion, stretches follow each other without padding.
packed: `prompt chosen prompt rejected` in a single row without padding.
padded: one right-padded row a sequence: the plain form, the oracle of the other two and the last resort.

The last token of a sequence predicts nothing, so the first two leave it out of the input.

Shape suffixes: B rows, T tokens of a row, S sequences, C completion tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.token_pairs import TokenIds, TokenPair

Layout = Literal["shared", "packed", "padded"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device, for which the host does not wait: to a GPU, only pinned memory is copied meanwhile."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class PromptCompletions:
    """A prompt with the completions that are scored after it; a preference pair has two, chosen first."""

    prompt: TokenIds
    completions: tuple[TokenIds, ...]

    @classmethod
    def of_pair(cls, pair: TokenPair) -> PromptCompletions:
        return cls(pair.prompt, (pair.chosen, pair.rejected))


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries [start, stop) of the row attend to keys [prefix_start, prefix_stop) and, causally, to their own."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.stop - self.start + self.prefix_stop - self.prefix_start


@dataclass(frozen=True)
class Segments:
    """How attention runs over the single row of the shared and packed layouts.

    Causal masks are aligned to the bottom right: the last query sees every key of its segment.
    """

    segments: tuple[Segment, ...]
    cu_queries: Tensor
    """int32 [segments + 1], cumulative numbers of queries."""
    cu_keys: Tensor
    """int32 [segments + 1], cumulative numbers of keys."""
    key_index: Tensor | None
    """int64 [keys], the row position of each key, segment by segment; None where keys are the row itself."""
    read: Tensor | None = None
    """int64 [positions], those of the row whose output predicts a completion token, in order; None means all."""
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Masks that a kernel made of the segments, kept for the layers that follow."""

    @cached_property
    def max_queries(self) -> int:
        return max(segment.num_queries for segment in self.segments)

    @cached_property
    def max_keys(self) -> int:
        return max(segment.num_keys for segment in self.segments)

    @classmethod
    def build(cls, segments: Sequence[Segment], read: np.ndarray | None = None) -> Segments:
        queries = np.cumsum([0] + [segment.num_queries for segment in segments])
        keys = np.cumsum([0] + [segment.num_keys for segment in segments])
        shares = any(segment.prefix_stop > segment.prefix_start for segment in segments)
        index = np.concatenate(
            [np.r_[segment.prefix_start : segment.prefix_stop, segment.start : segment.stop] for segment in segments]
        )
        return cls(
            segments=tuple(segments),
            cu_queries=torch.from_numpy(queries.astype(np.int32)),
            cu_keys=torch.from_numpy(keys.astype(np.int32)),
            key_index=torch.from_numpy(index.astype(np.int64)) if shares else None,
            read=None if read is None else torch.from_numpy(read.astype(np.int64)),
        )

    def to(self, device: torch.device | str) -> Segments:
        return replace(
            self,
            cu_queries=to_device(self.cu_queries, device),
            cu_keys=to_device(self.cu_keys, device),
            key_index=None if self.key_index is None else to_device(self.key_index, device),
            read=None if self.read is None else to_device(self.read, device),
            masks={},
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences on their way through the model; those of a prompt follow each other in order."""

    input_ids: Tensor
    """int64 [B, T]."""
    position_ids: Tensor
    """int64 [B, T]."""
    attention_mask: Tensor | None
    """int64 [B, T], 1 for tokens and 0 for padding; None in the layouts without padding."""
    segments: Segments | None
    """Attention of the single row of the shared and packed layouts; None in the padded one."""
    predictors: Tensor
    """int64 [C], positions in the flattened input whose output predicts a completion token."""
    targets: Tensor
    """int64 [C], the completion tokens."""
    sequence_of_target: Tensor
    """int64 [C], the sequence, counted from 0, that each target belongs to."""
    lengths: Tensor
    """int64 [S], completion tokens of each sequence."""

    def to(self, device: torch.device | str) -> MicroBatch:
        moved: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = to_device(value, device)
            elif isinstance(value, Segments):
                moved[name] = value.to(device)
        return replace(self, **moved)


def collate(groups: Sequence[PromptCompletions], layout: Layout, pad_id: int = 0) -> MicroBatch:
    """Lay out prompts and completions as one micro-batch on the CPU.

    Every prompt must hold at least one token: the first completion token is predicted from it.
    """
    assert groups, "a micro-batch needs at least one prompt"
    assert all(len(group.prompt) for group in groups), "a prompt without tokens predicts nothing"
    if layout == "padded":
        return _collate_padded(groups, pad_id)
    return _collate_row(groups, share_prompts=layout == "shared")


def _collate_row(groups: Sequence[PromptCompletions], *, share_prompts: bool) -> MicroBatch:
    inputs: list[TokenIds] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    predictors: list[np.ndarray] = []
    end = 0
    for group in groups:
        num_prompt = len(group.prompt)
        prompt_start = end
        for n, completion in enumerate(group.completions):
            num_own = max(0, len(completion) - 1)
            start = end
            if n == 0 or not share_prompts:  # this stretch carries the prompt itself
                prompt_start = start
                inputs.append(group.prompt)
                positions.append(np.arange(num_prompt + num_own))
                end = start + num_prompt + num_own
                segments.append(Segment(start, end))
                own_start = start + num_prompt
            else:
                positions.append(np.arange(num_prompt, num_prompt + num_own))
                end = start + num_own
                if num_own:
                    prompt_stop = prompt_start + num_prompt
                    segments.append(Segment(start, end, prompt_start, prompt_stop))
                own_start = start
            inputs.append(completion[:num_own])
            if len(completion):
                last_of_prompt = prompt_start + num_prompt - 1
                predictors.append(np.r_[last_of_prompt, own_start : own_start + num_own])
    targets, sequence_of_target, lengths = _targets(groups)
    read = np.unique(np.concatenate(predictors)) if predictors else None
    return MicroBatch(
        input_ids=_int64(inputs)[None],
        position_ids=_int64(positions)[None],
        attention_mask=None,
        segments=Segments.build(segments, read),
        predictors=_int64(predictors),
        targets=targets,
        sequence_of_target=sequence_of_target,
        lengths=lengths,
    )


def _collate_padded(groups: Sequence[PromptCompletions], pad_id: int) -> MicroBatch:
    sequences = [
        (len(group.prompt), np.concatenate([group.prompt, completion]))
        for group in groups
        for completion in group.completions
    ]
    width = max(len(tokens) for _, tokens in sequences)
    input_ids = np.full((len(sequences), width), pad_id, np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    predictors = []
    for row, (num_prompt, tokens) in enumerate(sequences):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        predictors.append(row * width + np.arange(num_prompt - 1, len(tokens) - 1))
    targets, sequence_of_target, lengths = _targets(groups)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).expand(len(sequences), width).contiguous(),
        attention_mask=torch.from_numpy(mask),
        segments=None,
        predictors=_int64(predictors),
        targets=targets,
        sequence_of_target=sequence_of_target,
        lengths=lengths,
    )


def _targets(groups: Sequence[PromptCompletions]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [C], the sequence of each [C] and completion lengths [S]."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    return _int64(completions), torch.arange(len(lengths)).repeat_interleave(lengths), lengths


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))
