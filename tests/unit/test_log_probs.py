"""The head: exact gradients against fp64, and never a matrix of all tokens by the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_scale.data.layouts import Layout, PromptCompletions, collate
from dpo_scale.model import log_probs
from dpo_scale.model.attention import register
from dpo_scale.model.loading import load_model
from dpo_scale.model.log_probs import ChunkedLogProbs, LogitTransform
from dpo_scale.recipe import ModelSection

NUM_TOKENS, HIDDEN, VOCABULARY = 50, 24, 70
TRANSFORMS = [LogitTransform(), LogitTransform(0.25), LogitTransform(1.0, 2.0), LogitTransform(3.0, 2.0)]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens a chunk: 4 chunks, the last one of 2 tokens."""
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", 16 * VOCABULARY)
    assert [len(range(*rows.indices(NUM_TOKENS))) for rows in _chunks()] == [13, 13, 13, 11]


def _chunks() -> list[slice]:
    return log_probs._chunks(NUM_TOKENS, VOCABULARY, torch.device("cpu"))


def _operands(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(VOCABULARY, HIDDEN)).to(dtype).requires_grad_()
    bias_V = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(VOCABULARY, (NUM_TOKENS,))
    grad = torch.randn(NUM_TOKENS)
    return hidden, weight, bias_V, targets, grad


def _oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor, transform: LogitTransform
) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and gradients in fp64 by autograd through every logit."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    logits = transform.scale * logits
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logps = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return logps.detach(), list(torch.autograd.grad(logps, leaves, grad.double()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-5, 1e-5),
        # Operands are exact in fp32; only gradients are rounded, once, to 8 bits of mantissa.
        (torch.bfloat16, 1e-5, 2**-8),
    ],
)
def test_values_and_gradients_equal_fp64_autograd(
    dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float, bias: bool, transform: LogitTransform
) -> None:
    hidden, weight, bias_V, targets, grad = _operands(dtype, bias=bias)
    expected, expected_gradients = _oracle(hidden, weight, bias_V, targets, grad, transform)
    actual = ChunkedLogProbs.apply(hidden, weight, bias_V, targets, transform)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert (actual - expected).abs().max() < value_tolerance
    actual.backward(grad.to(actual.dtype))
    for leaf, expected_gradient in zip((hidden, weight, bias_V), expected_gradients, strict=False):
        assert leaf is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        gap = (leaf.grad - expected_gradient).abs().max() / expected_gradient.abs().max()
        assert gap < gradient_tolerance


