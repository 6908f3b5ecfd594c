"""Matrix products in fp32 on CPUs, by oneDNN where MKL would leave half of the processor idle.

torch multiplies fp32 matrices by MKL, which takes its AVX-512 kernels on Intel's processors alone: a core of an EPYC of
the fifth generation gives 119 GFLOP/s by MKL and 265 by oneDNN, at the same precision. torch has that product for plain
tensors only as an operation of its compiler, so it is tried before it is used. Everything else is torch's own product.

Shape suffixes: M, N and K as in the product [M, N] of [M, K] and [K, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`x W^T + b` [..., N] of x [..., K], W [N, K] and b [N], where there is one."""

WORTH_IT = 2**23
"""Multiplications from which oneDNN is asked: it prepares a kernel for every new shape, which takes 0.2 ms."""

SLICE = 2**20
"""Elements of a result that oneDNN gives at a time where they belong into memory that is there: it knows none but its
own."""


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x W^T + b` [..., N] of x [..., K], in memory of its own."""
    if onednn := _onednn_for(x, weight_NK.t()):
        return onednn(x, weight_NK, bias_N)
    if bias_N is None:
        return x.matmul(weight_NK.t())
    output = x.new_empty(*x.shape[:-1], len(weight_NK))  # no view: a model may change it in place
    torch.addmm(bias_N, x.reshape(-1, x.shape[-1]), weight_NK.t(), out=output.view(-1, len(weight_NK)))
    return output


def matmul(left: Tensor, right_KN: Tensor) -> Tensor:
    """The product [..., N] of left [..., K] and right, in memory of its own."""
    if onednn := _onednn_for(left, right_KN):
        return onednn(left, right_KN.t(), None)
    return left.matmul(right_KN)


def matmul_into(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, *, add: bool = False) -> None:
    """Write the product of two matrices into memory that is there, or `add` it to what that holds."""
    onednn = _onednn_for(left_MK, right_KN)
    if onednn is None:
        out_MN.addmm_(left_MK, right_KN, beta=int(add))  # with 0 nothing is read of what is there
        return
    by_rows = len(out_MN) > out_MN.shape[1]
    for part in _slices(*out_MN.shape) if by_rows else _slices(*out_MN.t().shape):
        if by_rows:
            out, product = out_MN[part], onednn(left_MK[part], right_KN.t(), None)
        else:
            out, product = out_MN[:, part], onednn(left_MK, right_KN[:, part].t(), None)
        out.add_(product) if add else out.copy_(product)


def _slices(length: int, width: int) -> Iterator[slice]:
    size = max(1, SLICE // width)
    return (slice(start, start + size) for start in range(0, length, size))


def _onednn_for(left: Tensor, right_KN: Tensor) -> Linear | None:
    is_fp32 = left.dtype == right_KN.dtype == torch.float32
    if not is_fp32 or left.device.type != "cpu" or left.numel() * right_KN.shape[1] < WORTH_IT:
        return None
    return _onednn()


@cache
def _onednn() -> Linear | None:
    """oneDNN's product, where MKL has a slower one, and if it gives what it should."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _is_intel():
        return None
    try:
        random = torch.Generator().manual_seed(0)
        x, weight, bias = (
            torch.randn(size, generator=random, device="cpu", dtype=torch.float32)
            for size in ((3, 7, 96), (80, 96), (80,))
        )
        exact = x.double() @ weight.double().t() + bias.double()
        laid_out_twice = weight, weight.t().contiguous().t()
        agrees = all(torch.allclose(_pointwise(x, each, bias).double(), exact, atol=1e-5) for each in laid_out_twice)
    except Exception:  # whatever an operation may raise that nobody promised
        return None
    return _pointwise if agrees else None


def _pointwise(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
        weight_NK = weight_NK.contiguous()  # other strides take a hundred times as long
    if bias_N is not None:
        bias_N = bias_N.contiguous()  # its stride is not looked at
    output = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight_NK, bias_N, "none", [], "")
    # No view, which the operation itself gives where x is no matrix: a model may change it in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], len(weight_NK)])
    return shaped


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
