"""Seconds from the command to the first step, as `accelerate launch` starts it: cold and warm.

    python tests/benchmarks/start_up.py --pairs FILE.jsonl.gz [--rows N] [--processes 2]

Cold: the caches of tokens and of reference log-probs are empty, so the whole reference pass is in it. Warm: both are
full, as after a restart. The milestones are the trainer's own lines, each with the second at which it came.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from comparison import HERE, Machine, add_common_arguments, console, remove_caches, show, work_folder, write_json
from measuring import Job
from workload import Settings, make_job, make_model, pairs_to_measure

ROOT = HERE.parents[1]
FIRST_STEP = "step "
MILESTONES = (
    "Reference, training",
    "Loading the reference",
    "Loading the policy",
    "Layout of the policy",
    "First step",
)
"""How the lines begin that are timed on the way to the first step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(processes=[2])
    parser.add_argument("--rows", type=int, help="pairs, drawn evenly by length; without it, all of the file")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with work_folder(options.work) as folder:
        tokenizer, rows = pairs_to_measure(options.pairs, options.rows)
        for vocabulary in options.vocabulary:
            name = f"{options.shape}-{vocabulary}"
            model = make_model(folder / name, tokenizer, vocabulary, options.shape, options.dtype)
            for processes in options.processes:
                machine = Machine(processes, options.device, options.threads)
                settings = Settings(step_pairs=4, steps=1, dtype=options.dtype)
                job = make_job(folder / f"start-{name}-{processes}", model, rows, settings)
                runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
                for repeat in range(options.repeats):
                    _forget(job)
                    for state in runs:
                        with console.status(f"{state}, repeat {repeat + 1} of {options.repeats}"):
                            runs[state].append(start(job, machine))
                for state, seen in runs.items():
                    results.append(_entry(state, seen, len(rows), vocabulary, machine))
                show(
                    f"seconds from the command; {len(rows):,} pairs, vocabulary {vocabulary:,}, {machine}",
                    ("start", *MILESTONES, "first step done", "fastest", "slowest"),
                    [_row(entry) for entry in results[-2:]],
                )
                write_json(options.json, results, options)


def start(job: Job, machine: Machine) -> dict[str, float]:
    """Seconds from the command to each milestone and to the first step's line. Raises if the launch fails."""
    folder = Path(job.recipe).parent
    shutil.rmtree(folder / "run", ignore_errors=True)
    config = "zero3_cpu.yaml" if machine.device == "cpu" else "zero3.yaml"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / config)),
        *("--num_processes", str(machine.processes), "--main_process_port", "0"),
        *("-m", "dpo_scale.train", job.recipe),
    ]
    wanted = {"OMP_NUM_THREADS": str(machine.threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if machine.device == "cpu":
        wanted |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    seconds: dict[str, float] = {}
    started = time.monotonic()
    output = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | wanted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            for begin in (*MILESTONES, FIRST_STEP):
                if line.startswith(begin):
                    seconds.setdefault(begin, time.monotonic() - started)
    if process.returncode:
        raise RuntimeError("".join(output[-40:]))
    return seconds


def _forget(job: Job) -> None:
    remove_caches(job)
    shutil.rmtree(Path(job.recipe).parent / "tokens", ignore_errors=True)


def _entry(
    state: str, runs: Sequence[dict[str, float]], pairs: int, vocabulary: int, machine: Machine
) -> dict[str, Any]:
    first_steps = [run[FIRST_STEP] for run in runs]
    return {
        "start": state,
        "pairs": pairs,
        "vocabulary": vocabulary,
        "processes": machine.processes,
        "milestones": {begin: median(run[begin] for run in runs) for begin in MILESTONES if begin in runs[0]},
        "first_step_seconds": median(first_steps),
        "fastest": min(first_steps),
        "slowest": max(first_steps),
    }


def _row(entry: dict[str, Any]) -> list[object]:
    milestones = [entry["milestones"].get(begin) for begin in MILESTONES]
    return [entry["start"], *milestones, entry["first_step_seconds"], entry["fastest"], entry["slowest"]]


if __name__ == "__main__":
    main()
