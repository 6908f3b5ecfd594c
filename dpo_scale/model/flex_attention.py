"""FlexAttention over a row of segments: a query sees its segment's prefix and, causally, its own segment.

Shape suffixes as in `attention`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_scale.data.layouts import Segments, to_device

BLOCK_SIZE = 128
"""Queries, and keys, that a block of the mask spans; what FlexAttention's kernels expect."""


def flex_segment_attention(
    query_BNTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    segments: Segments,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one row by segments, [1, T, N, D]; the arguments are those of `attention.segment_attention`."""
    if sliding_window not in segments.masks:
        segments.masks[sliding_window] = _block_mask(segments, sliding_window, query_BNTD.device)

    # On the device: torch 2.11 cannot compile a backward pass around a number that is the closure's own.
    cap = torch.full((), softcap or 1.0, device=query_BNTD.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    run = _compiled_flex_attention() if query_BNTD.device.type == "cuda" else flex_attention
    output = run(
        query_BNTD,
        key_BGTD,
        value_BGTD,
        score_mod=capped if softcap else None,
        block_mask=segments.masks[sliding_window],
        scale=scale,
        enable_gqa=query_BNTD.shape[1] != key_BGTD.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


def _block_mask(segments: Segments, sliding_window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of the row.

    torch's own `create_block_mask` looks at every query and key: gigabytes at 16,384 tokens. Of segments the same
    blocks follow from where each query's keys begin and end.
    """
    spans_4T = _key_spans(segments, sliding_window)
    partial_KK, full_KK = to_device(torch.stack(_blocks(spans_4T)), device)
    prefix_start, prefix_stop, own_start, own_stop = to_device(spans_4T, device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= own_start[q]) & (k < own_stop[q])
        prefix = (k >= prefix_start[q]) & (k < prefix_stop[q])
        seen: Tensor = own | prefix
        return seen

    length = spans_4T.shape[1]
    return BlockMask.from_kv_blocks(
        *_ordered(partial_KK),
        *_ordered(full_KK),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _key_spans(segments: Segments, sliding_window: int | None) -> Tensor:
    """Where each query's keys begin and end in the row: its prefix's, then its own; int64 [4, T]."""
    ends = [(s.start, s.prefix_start, s.prefix_stop) for s in segments.segments]
    num_queries = torch.tensor([s.num_queries for s in segments.segments])
    start, prefix_start, prefix_stop = torch.tensor(ends).repeat_interleave(num_queries, dim=0).unbind(1)
    query = torch.arange(len(start))
    # The distance of a query to a key in its prefix is shorter in positions than in the row.
    gap = torch.where(prefix_stop > prefix_start, start - prefix_stop, 0)
    own_start = torch.where((prefix_stop > prefix_start) & (gap == 0), prefix_start, start)
    if sliding_window is not None:
        prefix_start = torch.maximum(prefix_start, query - gap - sliding_window + 1)
        own_start = torch.maximum(own_start, query - sliding_window + 1)
    return torch.stack([prefix_start, prefix_stop, own_start, query + 1])


def _blocks(spans_4T: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of queries and keys that are partly visible, and those that are wholly; bool [K, K] each."""
    length = spans_4T.shape[1]
    first = torch.arange(0, length, BLOCK_SIZE)
    seen, covered = torch.zeros(2, len(first) * BLOCK_SIZE, len(first), dtype=torch.bool)
    for start, stop in spans_4T[:, :, None].split(2):
        seen[:length] |= (start < stop) & (start < first + BLOCK_SIZE) & (stop > first)
        covered[:length] |= (start <= first) & (stop >= first + BLOCK_SIZE)
    any_KK, full_KK = seen.unflatten(0, (-1, BLOCK_SIZE)).any(1), covered.unflatten(0, (-1, BLOCK_SIZE)).all(1)
    return any_KK & ~full_KK, full_KK


def _ordered(blocks_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of blocks [1, 1, K] and their indices, those that count first, [1, 1, K, K]; int32."""
    indices = blocks_KK.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks_KK.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


@cache
def _compiled_flex_attention() -> Any:
    # Whole or not at all: what is not compiled makes all scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
