"""The attention function behind the shared and packed layouts.

It is registered with Hugging Face's attention interface, so that any decoder that takes the interface runs it without
a changed line: the segments travel through the model's keyword arguments. A batch without segments (the padded layout)
goes to the library's own scaled dot-product attention.

Shape suffixes: B rows, N heads, G key-value heads, T tokens of the row, D head size, Q and K queries and keys of a
segment.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_scale.data.layouts import Segment, Segments
from dpo_scale.errors import UserError

ATTENTION = "dpo_scale"
"""Name of this attention in a model's `attn_implementation`."""

Kernel = Literal["varlen", "flash_attn", "flex", "sdpa"]

LARGEST_FLASH_HEAD = 256
"""Largest size of a head that FlashAttention's kernels take."""

HARMLESS_TENSORS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that a model may hand to its attention without changing what is computed here."""


class UnsupportedAttentionError(UserError):
    """The model asks its attention for something that segments cannot give."""


@dataclass(slots=True)
class Observation:
    """What a model asked of its attention in forwards over segments."""

    modules: set[int] = field(default_factory=set)
    """The attention modules that took segments."""
    windows: set[int] = field(default_factory=set)
    """Sliding windows that were given with the segments."""
    mask_windows: set[int] = field(default_factory=set)
    """Spans of local attention for which the model asked a mask."""
    objections: set[str] = field(default_factory=set)

    def reason_against(self, num_layers: int) -> str | None:
        """Why segments do not describe this model's attention; None if nothing speaks against them."""
        if self.objections:
            return "; ".join(sorted(self.objections))
        if len(self.modules) < num_layers:
            return f"{len(self.modules)} of {num_layers} layers take the attention interface"
        if unknown := self.mask_windows - self.windows:
            return f"attention is masked in spans of {min(unknown)} tokens that are no sliding window"
        return None


_observation: Observation | None = None


@contextmanager
def observe() -> Iterator[Observation]:
    """Inside, what segments cannot give is noted instead of raised.

    An error in the middle of a forward would leave ZeRO-3's hooks half-way, and no other layout could be tried.
    """
    global _observation
    _observation = Observation()
    try:
        yield _observation
    finally:
        _observation = None


def _object(reason: str) -> None:
    if _observation is None:
        raise UnsupportedAttentionError(reason)
    _observation.objections.add(reason)


