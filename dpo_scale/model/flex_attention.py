"""FlexAttention over a row of segments: a query sees its segment's prefix and, causally, its own segment.

Shape suffixes as in `attention`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dpo_scale.data.layouts import Segments


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
        segments.masks[sliding_window] = _block_mask(segments, query_BNTD.shape[2], sliding_window, query_BNTD.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap else score

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


def _block_mask(segments: Segments, length: int, sliding_window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask of a row of `length` tokens."""
    bounds = torch.tensor([(s.start, s.prefix_start, s.prefix_stop) for s in segments.segments], device=device)
    of_token = torch.repeat_interleave(torch.arange(len(bounds), device=device), segments.cu_queries.diff())
    start, prefix_start, prefix_stop = bounds[of_token].unbind(1)
    # The distance of a query to a key in its prefix is shorter in the row's own terms than in positions.
    gap = torch.where(prefix_stop > prefix_start, start - prefix_stop, 0)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= start[q]) & (k <= q)
        prefix = (k >= prefix_start[q]) & (k < prefix_stop[q])
        if sliding_window is None:
            return own | prefix
        return (own & (q - k < sliding_window)) | (prefix & (q - gap[q] - k < sliding_window))

    return create_block_mask(visible, 1, None, length, length, device=str(device))


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)
