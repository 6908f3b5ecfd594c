"""The GPU's kernels against their plain forms, run number by number by Triton's interpreter.

In fp16, since the interpreter cuts bfloat16 off where a GPU rounds; `tests/gpu` has the rest. Triton decides when its
kernels are defined: `test_triton_kernels.py` runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo_scale.model import triton_kernels as kernels
from dpo_scale.model.fused import RMSNorm, Rotation, _swiglu_backward


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def _assert_close(ours: Tensor, plain: Tensor) -> None:
    assert ours.dtype == plain.dtype
    assert ours.shape == plain.shape
    tolerance = (8 if ours.dtype == torch.float32 else 2) * torch.finfo(ours.dtype).eps
    assert (ours.double() - plain.double()).norm() <= tolerance * plain.double().norm()


DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "rounds_first"), [(0.0, True), (0.0, False), (1.0, False)])
@pytest.mark.parametrize("shape", [(3, 7, 64), (2, 5, 3, 96), (1500, 8), (5, 2560)])
def test_norms(
    shape: tuple[int, ...], offset: float, rounds_first: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", 2)  # so that one takes many rows
    x, weight, grad = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = RMSNorm.apply(*leaves, 1e-6, offset, rounds_first)
    output, scale = kernels.rms_norm(x, weight, 1e-6, offset, rounds_first)
    _assert_close(output, expected)
    assert dtype == torch.float32 or (output == expected).float().mean() > 0.98, "rounded elsewhere"
    gradients = kernels.rms_norm_backward(grad, x, weight, scale, offset)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        _assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    gate, up, grad = (torch.randn(3, 1700).to(dtype) for _ in range(3))
    _assert_close(kernels.swiglu(gate, up), torch.nn.functional.silu(gate) * up)
    expected = _swiglu_backward(grad.clone(), gate, up)
    for ours, plain in zip(kernels.swiglu_backward(grad, gate, up), expected, strict=True):
        _assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize(("heads", "size"), [(5, 96), (40, 128)])
def test_rotations(heads: int, size: int, angles: int, dtype: torch.dtype) -> None:
    """In the order in memory that projections leave, heads inside tokens."""
    x = torch.randn(2, 9, heads, size).to(dtype).transpose(1, 2)
    grad = torch.randn(2, heads, 9, size).to(dtype)
    cos, sin = torch.randn(2, angles, 1, 9, size).to(dtype)
    leaf = x.detach().requires_grad_()
    expected = Rotation.apply(leaf, cos, sin)
    output = kernels.rotate(x, cos, sin)
    assert output.stride() == x.stride()
    _assert_close(output, expected)
    _assert_close(kernels.rotate(grad, cos, sin, transposed=True), torch.autograd.grad(expected, leaf, grad)[0])


@pytest.mark.parametrize("vocabulary", [50, 4096, 9001])
def test_the_softmax_of_the_head(vocabulary: int) -> None:
    logits, targets = 30 * torch.randn(6, vocabulary), torch.randint(vocabulary, (6,))
    logits[0] -= 1000.0
    logps, lse = kernels.log_softmax_at(logits, targets)
    exact = logits.double().log_softmax(-1)
    assert (logps - exact.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert (lse - logits.double().logsumexp(-1)).abs().max() < 1e-4
    expected = exact.exp()
    expected[torch.arange(6), targets] -= 1
    for dtype in DTYPES:
        residual = kernels.softmax_less_target(logits, targets, lse, dtype)
        assert residual.dtype == dtype
        assert (residual - expected).abs().max() < max(torch.finfo(dtype).eps, 1e-4)


def test_what_is_not_a_number_stays_one() -> None:
    """So that a run that has come apart is seen to."""
    logits = torch.zeros(2, 5000)
    logits[0, 4500] = float("nan")
    logps, _ = kernels.log_softmax_at(logits, torch.zeros(2, dtype=torch.long))
    assert logps.isnan().tolist() == [True, False]