def choose_kernel(wanted: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel to use: the one asked for, or the fastest that this machine has.

    Raises UserError where the one asked for is not there.
    """
    half_on_gpu = device.type == "cuda" and dtype != torch.float32
    is_ampere = half_on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    has_flash = importlib.util.find_spec("flash_attn") is not None
    available: dict[Kernel, bool] = {
        "varlen": is_ampere and has_varlen,
        "flash_attn": is_ampere and has_flash,
        "flex": device.type == "cuda",
        "sdpa": True,
    }
    if wanted != "auto" and not available[wanted]:  # type: ignore[index]
        usable = " or ".join(name for name, there in available.items() if there)
        raise UserError(f"model.attention: {wanted} does not run on {device.type} in {dtype}; use auto or {usable}")
    return next(name for name, there in available.items() if there and wanted in ("auto", name))


def register(kernel: Kernel) -> None:
    """Make the attention known to transformers under the name `ATTENTION`."""

    def attend(
        module: nn.Module,
        query_BNTD: Tensor,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        segments: Segments | None = kwargs.pop("segments", None)
        if segments is None:
            return _plain_attention(module, query_BNTD, key_BGTD, value_BGTD, attention_mask, **kwargs)
        if attention_mask is not None:
            _object("the model gives its attention a mask of its own")
        output = segment_attention(query_BNTD, key_BGTD, value_BGTD, segments, kernel=kernel, **kwargs)
        if _observation is not None:
            _observation.modules.add(id(module))
        return output, None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, _mask_of_padding)


def _mask_of_padding(*args: Any, **kwargs: Any) -> Tensor | None:
    """Masks are for padded rows; rows without padding are described by their segments."""
    if kwargs.get("attention_mask") is None:
        if _observation is not None:
            if span := kwargs.get("local_size"):
                _observation.mask_windows.add(span)
            if kwargs.get("use_vmap"):
                _observation.objections.add("the model adds a mask of its own")
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _plain_attention(
    module: nn.Module,
    query_BNTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask_BNTT: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over padded rows: the library's fused one, or the model's own where it needs more than that has."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = sdpa_attention_forward
    if own is not None and (kwargs.get("softcap") or _extra_tensors(kwargs)):
        if mask_BNTT is None:
            length = query_BNTD.shape[2]
            mask_BNTT = torch.ones(length, length, dtype=torch.bool, device=query_BNTD.device).tril()[None, None]
        lowest = torch.finfo(query_BNTD.dtype).min
        mask_BNTT = torch.zeros_like(mask_BNTT, dtype=query_BNTD.dtype).masked_fill(~mask_BNTT, lowest)
        attend = own
    output: tuple[Tensor, Tensor | None] = attend(module, query_BNTD, key_BGTD, value_BGTD, mask_BNTT, **kwargs)
    return output


def _extra_tensors(kwargs: dict[str, Any]) -> list[str]:
    """Names of tensors beside queries, keys and values: sinks, biases, indices."""
    return [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in HARMLESS_TENSORS]


def segment_attention(
    query_BNTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    segments: Segments,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> Tensor:
    """Attention of one row by segments, [1, T, N, D].

    Args:
        scaling: factor of the scores; None means `D ** -0.5`.
        sliding_window: a query sees keys less than this many positions back.
        softcap: scores pass through `softcap * tanh(score / softcap)`.

    Raises UnsupportedAttentionError for what no kernel here has, such as attention sinks.
    """
    for name in _extra_tensors(rest):
        _object(f"the model gives its attention {name!r} (sinks, a bias or a selection of keys)")
    if _observation is not None and sliding_window:
        _observation.windows.add(sliding_window)
    assert query_BNTD.shape[0] == 1, "segments describe a single row"
    scale = scaling if scaling is not None else query_BNTD.shape[-1] ** -0.5
    if kernel == "sdpa" or _lacks(kernel, query_BNTD.shape[-1], bool(softcap or dropout)):
        return _by_segment(query_BNTD, key_BGTD, value_BGTD, segments, scale, dropout, sliding_window, softcap)
    if kernel == "flex":
        if dropout:
            _object("FlexAttention has no dropout; set model.dropout: false")
        from dpo_scale.model.flex_attention import flex_segment_attention  # loads torch's compiler

        return flex_segment_attention(query_BNTD, key_BGTD, value_BGTD, segments, scale, sliding_window, softcap)
    # Both kernels take [tokens, heads, head size] and grouped key-value heads.
    query_TND, key_KGD, value_KGD = (x.squeeze(0).transpose(0, 1) for x in (query_BNTD, key_BGTD, value_BGTD))
    if segments.key_index is not None:
        key_KGD = key_KGD.index_select(0, segments.key_index)
        value_KGD = value_KGD.index_select(0, segments.key_index)
    value_size = value_KGD.shape[2]
    if value_size < query_TND.shape[2]:  # latent attention (DeepSeek); these kernels want equal sizes
        value_KGD = F.pad(value_KGD, (0, query_TND.shape[2] - value_size))
    left = -1 if sliding_window is None else sliding_window - 1
    if kernel == "varlen":
        return _torch_varlen(query_TND, key_KGD, value_KGD, segments, scale, left)[None, ..., :value_size]
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query_TND,
        key_KGD,
        value_KGD,
        segments.cu_queries,
        segments.cu_keys,
        segments.max_queries,
        segments.max_keys,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
    )
    return output[None, ..., :value_size]


def _lacks(kernel: Kernel, head_size: int, capped_or_dropped: bool) -> bool:
    """Whether a kernel cannot compute this: FlashAttention, or what torch made of it, forward and backward."""
    if kernel == "varlen":
        return capped_or_dropped or head_size % 8 > 0 or head_size > LARGEST_FLASH_HEAD
    return kernel == "flash_attn" and head_size > LARGEST_FLASH_HEAD


def _torch_varlen(
    query_TND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    segments: Segments,
    scale: float,
    left: int,
) -> Tensor:
    """torch's FlashAttention, by the operation behind `torch.nn.attention.varlen`.

    The function around it took the host 0.3 ms a call where this took 0.06 (profiled, torch 2.11), and some versions
    of it have no word for the grouped key-value heads that the operation takes in all.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query_TND,
        key_KGD,
        value_KGD,
        segments.cu_queries,
        segments.cu_keys,
        segments.max_queries,
        segments.max_keys,
        0.0,  # dropout, which this kernel is not asked for
        left < 0,  # causal; a window is causal by itself
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )[0]
    return output


