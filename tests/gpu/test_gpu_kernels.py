"""Kernels that only a GPU has, in bfloat16, against fp64; peak memory is recorded, not judged."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dpo_scale.data.layouts import Layout, PromptCompletions, Segments, collate
from dpo_scale.errors import UserError
from dpo_scale.model.attention import Kernel, choose_kernel, segment_attention
from dpo_scale.model.fused import RMSNorm, Rotation, fuse, kernels_for
from dpo_scale.model.log_probs import ChunkedLogProbs, LogitTransform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BFLOAT16_UNIT = 2**-8
"""Relative spacing of bfloat16 numbers."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Each case compiles anew: more variants than a run ever has would exceed the limit of recompilations."""
    torch.compiler.reset()


def _segments(layout: Layout) -> Segments:
    """Pairs of uneven lengths: longer and shorter than a kernel's tile, and completions of one token."""
    lengths = [(130, 257, 64), (1, 1, 90), (300, 17, 1), (64, 128, 128)]
    groups = [
        PromptCompletions(np.zeros(p, np.int32), (np.zeros(c, np.int32), np.zeros(r, np.int32))) for p, c, r in lengths
    ]
    segments = collate(groups, layout).segments
    assert segments is not None
    return segments


def _states(num_tokens: int, heads: int, kv_heads: int, size: int, value_size: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size)]
    return [
        torch.randn(1, n, num_tokens, d, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n, d in shapes
    ]


def _attend_with_gradients(
    states: list[Tensor], segments: Segments, kernel: Kernel, window: int | None, softcap: float | None
) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    leaves = [state.detach().requires_grad_() for state in states]
    output = segment_attention(
        leaves[0],
        leaves[1],
        leaves[2],
        segments,
        kernel=kernel,
        sliding_window=window,
        softcap=softcap,
    )
    generator = torch.Generator("cuda").manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, device="cuda", dtype=torch.float32)
    gradients = torch.autograd.grad((output.float() * direction).sum(), leaves)
    return [output.detach(), *gradients]


def _available(kernel: Kernel) -> bool:
    try:
        return choose_kernel(kernel, torch.device("cuda"), torch.bfloat16) == kernel
    except UserError:
        return False


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value_size"), [(4, 4, 64, 64), (8, 2, 128, 128), (4, 4, 96, 64)]
)
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn", "flex", "sdpa"])
def test_kernels_agree_with_attention_by_segment_in_fp64(
    kernel: Kernel,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int,
    layout: Layout,
    window: int | None,
    softcap: float | None,
) -> None:
    """The oracle runs on the CPU in fp64 from the same bfloat16 operands.

    A kernel rounds probabilities, outputs and gradients to bfloat16: the relative error of a whole tensor stays below
    two units, and that of the worst element below 8 units of the largest one.
    """
    if not _available(kernel):
        pytest.skip(f"{kernel} is not on this machine")
    segments = _segments(layout)
    num_tokens = segments.segments[-1].stop
    states = _states(num_tokens, heads, kv_heads, size, value_size)

    leaves = [state.detach().cpu().double().requires_grad_() for state in states]
    expected_output = segment_attention(
        leaves[0],
        leaves[1],
        leaves[2],
        segments,
        kernel="sdpa",
        sliding_window=window,
        softcap=softcap,
    )
    generator = torch.Generator("cuda").manual_seed(1)
    direction = torch.randn(expected_output.shape, generator=generator, device="cuda", dtype=torch.float32)
    gradients = torch.autograd.grad((expected_output * direction.cpu().double()).sum(), leaves)
    expected = [expected_output.detach(), *gradients]

    actual = _attend_with_gradients(states, segments.to("cuda"), kernel, window, softcap)
    for name, ours, oracle in zip(("output", "queries", "keys", "values"), actual, expected, strict=True):
        assert ours.shape == oracle.shape, name
        gap = ours.cpu().double() - oracle
        assert gap.norm() < 2 * BFLOAT16_UNIT * oracle.norm(), name
        assert gap.abs().max() < 8 * BFLOAT16_UNIT * oracle.abs().max(), name


def test_auto_takes_a_kernel_without_padding_or_loops_in_half_precision() -> None:
    chosen = choose_kernel("auto", torch.device("cuda"), torch.bfloat16)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert chosen == "varlen"
    assert choose_kernel("auto", torch.device("cuda"), torch.float32) == "flex"


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 30.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_in_bfloat16_agrees_with_fp64(bias: bool, transform: LogitTransform) -> None:
    """Products accumulate in fp32 from bfloat16 operands, so that log-probs are as exact as fp32; gradients carry one
    rounding of the softmax to bfloat16 before their product and one of the result.
    """
    num_tokens, hidden_size, vocabulary = 3000, 512, 32000
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, device="cuda")
        return values.to(torch.bfloat16).requires_grad_()

    hidden = randn(num_tokens, hidden_size)
    weight = randn(vocabulary, hidden_size, scale=hidden_size**-0.5)
    bias_V = randn(vocabulary) if bias else None
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator, device="cuda")
    grad = torch.randn(num_tokens, generator=generator, device="cuda")

    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias_V) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias else 0)
    logits = transform.scale * logits
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected_gradients = torch.autograd.grad(expected, leaves, grad.double())

    actual = ChunkedLogProbs.apply(hidden, weight, bias_V, targets, transform)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-4
    actual.backward(grad)
    for leaf, oracle in zip((hidden, weight, bias_V), expected_gradients, strict=False):
        assert leaf is not None
        assert leaf.grad is not None
        assert (leaf.grad - oracle).norm() < 2 * BFLOAT16_UNIT * oracle.norm()


