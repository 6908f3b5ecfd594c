"""What a micro-batch says: tokens, positions, who attends to whom, which outputs predict which completion tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.data.token_pairs import TokenPair

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def _ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


PAIRS = [
    PromptCompletions(_ids(10, 11), (_ids(20, 21, 22), _ids(30, 31))),
    PromptCompletions(_ids(12), (_ids(23), _ids(32, 33))),
]


def test_the_shared_layout_by_hand() -> None:
    batch = collate(PAIRS, "shared")
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 12, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4, 5, 5, 6]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 23, 32, 33]
    assert batch.sequence_of_target.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 2, 1, 2]
    assert batch.attention_mask is None
    segments = batch.segments
    assert segments is not None
    assert segments.cu_queries.tolist() == [0, 4, 5, 6, 7]
    assert segments.cu_keys.tolist() == [0, 4, 7, 8, 10]
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 5, 6]
    assert (segments.max_queries, segments.max_keys) == (4, 4)


def test_the_packed_layout_by_hand() -> None:
    batch = collate(PAIRS, "packed")
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 10, 11, 30, 12, 12, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]]
    assert batch.predictors.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    segments = batch.segments
    assert segments is not None
    assert segments.cu_queries.tolist() == segments.cu_keys.tolist() == [0, 4, 7, 8, 10]
    assert segments.key_index is None


def test_the_padded_layout_by_hand() -> None:
    batch = collate(PAIRS, "padded", pad_id=99)
    assert batch.input_ids.tolist() == [
        [10, 11, 20, 21, 22],
        [10, 11, 30, 31, 99],
        [12, 23, 99, 99, 99],
        [12, 32, 33, 99, 99],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [5, 4, 2, 3]
    assert batch.predictors.tolist() == [1, 2, 3, 6, 7, 10, 15, 16]
    assert batch.segments is None


token_ids = st.lists(st.integers(3, 1000), max_size=9).map(lambda tokens: np.array(tokens, np.int32))
prompts = st.lists(st.integers(3, 1000), min_size=1, max_size=9).map(lambda tokens: np.array(tokens, np.int32))
groups_of = st.lists(
    st.tuples(prompts, st.lists(token_ids, min_size=1, max_size=3)).map(
        lambda both: PromptCompletions(both[0], tuple(both[1]))
    ),
    min_size=1,
    max_size=4,
)


def _context(batch: MicroBatch, at: int) -> list[tuple[int, int]]:
    """(position, token) of everything that the output at a flattened place may depend on, from masks or segments."""
    width = batch.input_ids.shape[1]
    row, column = divmod(at, width)
    if batch.segments is None:
        assert batch.attention_mask is not None
        seen = [k for k in range(column + 1) if batch.attention_mask[row, k]]
    else:
        (segment,) = [s for s in batch.segments.segments if s.start <= column < s.stop]
        seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, column + 1)]
    return [(int(batch.position_ids[row, k]), int(batch.input_ids[row, k])) for k in seen]


@settings(max_examples=80, deadline=None)
@given(groups_of, st.sampled_from(LAYOUTS))
def test_each_completion_token_is_predicted_from_exactly_what_comes_before_it(
    groups: list[PromptCompletions], layout: Layout
) -> None:
    batch = collate(groups, layout, pad_id=0)
    sequences = [(list(g.prompt), list(completion)) for g in groups for completion in g.completions]
    assert batch.lengths.tolist() == [len(completion) for _, completion in sequences]
    expected = [
        (number, completion[n], list(enumerate([*prompt, *completion[:n]])))
        for number, (prompt, completion) in enumerate(sequences)
        for n in range(len(completion))
    ]
    actual = [
        (int(sequence), int(target), _context(batch, int(at)))
        for sequence, target, at in zip(batch.sequence_of_target, batch.targets, batch.predictors, strict=True)
    ]
    assert actual == expected


@settings(max_examples=80, deadline=None)
@given(groups_of, st.sampled_from(["shared", "packed"]))
def test_segments_tile_the_row_and_its_kernel_form_says_the_same(
    groups: list[PromptCompletions], layout: Layout
) -> None:
    batch = collate(groups, layout)
    segments = batch.segments
    assert segments is not None
    bounds = [bound for s in segments.segments for bound in (s.start, s.stop)]
    assert bounds[0] == 0
    assert bounds[-1] == batch.input_ids.shape[1]
    assert bounds[1:-1:2] == bounds[2::2]
    keys = [[*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)] for s in segments.segments]
    assert segments.cu_queries.diff().tolist() == [s.stop - s.start for s in segments.segments]
    assert segments.cu_keys.diff().tolist() == [len(k) for k in keys]
    flat = [key for part in keys for key in part]
    assert flat == (list(range(bounds[-1])) if segments.key_index is None else segments.key_index.tolist())
    assert segments.cu_queries.dtype == segments.cu_keys.dtype == torch.int32


def test_last_tokens_are_left_out_of_rows_and_prompts_stand_once() -> None:
    prompt, chosen, rejected = np.arange(3, 103), np.arange(50), np.arange(20)
    group = PromptCompletions(prompt.astype(np.int32), (chosen.astype(np.int32), rejected.astype(np.int32)))
    assert collate([group], "shared").input_ids.numel() == 100 + 49 + 19
    assert collate([group], "packed").input_ids.numel() == 2 * 100 + 49 + 19
    assert collate([group], "padded").input_ids.numel() == 2 * 150


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_moves_every_tensor(layout: Layout) -> None:
    batch = collate(PAIRS, layout).to("meta")
    tensors = [batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.lengths]
    tensors.append(batch.sequence_of_target)
    if batch.attention_mask is not None:
        tensors.append(batch.attention_mask)
    if batch.segments is not None:
        tensors += [batch.segments.cu_queries, batch.segments.cu_keys]
        assert batch.segments.key_index is None or isinstance(batch.segments.key_index, Tensor)
        assert batch.segments.key_index is None or batch.segments.key_index.is_meta
        assert batch.segments.read is not None
        tensors.append(batch.segments.read)
        assert batch.segments.max_queries > 0
    assert all(tensor.is_meta for tensor in tensors)


def test_a_pairs_completions_are_chosen_then_rejected() -> None:
    pair = TokenPair(_ids(1), _ids(2), _ids(3), "row")
    group = PromptCompletions.of_pair(pair)
    assert [completion.tolist() for completion in group.completions] == [[2], [3]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_without_tokens_fails(layout: Layout) -> None:
    with pytest.raises(AssertionError, match="a prompt without tokens predicts nothing"):
        collate([PromptCompletions(_ids(), (_ids(1), _ids(2)))], layout)
    with pytest.raises(AssertionError, match="at least one prompt"):
        collate([], layout)
