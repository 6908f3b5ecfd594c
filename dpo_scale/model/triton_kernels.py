"""What `fused` and `log_probs` compute, for a GPU: one pass over memory each, where torch's operations make several.

Every function computes in fp32 from operands of any dtype and rounds once, or as often as the library's code does. It
takes the same arguments as, and is tested against, the plain form in the module that calls it. Offsets are 64-bit: a
row of tokens times a feed-forward's width may exceed 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Numbers that a program holds of one operand, where it may choose."""
WEIGHT_PROGRAMS = 512
"""Programs that share the rows of a norm's backward pass: each leaves one partial sum of the weight's gradient."""


def _warps(numbers: int) -> int:
    """Warps of a program that holds so many numbers of one operand."""
    return min(16, max(4, numbers // 512))


# --- norms -------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + epsilon) * (offset + weight)` over the last dimension, and the factor of each row, fp32."""
    x = x.contiguous()
    size, tile_rows, tile_size = _norm_tiles(x)
    rows = x.numel() // size
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    output = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(rows, dtype=torch.float32)
    _rms_norm[(triton.cdiv(rows, tile_rows),)](
        x, weight, output, scale, rows, size, epsilon, offset, rounds_first, tile_rows, tile_size,
        num_warps=_warps(tile_rows * tile_size),
    )  # fmt: skip
    return output, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; `scale` is what the forward pass gave."""
    x, grad = x.contiguous(), grad.contiguous()
    size, tile_rows, tile_size = _norm_tiles(x)
    rows = x.numel() // size
    programs = min(WEIGHT_PROGRAMS, triton.cdiv(rows, tile_rows))
    grad_x = torch.empty_like(x)
    partial_sums = x.new_empty(programs, size, dtype=torch.float32)
    _rms_norm_backward[(programs,)](
        grad, x, weight, scale, grad_x, partial_sums, rows, size, offset, programs, tile_rows, tile_size,
        num_warps=_warps(tile_rows * tile_size),
    )  # fmt: skip
    return grad_x, partial_sums.sum(0).to(weight.dtype)


def _norm_tiles(x: Tensor) -> tuple[int, int, int]:
    """Size of a row, rows of a tile, and columns of a tile: all of a row."""
    size = x.shape[-1]
    tile_size = triton.next_power_of_2(size)
    return size, max(1, TILE // tile_size), tile_size


@triton.jit
def _rms_norm(
    x, weight, output, scale, rows, size, epsilon, offset,
    ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)[None, :]
    place = row[:, None] * size + column
    inside = (row[:, None] < rows) & (column < size)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32) + offset
    row_scale = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / size + epsilon)
    tl.store(scale + row, row_scale, mask=row < rows)
    normal = values * row_scale[:, None]
    if ROUNDS_FIRST:
        normal = normal.to(x.dtype.element_ty).to(tl.float32)
    tl.store(output + place, normal * factor, mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, scale, grad_x, partial_sums, rows, size, offset, programs,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, SIZE)[None, :]
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32) + offset
    weight_sum = tl.zeros([ROWS, SIZE], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        place = row[:, None] * size + column
        inside = (row[:, None] < rows) & (column < size)
        row_scale = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * row_scale
        gradient = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        weight_sum += gradient * normal
        along = gradient * factor
        mean = tl.sum(along * normal, 1)[:, None] / size
        tl.store(grad_x + place, (along - normal * mean) * row_scale, mask=inside)
    total = tl.sum(weight_sum, 0)[None, :]
    tl.store(partial_sums + program.to(tl.int64) * size + column, total, mask=column < size)


# --- gated feed-forwards -----------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), TILE),)](gate, up, output, gate.numel(), TILE)
    return output


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`silu(gate) * up` again, which takes the place of `grad`, and the gradients of gate and up."""
    gate, up = gate.contiguous(), up.contiguous()
    assert grad.is_contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward[(triton.cdiv(gate.numel(), TILE),)](grad, gate, up, grad_gate, grad_up, gate.numel(), TILE)
    return grad, grad_gate, grad_up


@triton.jit
def _swiglu(gate, up, output, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    x = tl.load(gate + place, mask=inside).to(tl.float32)
    activated = (x * tl.sigmoid(x)).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(output + place, activated * tl.load(up + place, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def _swiglu_backward(grad, gate, up, grad_gate, grad_up, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    x = tl.load(gate + place, mask=inside).to(tl.float32)
    y = tl.load(up + place, mask=inside).to(tl.float32)
    gradient = tl.load(grad + place, mask=inside).to(tl.float32)
    opened = tl.sigmoid(x)
    activated = (x * opened).to(gate.dtype.element_ty).to(tl.float32)
    slope = opened * (1 + x * (1 - opened))
    tl.store(grad_gate + place, gradient * y * slope, mask=inside)
    tl.store(grad_up + place, gradient * activated, mask=inside)
    tl.store(grad + place, activated * y, mask=inside)


# --- rotary embeddings -------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """`x cos + (-x2, x1) sin` for the halves x1, x2 of the last dimension; `transposed` gives what a gradient needs.

    Args:
        x: [B, N, T, D] in any order in memory but that of D.
        cos: [B, 1, T, D] or [1, 1, T, D], as `sin`.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, size = x.shape
    output = torch.empty_like(x)
    angles = [
        (each if each.stride(-1) == 1 else each.contiguous()).expand(batch, 1, tokens, size) for each in (cos, sin)
    ]
    half = size // 2
    tile_half = triton.next_power_of_2(half)
    tile_heads = min(triton.next_power_of_2(heads), max(1, TILE // tile_half))
    _rotate[(batch * tokens,)](
        x, angles[0], angles[1], output, heads, tokens, half, *x.stride()[:3], *output.stride()[:3],
        angles[0].stride(0), angles[0].stride(2), angles[1].stride(0), angles[1].stride(2),
        transposed, tile_heads, tile_half,
    )  # fmt: skip
    return output


@triton.jit
def _rotate(
    x, cos, sin, output, heads, tokens, half, x_batch, x_head, x_token, out_batch, out_head, out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    column = tl.arange(0, HALF)[None, :]
    there = column < half
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos1 = tl.load(cos + column, mask=there, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + half + column, mask=there, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + column, mask=there, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + half + column, mask=there, other=0.0).to(tl.float32)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    x += batch * x_batch + token * x_token
    output += batch * out_batch + token * out_token
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None].to(tl.int64)
        inside = (head < heads) & there
        x1 = tl.load(x + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + head * x_head + half + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + head * out_head + column, x1 * cos1 - x2 * sin1, mask=inside)
        tl.store(output + head * out_head + half + column, x2 * cos2 + x1 * sin2, mask=inside)


# --- the head ----------------------------------------------------------------------------------

VOCABULARY_TILE = 4096


def log_softmax_at(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 log-probs [C] of the targets, and log-sum-exp [C], in one pass over the fp32 logits."""
    rows, vocabulary = logits_CV.shape
    logps_C, lse_C = logits_CV.new_empty(2, rows)
    _log_softmax_at[(rows,)](
        logits_CV, targets_C, logps_C, lse_C, vocabulary, logits_CV.stride(0), VOCABULARY_TILE, num_warps=8
    )
    return logps_C, lse_C


def softmax_less_target(logits_CV: Tensor, targets_C: Tensor, lse_C: Tensor, dtype: torch.dtype) -> Tensor:
    """`softmax(logits) - one_hot(target)`, [C, V] in the dtype."""
    rows, vocabulary = logits_CV.shape
    output_CV = torch.empty(rows, vocabulary, dtype=dtype, device=logits_CV.device)
    _softmax_less_target[(rows, triton.cdiv(vocabulary, VOCABULARY_TILE))](
        logits_CV, targets_C, lse_C, output_CV, vocabulary, logits_CV.stride(0), VOCABULARY_TILE, num_warps=8
    )
    return output_CV


@triton.jit
def _log_softmax_at(logits, targets, logps, lse, vocabulary, stride, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # Finite, since -inf - -inf is not a number; what no logit has replaced counts for nothing in the end.
    highest = tl.full([SIZE], -1e30, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for first in range(0, vocabulary, SIZE):
        column = first + tl.arange(0, SIZE)
        values = tl.load(logits + column, mask=column < vocabulary, other=-1e30)
        above = tl.maximum(highest, values)
        total = total * tl.exp(highest - above) + tl.exp(values - above)
        highest = above
    peak = tl.max(highest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(highest - peak), 0))
    target = tl.load(logits + tl.load(targets + row))
    tl.store(lse + row, peak + log_total)
    tl.store(logps + row, (target - peak) - log_total)


@triton.jit
def _softmax_less_target(logits, targets, lse, output, vocabulary, stride, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < vocabulary
    values = tl.load(logits + row * stride + column, mask=inside, other=0.0)
    softmax = tl.exp(values - tl.load(lse + row))
    target = tl.load(targets + row)
    tl.store(output + row * vocabulary + column, tl.where(column == target, softmax - 1.0, softmax), mask=inside)


def try_out() -> None:
    """Raises whatever keeps this machine from running the kernels: Triton wants a C compiler for its launcher."""
    x = torch.ones(1, 2, device="cuda")
    swiglu(x, x)
