"""Preference losses: tensors and numbers in, tensors out. Knows no model, no recipe and no process group.

Shape suffixes: P pairs, S sequences, C completion tokens of all sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum"]


class PairLogProbs(NamedTuple):
    """Reduced log-probs of a micro-batch's pairs, fp32 [P] each."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor


def reduce_log_probs(
    token_logps_C: Tensor, sequence_of_token_C: Tensor, lengths_S: Tensor, reduction: Reduction
) -> Tensor:
    """One log-prob a sequence, [S]: the sum of its completion tokens' (Rafailov et al. 2023, arXiv 2305.18290,
    eq. 7) or their mean. A sequence without completion tokens gives 0, never NaN.
    """
    sums_S = token_logps_C.new_zeros(len(lengths_S)).index_add(0, sequence_of_token_C, token_logps_C)
    return sums_S if reduction == "sum" else sums_S / lengths_S.clamp(min=1)


def preference_loss(
    policy_chosen_logps_P: Tensor,
    policy_rejected_logps_P: Tensor,
    reference_chosen_logps_P: Tensor,
    reference_rejected_logps_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The DPO loss of each pair, [P]: `-log sigmoid(beta * h)` with `h` the policy's log-ratio of chosen to
    rejected less the reference's (arXiv 2305.18290, eq. 7).

    `label_smoothing` is the assumed share of preferences that are the wrong way round (conservative DPO: Mitchell
    2023, "A note on DPO with noisy preferences", eq. 3).
    """
    policy_logratios_P = policy_chosen_logps_P - policy_rejected_logps_P
    reference_logratios_P = reference_chosen_logps_P - reference_rejected_logps_P
    logits_P = beta * (policy_logratios_P - reference_logratios_P)
    return -((1 - label_smoothing) * F.logsigmoid(logits_P) + label_smoothing * F.logsigmoid(-logits_P))


def implicit_reward(policy_logps_P: Tensor, reference_logps_P: Tensor, *, beta: float) -> Tensor:
    """`beta * (policy - reference)`, [P], without a gradient (arXiv 2305.18290, section 4)."""
    return beta * (policy_logps_P - reference_logps_P).detach()


def preference_accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """1 where chosen is above rejected, 0 where it is below and one half where they are equal, [P]."""
    return (torch.sign(chosen_P - rejected_P) + 1) / 2
