"""The policy of a step on one process: torch's own AdamW and clipping, no DeepSpeed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from plain_dpo import gradients
from torch import Tensor, nn

from dpo_scale.data.layouts import MicroBatch, PromptCompletions, collate
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.objectives import Reduction, reduce_log_probs
from dpo_scale.training.step import ReferenceLogps


class OneProcessPolicy:
    """What `run_step` needs; keeps the gradients of the last step as they were before clipping."""

    def __init__(
        self, model: CompletionLogProbs, *, learning_rate: float = 0.0, max_grad_norm: float = float("inf")
    ) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        self._max_grad_norm = max_grad_norm
        self._norm = float("nan")

    def __call__(self, batch: MicroBatch) -> Tensor:
        logps_C: Tensor = self.model(batch)
        return logps_C

    def backward(self, loss_sum: Tensor, *, global_pairs: int, is_last: bool) -> None:
        (loss_sum / global_pairs).backward()

    def step(self) -> bool:
        self.gradients = gradients(self.model.model)
        self._norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return True

    def grad_norm(self) -> float:
        return self._norm


def reference_of(model: CompletionLogProbs, pairs: TokenPairs, reduction: Reduction) -> ReferenceLogps:
    """Every pair scored once, as training looks it up."""
    batch = collate([PromptCompletions.of_pair(pair) for pair in pairs], "shared")
    with torch.no_grad():
        logps_C = model(batch)
    logps_S = reduce_log_probs(logps_C, batch.sequence_of_target, batch.lengths, reduction)
    table = logps_S.double().numpy().reshape(-1, 2)

    def look_up(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return table[indices]

    return look_up
