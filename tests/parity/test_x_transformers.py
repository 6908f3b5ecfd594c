"""The published form of the mean objective, x-transformers' DPO, fed masks that are aligned to the target."""

from __future__ import annotations

import pytest
import torch
from plain_dpo import assert_same_gradients, gradients, pad_pairs
from tiny_llamas import our_llama, plain_llama, random_pairs
from torch import Tensor, nn

from dpo_scale.data.layouts import Layout, PromptCompletions, collate
from dpo_scale.objectives import preference_loss, reduce_log_probs

published = pytest.importorskip("x_transformers.dpo", reason="x-transformers is a test extra")
POLICY, REFERENCE, BETA = 1, 2, 2.0


class Logits(nn.Module):
    """A Llama called as x-transformers calls its models: tokens in, logits out, padding unmasked on the right."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.llama = plain_llama(seed)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.llama(input_ids=tokens).logits
        return logits


def published_dpo() -> nn.Module:
    """Its DPO, whose reference is a copy of the policy, with a reference of our own choice."""
    dpo: nn.Module = published.DPO(Logits(POLICY), beta=BETA)
    dpo.ref_model.load_state_dict(Logits(REFERENCE).state_dict())
    return dpo


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_loss_and_gradients_are_those_of_x_transformers(layout: Layout) -> None:
    rows, dpo = pad_pairs(random_pairs()), published_dpo()
    expected = dpo(  # a mask one shorter than the sequences is taken as the targets' own
        rows.chosen,
        rows.rejected,
        prompt_mask=rows.is_prompt[:, 1:],
        preferred_seq_mask=~rows.chosen_is_padding[:, 1:],
        unpreferred_seq_mask=~rows.rejected_is_padding[:, 1:],
    )
    expected.backward()

    policy, reference = our_llama(POLICY), our_llama(REFERENCE)
    batch = collate([PromptCompletions.of_pair(pair) for pair in random_pairs()], layout)
    with torch.no_grad():
        reference_S = reduce_log_probs(reference(batch), batch.sequence_of_target, batch.lengths, "mean")
    policy_S = reduce_log_probs(policy(batch), batch.sequence_of_target, batch.lengths, "mean")
    actual = preference_loss(policy_S[0::2], policy_S[1::2], reference_S[0::2], reference_S[1::2], beta=BETA).mean()
    actual.backward()

    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_same_gradients(gradients(policy.model), gradients(dpo.policy_model.llama), 1e-6)


def test_masks_of_the_sources_own_length_score_other_tokens() -> None:
    """As published, the first completion token is left out and the first padding token counts: not what we compute."""
    rows = pad_pairs(random_pairs())
    masks = {
        "prompt_mask": rows.is_prompt,
        "preferred_seq_mask": ~rows.chosen_is_padding,
        "unpreferred_seq_mask": ~rows.rejected_is_padding,
    }
    dpo = published_dpo()
    with torch.no_grad():
        by_source = dpo(rows.chosen, rows.rejected, **masks)
        by_target = dpo(rows.chosen, rows.rejected, **{name: mask[:, 1:] for name, mask in masks.items()})
    assert abs(by_source - by_target) > 1e-3