class PlainKernels:
    """What the GPU's kernels of the head compute; `interpreted_kernels.py` holds those against their definition."""

    @staticmethod
    def log_softmax_at(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        return logits_CV.log_softmax(-1).gather(1, targets_C[:, None])[:, 0], logits_CV.logsumexp(-1)

    @staticmethod
    def softmax_less_target(logits_CV: Tensor, targets_C: Tensor, lse_C: Tensor, dtype: torch.dtype) -> Tensor:
        one_hot_CV = torch.nn.functional.one_hot(targets_C, logits_CV.shape[1])
        return ((logits_CV - lse_C[:, None]).exp() - one_hot_CV).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_values_and_gradients_over_kernels_equal_fp64_autograd(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, in the way of a GPU: which kernels go over the logits is all that a CPU lacks of it."""

    class Head(log_probs._Head):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.kernels = PlainKernels  # type: ignore[assignment]

    monkeypatch.setattr(log_probs, "_Head", Head)
    hidden, weight, _, targets, grad = _operands(torch.float32, bias=False)
    expected, expected_gradients = _oracle(hidden, weight, None, targets, grad, LogitTransform(scale))
    actual = ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform(scale))
    assert (actual - expected).abs().max() < 1e-5
    for leaf, oracle in zip(
        torch.autograd.grad(actual, [hidden, weight], grad.to(actual.dtype)), expected_gradients, strict=True
    ):
        assert (leaf - oracle).abs().max() < 1e-5 * oracle.abs().max()


def test_the_weight_gradient_is_accumulated_in_fp32_over_chunks() -> None:
    """Sums of bfloat16 chunks would be off by several roundings; one rounding at the end is half a unit."""
    hidden, weight, _, targets, grad = _operands(torch.bfloat16, bias=False)
    _, (_, expected) = _oracle(hidden, weight, None, targets, grad, LogitTransform())
    ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform()).backward(grad)
    assert weight.grad is not None
    assert (((weight.grad - expected).abs() - 1e-6) <= expected.abs() * 2**-8).all()


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_get_theirs() -> None:
    hidden, weight, _, targets, grad = _operands(torch.float32, bias=False)
    _, (expected, _) = _oracle(hidden, weight, None, targets, grad, LogitTransform())
    ChunkedLogProbs.apply(hidden, weight.detach(), None, targets, LogitTransform()).backward(grad)
    assert weight.grad is None
    assert torch.allclose(hidden.grad.double(), expected, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [False, True])
def test_no_completion_token_at_all_gives_zero_gradients(bias: bool) -> None:
    """A rank with nothing to score still runs its backward beside the others."""
    hidden, weight, bias_V, targets, _ = _operands(torch.float32, bias=bias)
    actual = ChunkedLogProbs.apply(hidden[:0], weight, bias_V, targets[:0], LogitTransform())
    assert actual.shape == (0,)
    actual.sum().backward()
    for leaf in (hidden, weight, bias_V):
        assert leaf is None or torch.equal(leaf.grad, torch.zeros_like(leaf))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_model_without_completion_tokens_gives_zero_gradients(layout: Layout, tmp_path: Path) -> None:
    model = _load(tmp_path, "llama")
    empty = np.zeros(0, np.int32)
    prompt = np.arange(3, 9, dtype=np.int32)
    batch = collate([PromptCompletions(prompt, (empty, empty))], layout)
    assert batch.lengths.tolist() == [0, 0]
    model(batch).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_matrix_of_tokens_by_vocabulary_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, hidden_size, vocabulary = 4000, 4, 500
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", 100 * vocabulary)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,))
    with LargestTensor() as plain:
        (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert plain.elements == num_tokens * vocabulary
    with LargestTensor() as chunked:
        ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform()).sum().backward()
    assert chunked.elements == 100 * vocabulary


def _peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """Most bytes of tensors that were made inside and lived at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    del result
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in memory))


@pytest.mark.parametrize(("softcap", "chunks_in_backward"), [(None, 1), (2.0, 2)])
def test_no_chunk_lies_beside_another(
    softcap: float | None, chunks_in_backward: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor beside its own exponentials; the gradient under a cap alone takes a second one."""
    num_tokens, hidden_size, vocabulary, chunk_tokens = 400, 4, 5000, 100
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", chunk_tokens * vocabulary)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,))
    transform = LogitTransform(1.0, softcap)
    chunk = chunk_tokens * vocabulary * 4

    def forward() -> Tensor:
        return ChunkedLogProbs.apply(hidden, weight, None, targets, transform)

    def forward_and_backward() -> object:
        return torch.autograd.grad(forward().sum(), [hidden, weight])

    assert chunk <= _peak_bytes(forward, tmp_path) < 1.2 * chunk
    most = _peak_bytes(forward_and_backward, tmp_path)
    assert chunks_in_backward * chunk <= most < (chunks_in_backward + 0.2) * chunk


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("chunk_tokens", "expected_products"), [(NUM_TOKENS, 3), (NUM_TOKENS // 2, 3 + 4)])
def test_the_logits_of_the_last_chunk_are_computed_once(
    chunk_tokens: int, expected_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, gradient of hidden states, gradient of the weight; the chunks before it compute their logits again."""
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", chunk_tokens * VOCABULARY)
    hidden, weight, _, targets, grad = _operands(torch.float32, bias=False)
    with Products() as actual:
        ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform()).backward(grad)
    assert actual.count == expected_products


