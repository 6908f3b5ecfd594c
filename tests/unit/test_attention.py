"""Shared, packed and padded give what the model's own eager attention gives, on every architecture."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SERVED, VOCABULARY, WINDOW, save_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpo_scale.data.layouts import Layout, PromptCompletions, Segment, Segments, collate
from dpo_scale.errors import UserError
from dpo_scale.model import attention, flex_attention
from dpo_scale.model.attention import (
    UnsupportedAttentionError,
    choose_kernel,
    observe,
    register,
    segment_attention,
)
from dpo_scale.model.loading import checkpoint_activations, load_model
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import ModelSection

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
CPU = torch.device("cpu")


def _token_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, VOCABULARY, length).astype(np.int32)


def _pairs() -> list[PromptCompletions]:
    """Longer than the window on both sides of the prompt's end; completions of one token; a prompt of one token."""
    rng = np.random.default_rng(0)
    lengths = [(9, 11, 7), (3, 1, 5), (14, 4, 12), (1, 6, 1)]
    return [PromptCompletions(_token_ids(rng, p), (_token_ids(rng, c), _token_ids(rng, r))) for p, c, r in lengths]


def _sign_and_length_weights(groups: Sequence[PromptCompletions]) -> list[float]:
    """A weight a sequence that tells chosen from rejected, as a preference loss does."""
    return [sign * (1 + 0.1 * n) for n, _ in enumerate(groups) for sign in (1.0, -1.0)]


def _eager_log_prob_sums(model: nn.Module, groups: Sequence[PromptCompletions]) -> Tensor:
    """The plain form, written out: right-padded rows, every logit, one log-softmax, [S]."""
    rows = [(len(group.prompt), [*group.prompt, *completion]) for group in groups for completion in group.completions]
    width = max(len(tokens) for _, tokens in rows)
    input_ids = torch.tensor([[int(t) for t in tokens] + [0] * (width - len(tokens)) for _, tokens in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for _, tokens in rows])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    sums = []
    for row, (num_prompt, tokens) in enumerate(rows):
        logps = logits[row].log_softmax(-1)
        sums.append(torch.stack([logps[at - 1, int(tokens[at])] for at in range(num_prompt, len(tokens))]).sum())
    return torch.stack(sums)


def _log_prob_sums(model: CompletionLogProbs, groups: Sequence[PromptCompletions], layout: Layout) -> Tensor:
    batch = collate(groups, layout)
    return torch.zeros(len(batch.lengths)).index_add(0, batch.sequence_of_target, model(batch))


