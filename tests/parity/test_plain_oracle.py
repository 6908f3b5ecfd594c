"""The whole way from pairs to gradients against DPO written plainly, in float64."""

from __future__ import annotations

import pytest
import torch
from plain_dpo import assert_same_gradients, gradients, plain_losses
from tiny_llamas import VOCABULARY, our_llama, plain_llama, random_pairs

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.model import log_probs
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.objectives import Reduction, preference_loss, reduce_log_probs

POLICY, REFERENCE = 1, 2
BETA = {"sum": 0.1, "mean": 2.0}
HEADS = {"untied": {}, "tied": {"tied": True}, "biased": {"biased_head": True}}
TOLERANCE = 1e-6
"""The library computes norms, rotary angles and the plain attention's softmax in fp32 even in a float64 model."""

_expected: dict[tuple[str, str, float], tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}


def expected(head: str, reduction: str, label_smoothing: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the plain form, computed once."""
    key = head, reduction, label_smoothing
    if key not in _expected:
        policy = plain_llama(POLICY, **HEADS[head])
        losses_P = plain_losses(
            policy,
            plain_llama(REFERENCE, **HEADS[head]),
            random_pairs(),
            beta=BETA[reduction],
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        losses_P.mean().backward()
        _expected[key] = losses_P.detach(), gradients(policy)
    return _expected[key]


def both_sides(model: CompletionLogProbs, batch: MicroBatch, reduction: Reduction) -> tuple[torch.Tensor, torch.Tensor]:
    logps_S = reduce_log_probs(model(batch), batch.sequence_of_target, batch.lengths, reduction)
    return logps_S[0::2], logps_S[1::2]


def assert_plain(layout: Layout, reduction: Reduction, label_smoothing: float, head: str) -> None:
    policy, reference = our_llama(POLICY, **HEADS[head]), our_llama(REFERENCE, **HEADS[head])
    batch = collate([PromptCompletions.of_pair(pair) for pair in random_pairs()], layout)
    assert len(batch.targets) > 3 * 23, "several chunks, the last one partial"
    with torch.no_grad():
        reference_chosen_P, reference_rejected_P = both_sides(reference, batch, reduction)
    actual_P = preference_loss(
        *both_sides(policy, batch, reduction),
        reference_chosen_P,
        reference_rejected_P,
        beta=BETA[reduction],
        label_smoothing=label_smoothing,
    )
    actual_P.mean().backward()

    expected_P, expected_gradients = expected(head, reduction, label_smoothing)
    assert actual_P.dtype == torch.float64
    torch.testing.assert_close(actual_P.detach(), expected_P, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same_gradients(gradients(policy.model), expected_gradients, TOLERANCE)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_losses_and_gradients_are_those_of_the_plain_form(
    layout: Layout, reduction: Reduction, label_smoothing: float, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", 23 * VOCABULARY)
    assert_plain(layout, reduction, label_smoothing, head)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("tokens", [16, 10_000])
def test_the_chunk_size_changes_nothing(tokens: int, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", tokens * VOCABULARY)
    assert_plain("shared", "mean", 0.0, head)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_frozen_model_gives_the_same_log_probs(layout: Layout) -> None:
    model = our_llama(POLICY)
    batch = collate([PromptCompletions.of_pair(pair) for pair in random_pairs()], layout)
    expected_C = model(batch).detach()
    model.requires_grad_(False)
    torch.testing.assert_close(model(batch), expected_C, rtol=0.0, atol=0.0)