class Chunks(TorchDispatchMode):
    """Keeps whatever has a column for each word of the vocabulary and one of these numbers of rows."""

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.values: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape in [(tokens, VOCABULARY) for tokens in self.tokens]:
            self.values.append(result)
        return result


def test_all_chunks_of_both_passes_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", 16 * VOCABULARY)
    hidden, weight, _, targets, grad = _operands(torch.float32, bias=False)
    with Chunks(13, 11) as made:
        ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform()).backward(grad)
    assert {len(chunk) for chunk in made.values} == {13, 11}
    assert len({chunk.untyped_storage().data_ptr() for chunk in made.values}) == 1


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_only_chunk_gives_the_same_gradients(transform: LogitTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", NUM_TOKENS * VOCABULARY)
    hidden, weight, bias_V, targets, grad = _operands(torch.float64, bias=True)
    _, expected_gradients = _oracle(hidden, weight, bias_V, targets, grad, transform)
    ChunkedLogProbs.apply(hidden, weight, bias_V, targets, transform).backward(grad.double())
    for leaf, expected in zip((hidden, weight, bias_V), expected_gradients, strict=True):
        assert torch.allclose(leaf.grad, expected, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("chunk_tokens", [NUM_TOKENS, NUM_TOKENS // 2])
def test_a_second_backward_gives_the_same_gradients(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one makes the gradient out of what was kept, which is no use to another."""
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", chunk_tokens * VOCABULARY)
    hidden, weight, _, targets, grad = _operands(torch.float32, bias=False)
    logps = ChunkedLogProbs.apply(hidden, weight, None, targets, LogitTransform())
    first = torch.autograd.grad(logps, [hidden, weight], grad, retain_graph=True)
    second = torch.autograd.grad(logps, [hidden, weight], grad)
    for expected, actual in zip(first, second, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def _load(folder: Path, model_type: str, **settings: Any) -> nn.Module:
    save_tiny_model(folder, model_type, **settings)
    register("sdpa")
    return load_model(folder, ModelSection(path=str(folder), dtype="float32"))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_whole_model_equal_those_of_its_full_logits(tied: bool, tmp_path: Path) -> None:
    """A tied weight gets the gradients of embedding and head, once each; over two accumulated micro-batches."""
    model = _load(tmp_path, "llama", tie_word_embeddings=tied)
    rng = np.random.default_rng(0)
    batches = [
        collate([PromptCompletions(*_ids(rng, 5), tuple(_ids(rng, 4, 30)))], "padded"),
        collate([PromptCompletions(*_ids(rng, 7), tuple(_ids(rng, 6, 2)))], "padded"),
    ]
    gradients = []
    for plain in (True, False):
        model.zero_grad()
        for batch in batches:
            logps = model(batch, plain=plain)
            (logps * (batch.sequence_of_target - 0.3)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert actual.keys() == expected.keys()
    assert any("lm_head" in name for name in expected) == (not tied)
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def _ids(rng: np.random.Generator, *lengths: int) -> list[np.ndarray]:
    return [rng.integers(3, 61, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LogitTransform(1.0, None)),
        ({"logit_scale": 0.25}, LogitTransform(0.25, None)),
        ({"logits_scaling": 8.0}, LogitTransform(0.125, None)),
        ({"lm_head_multiplier": 2.0}, LogitTransform(2.0, None)),
        ({"final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
        ({"final_logit_softcapping": None, "logit_scale": None}, LogitTransform(1.0, None)),
    ],
)
def test_the_logit_transform_is_read_from_the_configuration(
    settings: dict[str, float | None], expected: LogitTransform
) -> None:
    config = type("Config", (), settings)()
    assert LogitTransform.of_config(config) == expected
