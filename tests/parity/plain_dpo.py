"""DPO written plainly: padded rows, boolean masks, the library's own forward. The oracle of this folder.

Shape suffixes: P pairs, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_scale.data.token_pairs import TokenPair

PAD = 0


@dataclass(frozen=True)
class PaddedPairs:
    """Both sequences of each pair, prompt first, padded on the right to one width, [P, T] each."""

    chosen: Tensor
    rejected: Tensor
    is_prompt: Tensor
    chosen_is_padding: Tensor
    rejected_is_padding: Tensor


def pad_pairs(pairs: Iterable[TokenPair]) -> PaddedPairs:
    pairs = list(pairs)
    chosen = [[*pair.prompt.tolist(), *pair.chosen.tolist()] for pair in pairs]
    rejected = [[*pair.prompt.tolist(), *pair.rejected.tolist()] for pair in pairs]
    width = max(len(row) for row in chosen + rejected)

    def padded(rows: Sequence[list[int]]) -> Tensor:
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    def from_position(starts: Sequence[int]) -> Tensor:
        return torch.arange(width)[None] >= torch.tensor(starts)[:, None]

    return PaddedPairs(
        chosen=padded(chosen),
        rejected=padded(rejected),
        is_prompt=~from_position([len(pair.prompt) for pair in pairs]),
        chosen_is_padding=from_position([len(row) for row in chosen]),
        rejected_is_padding=from_position([len(row) for row in rejected]),
    )


def sequence_logps(
    model: nn.Module, tokens_PT: Tensor, is_prompt_PT: Tensor, is_padding_PT: Tensor, reduction: str
) -> Tensor:
    """The log-prob of each row's completion, [P]."""
    logits = model(input_ids=tokens_PT, attention_mask=(~is_padding_PT).long()).logits
    every_logp = logits.log_softmax(-1)
    target_logps = every_logp[:, :-1].gather(2, tokens_PT[:, 1:, None]).squeeze(2)
    counts = ~(is_prompt_PT | is_padding_PT)[:, 1:]
    sums = target_logps.masked_fill(~counts, 0.0).sum(1)
    return sums if reduction == "sum" else sums / counts.sum(1).clamp(min=1)


def plain_losses(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Iterable[TokenPair],
    *,
    beta: float,
    reduction: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The DPO loss of each pair, [P], with gradients for the policy."""
    rows = pad_pairs(pairs)

    def both_sides(model: nn.Module) -> tuple[Tensor, Tensor]:
        chosen = sequence_logps(model, rows.chosen, rows.is_prompt, rows.chosen_is_padding, reduction)
        rejected = sequence_logps(model, rows.rejected, rows.is_prompt, rows.rejected_is_padding, reduction)
        return chosen, rejected

    with torch.no_grad():
        reference_chosen, reference_rejected = both_sides(reference)
    policy_chosen, policy_rejected = both_sides(policy)
    preferred = torch.sigmoid(beta * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)))
    return -(1 - label_smoothing) * preferred.log() - label_smoothing * (1 - preferred).log()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient, by name."""
    collected = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        collected[name] = parameter.grad.clone()
    return collected


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to a tolerance relative to the largest element of each parameter's gradient."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(
            actual[name], gradient, rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
