"""What a command tells the processes that it measures, and what they tell back."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
PROFILED_STEPS = 4, 7
"""The profiler runs from the end of one of these steps to that of the other."""


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement, the same for every side that takes part in it."""

    model: str
    """Folder of the model and its tokenizer."""
    pairs: str
    """JSONL with prompt, chosen and rejected, in the order in which steps take them."""
    recipe: str
    """Our recipe; its training data are the same pairs, in an order that our plan turns into that one."""
    deepspeed: str
    """DeepSpeed JSON of the policy."""
    step_pairs: int
    steps: int
    """Optimizer steps, those that warm up included."""
    beta: float
    learning_rate: float
    dtype: str
    seed: int
    activation_checkpointing: bool = False
    micro_batch_pairs: int | None = None
    """Pairs that TRL takes into one micro-batch on one rank; None means all that the rank has of a step."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))


@dataclass(slots=True)
class Measured:
    """What one rank saw."""

    starts: list[float] = field(default_factory=list)
    """Clock at the start of each optimizer step but the first, seconds."""
    ends: list[float] = field(default_factory=list)
    """Clock at the end of each optimizer step, seconds."""
    cpu_ends: list[float] = field(default_factory=list)
    """CPU seconds of all threads of the process, up to the end of each optimizer step."""
    losses: list[float] = field(default_factory=list)
    """Logged loss of each step."""
    tokens: int = 0
    """Tokens of all prompts and completions, each prompt once: equal on all sides that read the same pairs."""
    baseline_mib: float = 0.0
    """Memory after the imports, before anything is loaded."""
    peak_mib: float = 0.0
    """Most memory up to the end of the last step."""
    scoring_seconds: float = 0.0
    """The reference pass, from its first micro-batch to the stored rows."""
    scoring_cpu_seconds: float = 0.0

    def end_step(self) -> None:
        """Note the end of a step and the memory so far, and wait for the turn of the next step."""
        _wait_for_device()
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.peak_mib = peak_memory_mib()
        _wait_for_turn()
        self.starts.append(time.perf_counter())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Measured:
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**values)


TURNS = "BENCHMARK_TURNS"
"""Environment variable with two file descriptors: where to say that a step is done, where to wait for the next."""


def _wait_for_turn() -> None:
    """Let the other sides take their step; other ranks of this side wait for this one in their collectives."""
    if TURNS in os.environ:
        done, turn = (int(number) for number in os.environ[TURNS].split())
        os.write(done, b".")
        os.read(turn, 1)


def memory_mib() -> float:
    """Memory of this process now: allocated on the GPU, or resident where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    return _status_kib("VmRSS") / 1024


def peak_memory_mib() -> float:
    """The most that `memory_mib` ever was."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return _status_kib("VmHWM") / 1024


def reset_peak_memory() -> None:
    """Let `peak_memory_mib` begin anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise AssertionError(f"the kernel does not report {key}")


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
