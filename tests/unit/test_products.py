"""Matrix products by oneDNN: what it gives, where it is asked and where not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_scale.model import products
from dpo_scale.model.fused import FeedForward, Projection
from dpo_scale.model.log_probs import ChunkedLogProbs, LogitTransform

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


class Operations(TorchDispatchMode):
    """Names of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def by_onednn(self) -> int:
        return sum("_linear_pointwise" in name for name in self.names)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose AVX-512 MKL does not take."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_is_intel", lambda: False)


def _random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=dtype)


def _assert_fp32_exact(actual: Tensor, exact: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("rows", [(1,), (37,), (2, 37)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_exact_to_fp32(rows: tuple[int, ...], transposed: bool) -> None:
    x, bias = _random(*rows, 24), _random(30)
    weight = _random(24, 30).t() if transposed else _random(30, 24)
    exact = x.double() @ weight.double().t()
    with Operations() as operations:
        _assert_fp32_exact(products.linear(x, weight, None), exact)
        _assert_fp32_exact(products.linear(x, weight, bias), exact + bias.double())
        _assert_fp32_exact(products.matmul(x, weight.t()), exact)
    assert operations.by_onednn == 3


@pytest.mark.usefixtures("onednn")
def test_operands_may_have_any_strides() -> None:
    """Operands of other strides are copied: the operation misreads such a bias and takes a detour for such a weight."""
    x, weight, bias = _random(2, 37, 48)[..., ::2], _random(30, 48)[:, ::2], _random(60)[::2]
    laid_out = []

    def operation(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        laid_out.extend([weight.is_contiguous(), bias.is_contiguous()])
        return torch.addmm(bias, x, weight.t())

    _assert_fp32_exact(products.linear(x, weight, bias), x.double() @ weight.double().t() + bias.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", operation)
        products.linear(x, weight, bias)
    assert laid_out == [True, True]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("rows", [(24,), (37, 24), (2, 37, 24)])
def test_what_is_given_may_be_changed_in_place(rows: tuple[int, ...]) -> None:
    """As OLMo clamps its queries."""
    hidden = _random(*rows).requires_grad_()
    weight = nn.Parameter(_random(30, 24))
    outputs = [Projection.apply(hidden, weight, None)]  # type: ignore[no-untyped-call]
    if len(rows) > 1:
        operands = [operand for size in ((30, 24), (30, 24), (24, 30)) for operand in (_random(*size), None)]
        outputs.append(FeedForward.apply(hidden, *operands))  # type: ignore[no-untyped-call]
    for output in outputs:
        assert not output._is_view()
        output.clamp_(-4, 4)
        (grad,) = torch.autograd.grad(output.sum(), hidden)
        assert grad.abs().sum() > 0


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(37, 30), (30, 37)], ids=["of rows", "of columns"])
def test_products_go_into_memory_that_is_there_slice_by_slice(rows: int, columns: int, transposed: bool) -> None:
    left, right = _random(24, rows).t() if transposed else _random(rows, 24), _random(24, columns)
    exact = left.double() @ right.double()
    out, total = torch.full((40, columns), torch.nan), torch.ones(rows, columns)
    with Operations() as operations:
        products.matmul_into(out[:rows], left, right)
        products.matmul_into(total, left, right, add=True)
    assert operations.by_onednn == 7 + 7  # of 6 rows or columns
    _assert_fp32_exact(out[:rows], exact)
    assert out[rows:].isnan().all()
    _assert_fp32_exact(total, 1 + exact)


def test_torchs_own_product_reads_nothing_of_the_memory_that_it_goes_into() -> None:
    out, left, right = torch.full((37, 30), torch.nan), _random(37, 24), _random(24, 30)
    products.matmul_into(out, left, right)
    _assert_fp32_exact(out, left.double() @ right.double())


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORTH_IT", 1)
    x, weight = _random(37, 24, dtype=dtype), _random(30, 24, dtype=dtype)
    with Operations() as operations:
        assert products.linear(x, weight, None).dtype == dtype
        assert products.matmul(x, weight.t()).dtype == dtype
    assert not operations.by_onednn


@needs_onednn
@pytest.mark.usefixtures("amd")
def test_small_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn", lambda: products._pointwise)
    x, weight = _random(512, 128), _random(127, 128)
    with Operations() as operations:
        products.linear(x, weight, None)
        assert not operations.by_onednn
        products.linear(x, _random(128, 128), None)
        assert operations.by_onednn == 1


def _choice() -> Any:
    return products._onednn.__wrapped__()


@needs_onednn
@pytest.mark.usefixtures("amd")
def test_onednn_is_taken_where_mkl_leaves_the_processor_idle() -> None:
    assert _choice() is products._pointwise


@pytest.mark.usefixtures("amd")
def test_mkl_stays_where_it_is_as_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_intel", lambda: True)
    assert _choice() is None
    monkeypatch.setattr(products, "_is_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert _choice() is None


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("fault", ["gone", "rounds", "ignores_strides"])
def test_an_operation_that_is_not_what_it_was_is_left_alone(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def operation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if fault == "gone":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
        if fault == "rounds":
            return (x.half() @ weight.half().t()).float() + bias
        return x @ weight.as_strided(weight.shape, (weight.shape[1], 1)).t() + bias

    monkeypatch.setattr(products, "_pointwise", operation)
    assert _choice() is None


@needs_onednn
@pytest.mark.parametrize("kind", ["projection", "feed_forward", "head"])
def test_forward_and_backward_of_what_is_fused_agree_with_torchs_own(kind: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 24, requires_grad=True)
    weights = [nn.Parameter(torch.randn(size)) for size in ((40, 24), (40, 24), (24, 40))]
    biases = [nn.Parameter(torch.randn(size)) for size in (40, 40, 24)]
    operands = [operand for pair in zip(weights, biases, strict=True) for operand in pair]
    wanted = {"projection": [hidden, *operands[:2]], "feed_forward": [hidden, *operands], "head": [hidden, weights[0]]}

    def values_and_gradients() -> tuple[Tensor, ...]:
        if kind == "projection":
            output = Projection.apply(hidden, *operands[:2])  # type: ignore[no-untyped-call]
        elif kind == "feed_forward":
            output = FeedForward.apply(hidden, *operands)  # type: ignore[no-untyped-call]
        else:
            output = ChunkedLogProbs.apply(hidden, weights[0], None, torch.arange(37), LogitTransform())  # type: ignore[no-untyped-call]
        scale = torch.linspace(-1, 1, output.numel()).view_as(output)
        return output, *torch.autograd.grad((output * scale).sum(), wanted[kind])

    expected = values_and_gradients()
    request.getfixturevalue("onednn")
    with Operations() as operations:
        actual = values_and_gradients()
    assert operations.by_onednn >= 3
    assert not any("mm" in name for name in operations.names)
    for ours, torchs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_ranks_on_cpus_keep_the_kernels_of_few_shapes() -> None:
    """A hundred shapes twice: with room for sixteen, all are prepared again, and none stays in memory."""
    code = (
        "import sys, psutil, torch\n"
        "from dpo_scale.distributed import runtime\n"
        "from dpo_scale.model.products import _pointwise\n"
        "if sys.argv[1] == 'few': runtime._keep_few_kernels()\n"
        "weight, rows = torch.ones(688, 256), torch.ones(1000, 256)\n"
        "_pointwise(rows, weight, None)\n"
        "before = psutil.Process().memory_info().rss\n"
        "for number in [*range(200, 1000, 8)] * 2: _pointwise(rows[:number], weight, None)\n"
        "print('grown by', psutil.Process().memory_info().rss - before)\n"
    )
    prepared, grown = {}, {}
    for kept in ("few", "all"):
        environment = {**os.environ, "ONEDNN_VERBOSE": "2"}
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            environment.pop(name, None)
        command = [sys.executable, "-c", code, kept]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        prepared[kept] = sum("create:cache_miss" in line for line in said.splitlines())
        grown[kept] = int(said.rpartition("grown by")[2])
    assert prepared == {"few": 201, "all": 101}
    assert grown["few"] < grown["all"] / 2
