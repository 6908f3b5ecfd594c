"""Runs sides in turns, A B A B, each time in fresh processes; medians, spread, tables and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measuring import TURNS, Job, Measured
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PACKAGES = ("dpo_scale", "torch", "transformers", "accelerate", "deepspeed", "trl", "datasets")
TURN_STEPS = 4
"""Steps that a side takes before the next one does: the first finds the memory that it had freed gone to others, which
no run of its own would."""
console = Console(width=150, highlight=False)


@dataclass(frozen=True, slots=True)
class Side:
    """One of those compared: a script and its job."""

    name: str
    script: str
    job: Job


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a job runs: processes on one device kind, the cores divided among them."""

    processes: int
    device: str
    wanted_threads: int | None = None

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return self.wanted_threads or max(1, len(os.sched_getaffinity(0)) // self.processes)

    def __str__(self) -> str:
        return f"{self.processes} process(es) of {self.threads} thread(s)"

    def environment(self, rank: int, port: int, folder: Path) -> dict[str, str]:
        values = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device == "cpu":
            values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **values}


@dataclass(frozen=True, slots=True)
class Block:
    """One run of one side: what each rank measured."""

    ranks: tuple[Measured, ...]

    def step_seconds(self, warm_up: int) -> list[float]:
        """Seconds of each step after the warm-up, by the clock of the rank that takes turns."""
        first = self.ranks[0]
        return [end - start for start, end in zip(first.starts, first.ends[1:], strict=False)][warm_up - 1 :]

    def cpu_seconds(self, warm_up: int) -> list[float]:
        """CPU seconds of each step after the warm-up, of all ranks together."""
        ends = [sum(rank.cpu_ends[step] for rank in self.ranks) for step in range(len(self.ranks[0].ends))]
        return [after - before for before, after in zip(ends[warm_up - 1 :], ends[warm_up:], strict=False)]

    @property
    def peak_mib(self) -> float:
        return max(rank.peak_mib for rank in self.ranks)

    @property
    def above_baseline_mib(self) -> float:
        return max(rank.peak_mib - rank.baseline_mib for rank in self.ranks)

    @property
    def scoring_seconds(self) -> float:
        return max(rank.scoring_seconds for rank in self.ranks)

    @property
    def scoring_cpu_seconds(self) -> float:
        return sum(rank.scoring_cpu_seconds for rank in self.ranks)

    @property
    def losses(self) -> list[float]:
        return self.ranks[0].losses


class Running:
    """The processes of one side at work."""

    def __init__(self, side: Side, stage: str, machine: Machine, *, in_turns: bool = False) -> None:
        self.side = side
        folder = Path(side.job.recipe).parent
        self._results = Path(tempfile.mkdtemp(dir=folder))
        shutil.rmtree(folder / "run", ignore_errors=True)
        side.job.save(folder / "job.json")
        command = [sys.executable, str(HERE / side.script), stage, str(folder / "job.json"), str(self._results)]
        port = free_port()
        self._done, say_done = os.pipe()
        wait_turn, self._turn = os.pipe()
        self._processes = []
        for rank in range(machine.processes):
            environment = machine.environment(rank, port, folder)
            if side.script == "side_dpo_scale.py":
                environment |= {
                    "ACCELERATE_USE_DEEPSPEED": "true",
                    "ACCELERATE_DEEPSPEED_CONFIG_FILE": side.job.deepspeed,
                }
            if in_turns and rank == 0:
                environment[TURNS] = f"{say_done} {wait_turn}"
            with open(self._results / f"rank-{rank}.log", "w") as log:
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=(say_done, wait_turn))
                )
        os.close(say_done)
        os.close(wait_turn)

    def wait_for_step(self) -> None:
        """Until the side has done a step. Raises if it ends instead."""
        if not os.read(self._done, 1):
            self.finish()
            raise RuntimeError(f"{self.side.name} ended before its last step")

    def give_turn(self) -> None:
        os.write(self._turn, b".")

    def finish(self) -> Block:
        """What the ranks measured. Raises with the end of their output if one fails."""
        codes = [process.wait() for process in self._processes]
        if any(codes):
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(self._results.glob("*.log")))
            raise RuntimeError(f"{self.side.name} ended with {codes}\n{logs}")
        os.close(self._done)
        os.close(self._turn)
        return Block(tuple(Measured.load(self._results / f"rank-{rank}.json") for rank in range(len(codes))))

    def keep(self, folder: Path) -> None:
        """Copy the profile that the side left."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("profile.txt", "trace.json.gz"):
            shutil.copy(self._results / name, folder / name)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def remove_caches(job: Job) -> None:
    """Forget the reference log-probs of a job, ours and those that TRL keeps with its data set."""
    folder = Path(job.recipe).parent
    for cache in ("reference", "datasets"):
        shutil.rmtree(folder / cache, ignore_errors=True)


def score(side: Side, machine: Machine) -> Block:
    """One reference pass of a side, in fresh processes."""
    running = Running(side, "score", machine)
    try:
        return running.finish()
    finally:
        running.kill()


def profile(side: Side, machine: Machine, folder: Path) -> None:
    """A few steps of one of our sides under torch's profiler, whose table and trace go to the folder."""
    running = Running(side, "profile", machine)
    try:
        running.finish()
        running.keep(folder)
    finally:
        running.kill()