def _gradients(model: nn.Module, sums_S: Tensor, groups: Sequence[PromptCompletions]) -> dict[str, Tensor]:
    model.zero_grad()
    (sums_S * torch.tensor(_sign_and_length_weights(groups))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _relative_gap(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative gap of a parameter's gradient; one far below the others' size counts against those."""
    assert actual.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    gaps = [(actual[name] - expected[name]).norm() / (expected[name].norm() + 0.01 * total) for name in expected]
    return float(torch.stack(gaps).max())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(model_type: str) -> Path:
        return save_tiny_model(root / model_type, model_type)

    return folder


def _load(folder: Path, **settings: Any) -> CompletionLogProbs:
    register("sdpa")
    return load_model(folder, ModelSection(path=str(folder), dtype="float32", **settings))


@functools.cache
def _expected(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-prob sums [S] and gradients of the library's model with its own eager attention, without this package."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sums = _eager_log_prob_sums(model, _pairs())
    return sums.detach(), _gradients(model, sums, _pairs())


@pytest.mark.parametrize("model_type", SERVED)
def test_every_layout_agrees_with_the_models_own_eager_forward(model_type: str, model_folder: Any) -> None:
    folder = model_folder(model_type)
    expected_sums, expected_gradients = _expected(folder)
    model = _load(folder).eval()
    for layout in LAYOUTS:
        with observe() as observation:
            actual_sums = _log_prob_sums(model, _pairs(), layout)
        assert (actual_sums - expected_sums).abs().max() < 1e-4, layout
        actual_gradients = _gradients(model.model, actual_sums, _pairs())
        assert _relative_gap(actual_gradients, expected_gradients) < 1e-5, layout
        if layout != "padded":
            assert observation.reason_against(model.config.num_hidden_layers) is None


@pytest.mark.parametrize("model_type", SERVED)
def test_recomputed_activations_change_nothing_in_training(model_type: str, model_folder: Any) -> None:
    folder = model_folder(model_type)
    expected_sums, expected_gradients = _expected(folder)
    model = _load(folder)
    checkpoint_activations(model, dropout=False)
    model.train()
    for layout in LAYOUTS:
        actual_sums = _log_prob_sums(model, _pairs(), layout)
        assert (actual_sums - expected_sums).abs().max() < 1e-4, layout
        assert _relative_gap(_gradients(model.model, actual_sums, _pairs()), expected_gradients) < 1e-5, layout


def test_the_tiny_models_show_a_window_and_a_cap_that_are_ignored(model_folder: Any) -> None:
    """Guards the tests above: what they are to catch is far above their tolerance."""
    for model_type, settings in (
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma3_text", {"sliding_window": 100}),
        ("phi3", {"sliding_window": None}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ):
        folder = model_folder(model_type)
        changed = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **settings
        )
        with torch.no_grad():
            gap = (_eager_log_prob_sums(changed.eval(), _pairs()) - _expected(folder)[0]).abs().max()
        assert gap > 1e-2, (model_type, settings)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("gpt_bigcode", {"n_layer": 2, "n_head": 4, "n_embd": 32}),
        ("seed_oss", {"residual_dropout": 0.5}),
        ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.4, "input_jitter_noise": 0.4}),
    ],
)
def test_dropout_is_off_in_training_unless_asked_for(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, model_type, **settings)
    groups = _pairs()
    off, on = _load(folder).train(), _load(folder, dropout=True).train()
    torch.manual_seed(0)
    assert torch.equal(_log_prob_sums(off, groups, "shared"), _log_prob_sums(off, groups, "shared"))
    assert not torch.allclose(_log_prob_sums(on, groups, "shared"), _log_prob_sums(on, groups, "shared"))


def _one_mask(segments: Segments, positions: np.ndarray, window: int | None) -> Tensor:
    """The whole [T, T] mask from first principles: who a token descends from, and how far back that is."""
    mask = np.zeros((len(positions), len(positions)), dtype=bool)
    for segment in segments.segments:
        for query in range(segment.start, segment.stop):
            ancestors = np.r_[segment.prefix_start : segment.prefix_stop, segment.start : query + 1]
            near = positions[query] - positions[ancestors] < (window or len(positions))
            mask[query, ancestors[near]] = True
    return torch.from_numpy(mask)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("window", [None, 1, WINDOW, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_kernels_equal_one_softmax_over_the_masked_row(
    kernel: attention.Kernel, layout: Layout, window: int | None, softcap: float | None
) -> None:
    batch = collate(_pairs(), layout)
    assert batch.segments is not None
    torch.manual_seed(0)
    length, heads, kv_heads, size = batch.input_ids.shape[1], 4, 2, 16
    query = torch.randn(1, heads, length, size)
    key, value = torch.randn(2, 1, kv_heads, length, size).unbind()

    scores = 0.3 * torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double().repeat_interleave(2, 1))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    mask = _one_mask(batch.segments, batch.position_ids[0].numpy(), window)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(2, 1)).transpose(1, 2)

    with torch.no_grad():
        actual = segment_attention(
            query,
            key,
            value,
            batch.segments,
            kernel=kernel,
            scaling=0.3,
            sliding_window=window,
            softcap=softcap,
        )
    assert actual.shape == (1, length, heads, size)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_is_compiled_whole_with_its_backward_pass(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a CPU goes: without code for a device. torch has no backward pass there, but can trace one."""
    module = sys.modules["torch.nn.attention.flex_attention"]
    monkeypatch.setattr(module, "_validate_device", lambda *states: None, raising=False)
    torch.compiler.reset()
    run = torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "flex_attention", run)
    segments = collate(_pairs(), "shared").segments
    assert segments is not None
    torch.manual_seed(0)
    length = segments.segments[-1].stop
    states = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (4, 2, 2)]

    def gradients(kernel: attention.Kernel) -> tuple[torch.Tensor, ...]:
        output = segment_attention(*states, segments, kernel=kernel, softcap=softcap)
        return torch.autograd.grad(output.square().sum(), states)

    for ours, plain in zip(gradients("flex"), gradients("sdpa"), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("window", [None, 1, 150, 1000])
def test_the_blocks_of_flex_attention_are_those_of_the_whole_mask(layout: Layout, window: int | None) -> None:
    """Blocks that a kernel skips, masks or takes whole; the last one of a row is not full."""
    lengths = [(300, 1, 300), (130, 257, 64), (1, 1, 90), (300, 17, 1), (128, 256, 0), (5, 0, 300), (600, 2, 2)]
    groups = [
        PromptCompletions(np.zeros(p, np.int32), (np.zeros(c, np.int32), np.zeros(r, np.int32))) for p, c, r in lengths
    ]
    batch = collate(groups, layout)
    assert batch.segments is not None
    whole = _one_mask(batch.segments, batch.position_ids[0].numpy(), window)
    mask = flex_attention._block_mask(batch.segments, window, CPU)

    length, size = len(whole), flex_attention.BLOCK_SIZE
    assert length % size
    padded = torch.nn.functional.pad(whole, (0, -length % size, 0, -length % size))
    share = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).float().mean((1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), share > 0)
    full = torch.zeros_like(share, dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for row, (number, indices) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        full[row, indices[:number].long()] = True
    assert torch.equal(full, share == 1)
    query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key), whole)


