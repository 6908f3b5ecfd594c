"""Sums and counts kept on the device, reduced over ranks once a log interval; and where the numbers go."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.files import naming, write_parts
from dpo_scale.objectives import PairLogProbs, implicit_reward, preference_accuracy

AVERAGES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracy",
)
"""Means over pairs. logps/accuracy is the share of pairs whose chosen completion the policy alone finds likelier."""

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A100X": 312e12,
    "B200": 2250e12,
}
"""Dense bf16 peak of a GPU, from NVIDIA's data sheets, by words of its name; the first whose words are all in it."""


class MetricSums:
    """Weighted sums over pairs; nothing leaves the device until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float64 if device.type != "mps" else torch.float32
        self._sums = torch.zeros(len(AVERAGES) + 1, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, losses_P: Tensor, logps: PairLogProbs, *, beta: float, weight: float = 1.0) -> None:
        """Add the pairs of one micro-batch; pairs of weight 0 are filler."""
        policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P = logps
        chosen_P = implicit_reward(policy_chosen_P, reference_chosen_P, beta=beta)
        rejected_P = implicit_reward(policy_rejected_P, reference_rejected_P, beta=beta)
        values = torch.stack(
            [
                losses_P,
                chosen_P,
                rejected_P,
                preference_accuracy(chosen_P, rejected_P),
                policy_chosen_P,
                policy_rejected_P,
                preference_accuracy(policy_chosen_P, policy_rejected_P),
                torch.ones_like(losses_P),
            ]
        )
        self._sums += (values * weight).sum(1)

    def __iadd__(self, other: MetricSums) -> MetricSums:
        self._sums += other._sums
        return self

    def total(self, ranks: Ranks) -> tuple[float, ...]:
        """The sums over all ranks so far, to go on from with `start_from`; collective.

        Sums of fp32 values in float64 are exact, so it does not matter which rank goes on with them.
        """
        return tuple(ranks.sum(self._sums.clone()).tolist())

    def start_from(self, total: Sequence[float]) -> None:
        """Go on, on one rank, with what all had summed up."""
        self._sums += self._sums.new_tensor(total)

    def reduce(self, ranks: Ranks, prefix: str = "") -> dict[str, float]:
        """Means over all pairs of all ranks since the last call, and the margin; collective."""
        *sums, pairs = ranks.sum(self._sums).tolist()
        self._sums.zero_()
        means = {name: value / max(1.0, pairs) for name, value in zip(AVERAGES, sums, strict=True)}
        means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
        return {prefix + name: value for name, value in means.items()}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 peak of a GPU by its name; None where it is not known, as of a part of a GPU that is shared (MIG)."""
    words = set(re.split(r"[\s-]+", gpu))
    if "MIG" in words:
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if words >= set(name.split())), None)


def model_flops_utilization(macs: float, seconds: float, world_size: int, device: torch.device) -> float | None:
    """Share of the GPUs' dense bf16 peak that went into the model.

    Counted are 2 flops a multiply-accumulate and three times the forward (one forward, twice that backward), for the
    tokens that were processed; recomputed activations and logits do not count. None where the peak is not known.
    """
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else 6 * macs / (seconds * world_size * peak)


class MetricsFile:
    """`metrics.jsonl`: one object a logged step, appended whole."""

    def __init__(self, path: Path) -> None:
        """Open the file to add to it; what is no logged line goes, as one that was cut off by a kill."""
        self._path = path
        self.unreadable = self._keep(math.isfinite)
        """How many lines went."""

    def go_back_to(self, step: int) -> None:
        """Drop what a run that was killed logged after the checkpoint it now goes on from.

        At step 0 that is all, and a file with logged steps stays as `metrics.jsonl.before-...`.
        """
        if step == 0 and any(_step_of(line) > 0 for line in _lines(self._path)):
            os.replace(self._path, self._path.with_name(f"{self._path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
        self._keep(lambda logged: step > 0 and logged <= step)

    def _keep(self, wanted: Callable[[float], bool]) -> int:
        """Keep the lines of the steps that are wanted; returns how many went."""
        went = sum(not wanted(_step_of(line)) for line in _lines(self._path))
        if went or not self._path.exists():
            write_parts(self._path, (line.encode() for line in _lines(self._path) if wanted(_step_of(line))))
        return went

    def write(self, values: Mapping[str, float]) -> None:
        with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def settle(self) -> None:
        """Bring what was written to the disk: a checkpoint must not outlive the lines before it in a power cut."""
        with naming(self._path), open(self._path, "rb") as file:
            os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[str]:
    """The lines with their ends, one at a time: there may be a million."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


_BEGINNING = re.compile(r'\{"step": (\d+), ')


def _step_of(line: str) -> float:
    """The step of a logged line; infinity for one that was cut off by a kill or is damaged."""
    if not line.endswith("\n"):
        return math.inf
    if line.endswith("}\n") and line.count("{") == 1 and (beginning := _BEGINNING.match(line)):
        return float(beginning[1])  # not parsed to the end: of a million lines that takes long
    try:
        step = float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if math.isfinite(step) else math.inf
