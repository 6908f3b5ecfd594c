"""Which layout a model can be trained in: decided by trying it on real pairs, not by a list of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.errors import UserError
from dpo_scale.model.attention import observe
from dpo_scale.model.fused import why_no_kernels
from dpo_scale.model.log_probs import CompletionLogProbs

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest difference of one token's log-prob, in nats, between two layouts: rounding of other kernels and shapes,
far below what a wrong position, mask or head gives."""


FIRST_PAIRS = 2


class Engine(Protocol):
    """A policy or reference engine."""

    @property
    def model(self) -> CompletionLogProbs: ...
    def __call__(self, batch: MicroBatch, *, plain: bool = False) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The layout in use, the largest gap to the plain form in nats a token, and why others were passed over."""

    layout: Layout
    gap: float
    passed_over: tuple[str, ...]
    no_kernels: str
    """Why a GPU runs without Triton's kernels, if it does."""

    def describe(self, role: str) -> list[str]:
        """Lines for the console: what was passed over, and what is in use."""
        return [
            *(f"  not {reason}" for reason in self.passed_over),
            f"Layout of the {role}: {self.layout} (largest gap to the plain form {self.gap:.1e} nats a token)",
            *([f"  slower than it could be, Triton does not run: {self.no_kernels}"] if self.no_kernels else []),
        ]


@torch.no_grad()
def check_layout(
    engine: Engine,
    pairs: TokenPairs,
    *,
    wanted: str,
    dtype: torch.dtype,
    device: torch.device,
    pad_id: int,
) -> LayoutChoice:
    """Choose the layout by comparing with the model's own forward over each sequence by itself, and its logits.

    Compared are the longest sequence, where windows and position limits show, the shortest, for which some models
    rotate positions otherwise, and the first pairs, the same on all ranks. `auto` falls back from shared to packed to
    padded and says why. Raises UserError if the layout that was asked for, or the last resort, disagrees with the
    plain form.
    """
    sequences = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)
    longest, shortest = int(np.argmax(sequences)), int(np.argmin(sequences))
    indices = dict.fromkeys([longest, *range(min(FIRST_PAIRS, len(pairs))), shortest])
    samples = [PromptCompletions.of_pair(pairs[index]) for index in indices]
    expected = []
    for sample in samples:
        for completion in sample.completions:
            sequence = PromptCompletions(sample.prompt, (completion,))
            expected.append(engine(collate([sequence], "padded", pad_id).to(device), plain=True))
    if not torch.cat(expected).isfinite().all():
        raise UserError(
            "the model's own forward gives log-probs that are not finite: its weights are damaged, or it needs more "
            "range than model.dtype has"
        )
    num_layers = engine.model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    candidates: tuple[Layout, ...] = ("shared", "packed", "padded")
    passed_over: list[str] = []
    for layout in candidates:
        if wanted not in ("auto", layout):
            continue
        with observe() as observation:
            actual = engine(collate(samples, layout, pad_id).to(device))
        reason = observation.reason_against(num_layers) if layout != "padded" else None
        if reason is not None:
            passed_over.append(f"{layout}: {reason}")
            continue
        gap = (actual - torch.cat(expected)).abs().max().item()
        if gap <= TOLERANCE[dtype]:  # false for NaN
            return LayoutChoice(layout, gap, tuple(passed_over), why_no_kernels(device))
        passed_over.append(
            f"{layout}: a token's log-prob differs by {gap:.3g} nats from the model's plain forward "
            f"(tolerance {TOLERANCE[dtype]})"
        )
    remedy = "" if wanted == "auto" else "\nbatch.layout: auto takes the fastest that does"
    remedy += _remedy_of_positions(engine.model.config.get_text_config())  # type: ignore[union-attr, operator]
    reasons = "\n  ".join(passed_over)
    raise UserError(f"batch.layout: {wanted} does not give this model's log-probs\n  {reasons}{remedy}")


def _remedy_of_positions(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in ("longrope", "dynamic"):
        return ""
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return (
        f"\n{kind} positions depend on the longest sequence of a micro-batch where it is longer than {limit} tokens; "
        f"data.max_length: {limit} keeps all below"
    )
