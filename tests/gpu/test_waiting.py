"""Nothing of ours lets the host wait for the GPU inside a micro-batch: the next kernels are launched meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import dpo_scale
from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.model.attention import ATTENTION, Kernel, register
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import LossSection
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.step import PairBatch, run_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class PlainPolicy:
    """A policy without an engine and without an optimizer."""

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        )
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        self.model = CompletionLogProbs(model)

    def __call__(self, batch: MicroBatch) -> Tensor:
        logps_C: Tensor = self.model(batch)
        return logps_C

    def backward(self, loss_sum: Tensor, *, global_pairs: int, is_last: bool) -> None:
        (loss_sum / global_pairs).backward()

    def step(self) -> bool:
        return True

    def grad_norm(self) -> float:
        return 0.0


def _batches(layout: Layout) -> list[PairBatch]:
    """Two micro-batches of two pairs."""
    rng = np.random.default_rng(0)
    made = []
    for first in (0, 2):
        ids = rng.integers(0, 512, (2, 120)).astype(np.int32)
        groups = [PromptCompletions(row[:40], (row[40:70], row[70:])) for row in ids]
        made.append(PairBatch(collate(groups, layout), np.arange(first, first + 2), 1.0))
    return made


@pytest.mark.parametrize(
    ("kernel", "layout"), [("varlen", "shared"), ("varlen", "packed"), ("flex", "shared"), ("sdpa", "padded")]
)
def test_a_step_does_not_wait_for_the_device(kernel: Kernel, layout: Layout) -> None:
    register(kernel)
    policy, device = PlainPolicy(), torch.device("cuda")

    def step(batches: Sequence[PairBatch]) -> None:
        run_step(
            policy,
            batches,
            lambda pairs: np.zeros((len(pairs), 2)),
            MetricSums(device),
            LossSection(beta=0.1),
            global_pairs=4,
            device=device,
        )

    step(_batches(layout))  # what is made or compiled once
    batches = _batches(layout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(batches)
            torch.ones((), device=device).item()  # waits, and must be seen to
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [w for w in caught if w.filename == __file__]
    package = str(Path(dpo_scale.__file__).parent)
    assert not [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if w.filename.startswith(package)]