def _by_segment(
    query_BNTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    segments: Segments,
    scale: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One scaled dot-product attention a segment.

    Each tensor is split once: the backward pass of a split is one concatenation, that of a slice a whole row of zeros.
    """
    grouped = query_BNTD.shape[1] != key_BGTD.shape[1]
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    queries = query_BNTD.split([segment.num_queries for segment in segments.segments], dim=2)
    keys, values = _keys_of_segments(key_BGTD, segments), _keys_of_segments(value_BGTD, segments)
    outputs = []
    kind = (sliding_window, query_BNTD.dtype, bool(softcap))
    if kind not in segments.masks:
        segments.masks[kind] = [_causal_mask(s, sliding_window, query_BNTD, bool(softcap)) for s in segments.segments]
    for query, key, value, mask_QK in zip(queries, keys, values, segments.masks[kind], strict=True):
        if softcap:
            output = _soft_capped(query, key, value, mask_QK, scale, dropout, softcap)
        else:
            output = attend(query, key, value, attn_mask=mask_QK, is_causal=mask_QK is None)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _keys_of_segments(states_BNTD: Tensor, segments: Segments) -> list[Tensor]:
    """The keys or values of each segment, its prefix first."""
    spans = [[(s.prefix_start, s.prefix_stop), (s.start, s.stop)] for s in segments.segments]
    bounds = sorted({bound for pair in spans for span in pair for bound in span})
    pieces = states_BNTD.split([stop - start for start, stop in pairwise(bounds)], dim=2)
    place = {bound: n for n, bound in enumerate(bounds)}
    parts = [[piece for start, stop in pair for piece in pieces[place[start] : place[stop]]] for pair in spans]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def _causal_mask(segment: Segment, sliding_window: int | None, like: Tensor, always: bool) -> Tensor | None:
    """What is added to the scores, [Q, K]: 0 where query may see key, aligned to the bottom right, else -inf.

    None, unless it is `always` wanted, where a kernel's own causal mask does.
    """
    windowed = sliding_window is not None and segment.num_keys > sliding_window
    if not (always or windowed or segment.num_queries != segment.num_keys):
        return None
    offset = segment.num_keys - segment.num_queries
    query_position = torch.arange(segment.num_queries, device=like.device)[:, None] + offset
    key_position = torch.arange(segment.num_keys, device=like.device)[None]
    visible_QK = key_position <= query_position
    if sliding_window is not None:
        visible_QK &= key_position > query_position - sliding_window
    return torch.zeros_like(visible_QK, dtype=like.dtype).masked_fill_(~visible_QK, float("-inf"))


def _soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_QK: Tensor,
    scale: float,
    dropout: float,
    softcap: float,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    weights = (scores + mask_QK).softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(query.dtype), dropout) @ value