def train_in_turns(sides: Sequence[Side], machine: Machine) -> dict[str, Block]:
    """All sides are loaded and take their first step at once, and from then on a few steps each in turns: A B A B.

    A slow spell of the machine then meets all sides alike.
    """
    running = [Running(side, "train", machine, in_turns=True) for side in sides]
    try:
        for one in running:
            one.wait_for_step()
        for first in range(1, sides[0].job.steps, TURN_STEPS):
            for one in running:
                for _ in range(first, min(first + TURN_STEPS, sides[0].job.steps)):
                    one.give_turn()
                    one.wait_for_step()
        for one in running:
            one.give_turn()
        return {one.side.name: one.finish() for one in running}
    finally:
        for one in running:
            one.kill()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps of one side on the same pairs over all repeats."""

    seconds: tuple[float, ...]
    """Of each step, the median over the repeats."""
    cpu_seconds: tuple[float, ...]
    """Of each step and all ranks, the median over the repeats: what is left of a comparison on a busy machine."""
    slowest: float
    fastest: float
    """Pairs per second of the slowest and of the fastest repeat."""
    pairs: int
    """Pairs of a step."""

    @classmethod
    def of(cls, blocks: Sequence[Block], warm_up: int, pairs: int) -> StepTimes:
        times = [block.step_seconds(warm_up) for block in blocks]
        rates = [pairs * len(steps) / sum(steps) for steps in times]
        cpu_times = [block.cpu_seconds(warm_up) for block in blocks]
        return cls(_medians(times), _medians(cpu_times), min(rates), max(rates), pairs)

    @property
    def pairs_per_second(self) -> float:
        return self.pairs * len(self.seconds) / sum(self.seconds)

    def speed_up_over(self, other: StepTimes) -> float:
        """Other's seconds by ours, on the same pairs."""
        return sum(other.seconds) / sum(self.seconds)

    def cpu_saving_over(self, other: StepTimes) -> float:
        """Other's CPU seconds by ours, on the same pairs."""
        return sum(other.cpu_seconds) / sum(self.cpu_seconds)


def _medians(repeats: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Of each step, over the repeats."""
    return tuple(median(column) for column in zip(*repeats, strict=True))


def largest_loss_gap(ours: Sequence[Block], theirs: Sequence[Block]) -> float:
    """Largest relative difference of the losses of any step: the sides did the same work."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours[0].losses, theirs[0].losses, strict=True))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=Path, help="file of preference pairs; without it, a synthetic mix")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, help="of each process; without it, the cores divided among them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=["small", "1b", "3b"], default="small")
    parser.add_argument("--json", type=Path, help="write the figures with versions and machine")
    parser.add_argument("--work", type=Path, help="folder for models and caches; without it, a temporary one")


@contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """A folder for models and caches; one that was named stays."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; numbers are given as text or rounded to three digits."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_json(path: Path | None, results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The figures with what made them."""
    if path is None:
        return
    document = {
        "command": " ".join(sys.argv),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": describe_machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "results": list(results),
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and how busy the machine is now."""
    import torch

    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