def test_masks_are_made_once_for_all_layers_of_a_kind(monkeypatch: pytest.MonkeyPatch, model_folder: Any) -> None:
    """Gemma 3 here has a windowed layer and a full one; a second forward of the micro-batch makes none."""
    made = []
    plain = attention._causal_mask

    def counted(segment: Segment, sliding_window: int | None, *rest: Any) -> Tensor | None:
        made.append((segment, sliding_window))
        return plain(segment, sliding_window, *rest)

    monkeypatch.setattr(attention, "_causal_mask", counted)
    model = _load(model_folder("gemma3_text"))
    batch = collate(_pairs(), "shared")
    assert batch.segments is not None
    for _ in range(2):
        model(batch)
    assert made == [(segment, window) for window in (WINDOW, None) for segment in batch.segments.segments]
    assert not batch.to("cpu").segments.masks, "masks of another device"  # type: ignore[union-attr]


def test_the_scale_defaults_to_the_inverse_root_of_the_head_size() -> None:
    batch = collate(_pairs(), "shared")
    query, key, value = torch.randn(3, 1, 2, batch.input_ids.shape[1], 16).unbind()
    given = segment_attention(query, key, value, batch.segments, kernel="sdpa", scaling=0.25)
    assert torch.equal(segment_attention(query, key, value, batch.segments, kernel="sdpa"), given)


@pytest.mark.parametrize(("kernel", "size"), [("varlen", 20), ("varlen", 320), ("flash_attn", 320)])
def test_sizes_of_heads_that_a_kernel_does_not_take_are_computed_by_segment(
    kernel: attention.Kernel, size: int
) -> None:
    batch = collate(_pairs(), "shared")
    assert batch.segments is not None
    query, key, value = torch.randn(3, 1, 2, batch.input_ids.shape[1], size).unbind()
    by_segment = segment_attention(query, key, value, batch.segments, kernel="sdpa")
    assert torch.equal(segment_attention(query, key, value, batch.segments, kernel=kernel), by_segment)


def test_extra_tensors_are_refused_and_noted_while_observed() -> None:
    segments = Segments.build([Segment(0, 4)])
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnsupportedAttentionError, match="s_aux"):
        segment_attention(states, states, states, segments, kernel="sdpa", s_aux=torch.zeros(2))
    with observe() as observation:
        segment_attention(states, states, states, segments, kernel="sdpa", s_aux=torch.zeros(2))
        segment_attention(states, states, states, segments, kernel="sdpa", position_ids=torch.arange(4))
    assert "s_aux" in str(observation.reason_against(0))
    assert "position_ids" not in str(observation.reason_against(0))


def test_a_kernel_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert choose_kernel("auto", CPU, torch.bfloat16) == "sdpa"
    assert choose_kernel("sdpa", CPU, torch.float32) == "sdpa"
    with pytest.raises(UserError, match=r"model\.attention: varlen does not run on cpu .* use auto or sdpa"):
        choose_kernel("varlen", CPU, torch.bfloat16)


@pytest.mark.parametrize(("capability", "kernels"), [((7, 5), {"flex"}), ((8, 0), {"varlen", "flash_attn"})])
def test_a_gpu_before_ampere_gets_no_kernel_that_refuses_it(
    capability: tuple[int, int], kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for installed in ("torch.nn.attention.varlen", "flash_attn"):
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name, only=installed: name == only or None)
        assert choose_kernel("auto", torch.device("cuda"), torch.float16) in kernels