@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_peak_memory_of_the_head_is_recorded(vocabulary: int, tmp_path: Path) -> None:
    """Writes `head_memory_<vocabulary>.json` to $DPO_SCALE_GPU_RECORDS, or to a temporary folder."""
    num_tokens, hidden_size = 16384, 2048
    records = Path(os.environ.get("DPO_SCALE_GPU_RECORDS", tmp_path))
    targets = torch.randint(vocabulary, (num_tokens,), device="cuda")
    peaks: dict[str, float] = {}
    for name in ("chunked", "plain"):
        hidden = torch.randn(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "chunked":
            logps = ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform())
        else:
            logps = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        logps.sum().backward()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        del hidden, weight, logps
        torch.cuda.empty_cache()
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": num_tokens,
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "peak_gib": peaks,
    }
    records.mkdir(parents=True, exist_ok=True)
    path = records / f"head_memory_{vocabulary}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path.read_text())


@pytest.mark.parametrize(
    "make", [lambda: LlamaRMSNorm(1024), lambda: LlamaMLP(LlamaConfig(hidden_size=1024, intermediate_size=2816))]
)
def test_fused_parts_are_as_exact_as_the_librarys(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().to("cuda", torch.bfloat16)
    hidden = torch.randn(3, 700, 1024, device="cuda", dtype=torch.bfloat16)

    def values_and_gradients(module: nn.Module, hidden: Tensor) -> list[Tensor]:
        hidden = hidden.clone().requires_grad_()
        output = module(hidden)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [hidden, *module.parameters()])]

    exact = values_and_gradients(copy.deepcopy(module).double(), hidden.double())
    library = values_and_gradients(module, hidden)
    assert fuse(module)[0] == ""
    for ours, theirs, true in zip(values_and_gradients(module, hidden), library, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - true).norm() <= 1.1 * (theirs.double() - true).norm() + 1e-6 * true.norm()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = RMSNorm.apply(x, weight, 1e-6, 1.0, False)
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (_norm, [(2, 3000, 96), (96,)]),
        (_norm, [(1, 37, 5120), (5120,)]),
        (lambda x, cos, sin: Rotation.apply(x.transpose(1, 2), cos.detach(), sin.detach()),
         [(2, 301, 5, 96), (1, 1, 301, 96), (1, 1, 301, 96)]),
    ],
)  # fmt: skip
def test_one_pass_kernels_agree_with_fp64(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """The rounding of what goes out is allowed, and of what the library rounds inside; in fp32 that of long sums."""
    generator = torch.Generator("cuda").manual_seed(0)
    operands = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    assert kernels_for(operands[0]) is not None

    def values_and_gradients(operands: list[Tensor]) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in operands]
        output = function(*leaves)
        direction = torch.randn(output.shape, generator=generator.manual_seed(1), device="cuda").to(dtype)
        gradients = torch.autograd.grad(output, leaves, direction.to(output.dtype), allow_unused=True)
        return [output.detach(), *(each for each in gradients if each is not None)]

    exact = values_and_gradients([each.double() for each in operands])
    tolerance = (8 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps
    for ours, true in zip(values_and_gradients(operands), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gate_agrees_with_fp64(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    gate, up, grad = (torch.randn(700, 1001, generator=generator, device="cuda").to(dtype) for _ in range(3))
    kernels = kernels_for(gate)
    assert kernels is not None
    gate64, up64 = (x.double().requires_grad_() for x in (gate, up))
    expected = torch.nn.functional.silu(gate64) * up64
    gradients = torch.autograd.grad(expected, (gate64, up64), grad.double())
    again, *actual = kernels.swiglu_backward(grad.clone(), gate, up)
    assert torch.equal(again, kernels.swiglu(gate, up))
    tolerance = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)
    for ours, true in zip((again, *actual), (expected, *gradients), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() < tolerance * true.norm()


def test_kernels_take_offsets_beyond_32_bits() -> None:
    gate = torch.zeros(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
    gate[-1] = 2.0
    kernels = kernels_for(gate)
    assert kernels is not None
    output = kernels.swiglu(gate, gate)
    assert output[-1].item() == pytest.approx(4 / (1 + math.exp(-2)), rel=0.01)
    assert output[:-1].count_nonzero() == 0
