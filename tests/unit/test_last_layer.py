"""The last feed-forward computes what is read, and everybody gets what they got before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SERVED, save_tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, Segments, collate
from dpo_scale.model.attention import register
from dpo_scale.model.last_layer import decoder_layers, skip_unread_positions
from dpo_scale.model.loading import checkpoint_activations, load_model
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import ModelSection


def _batch(layout: Layout, seed: int = 0) -> MicroBatch:
    random = np.random.default_rng(seed)
    sizes = ((9, 3, 5), (4, 1, 2), (6, 4, 1))
    tokens = [[random.integers(3, 61, size).astype(np.int32) for size in row] for row in sizes]
    return collate([PromptCompletions(prompt, (chosen, rejected)) for prompt, chosen, rejected in tokens], layout)


def _everywhere(batch: MicroBatch) -> MicroBatch:
    assert batch.segments is not None
    return replace(batch, segments=replace(batch.segments, read=None))


def _model(folder: Path, kind: str) -> CompletionLogProbs:
    register("sdpa")
    model = load_model(save_tiny_model(folder, kind), ModelSection(path=str(folder), dtype="float32"))
    return model.train()


def _last_feed_forward(model: CompletionLogProbs) -> nn.Module:
    layers = decoder_layers(model.model)
    assert layers is not None
    return next(child for name, child in layers[-1].named_children() if name in ("mlp", "block_sparse_moe"))


def _gradients(model: CompletionLogProbs, logps_C: Tensor) -> list[Tensor]:
    model.zero_grad()
    (logps_C * torch.linspace(-1, 1, len(logps_C))).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", list(SERVED))
def test_it_is_computed_where_it_is_read_and_nowhere_else(kind: str, tmp_path: Path) -> None:
    model = _model(tmp_path, kind)
    given: list[Tensor] = []
    _last_feed_forward(model).register_forward_hook(lambda module, inputs, output: given.append(output))
    for layout in ("shared", "packed"):
        batch = _batch(layout)
        model(batch)
        assert (given.pop()[0] != 0).any(-1).nonzero()[:, 0].tolist() == batch.predictors.unique().tolist()
        for other, plain in ((batch, True), (_everywhere(batch), False), (_batch("padded"), False)):
            model(other, plain=plain)
            assert (given.pop().flatten(0, 1)[other.predictors] != 0).any(-1).all()
            assert not given


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(SERVED))
def test_log_probs_and_gradients_are_those_of_computing_everything(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    model = _model(tmp_path, kind)
    if checkpointing:
        checkpoint_activations(model, dropout=False)
    for layout in ("shared", "packed"):
        batch = _batch(layout)
        expected_C = model(_everywhere(batch))
        expected = _gradients(model, expected_C)
        actual_C = model(batch)
        model(_batch("padded", seed=1))  # what is read next is nothing to a backward pass that comes later
        actual = _gradients(model, actual_C)
        assert torch.allclose(actual_C, expected_C, atol=1e-5)
        assert len(actual) == len(expected)
        for ours, wanted in zip(actual, expected, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


class _Attention(nn.Module):
    """Whatever takes more than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        output: Tensor = self.project(hidden)
        return output


class _Experts(nn.Module):
    """Experts that give their routing beside their output, where they are asked to."""

    def __init__(self, routing: bool) -> None:
        super().__init__()
        self.routing, self.expert = routing, nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Any:
        return (self.expert(hidden), hidden.sum(-1)) if self.routing else self.expert(hidden)


class _Layer(nn.Module):
    def __init__(self, routing: bool, experts_first: bool) -> None:
        super().__init__()
        self.attention, self.experts, self.experts_first = _Attention(), _Experts(routing), experts_first

    def forward(self, hidden: Tensor, segments: Segments) -> Any:
        if self.experts_first:
            return self.attention(self.experts(hidden), segments=segments)
        return self.experts(self.attention(hidden, segments=segments))


class _Decoder(nn.Module):
    def __init__(self, *, routing: bool = False, experts_first: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(routing, experts_first)])
        self.config = LlamaConfig(num_hidden_layers=layers)


@pytest.mark.parametrize(
    ("settings", "everywhere"), [({}, False), ({"routing": True}, True), ({"experts_first": True}, True)], ids=str
)
def test_layers_that_nobody_knows(settings: dict[str, bool], everywhere: bool) -> None:
    """What gives more than hidden states, or runs before it is known what is read, computes everything."""
    model = _Decoder(**settings)
    (layer,) = model.layers
    experts: Any = layer.experts
    assert skip_unread_positions(model) is experts
    segments = _batch("shared").segments
    assert segments is not None
    rows: list[int] = []
    experts.expert.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    for _ in range(3):
        layer(torch.randn(1, 30, 8), segments=segments)
        assert segments.read is not None
        assert rows[-1] == (30 if everywhere else len(segments.read))


def test_a_model_without_such_a_list_of_layers_is_left_alone() -> None:
    assert skip_unread_positions(_Decoder(layers=3)) is None
