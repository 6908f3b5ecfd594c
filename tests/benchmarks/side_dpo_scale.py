"""Our side of a comparison: the trainer's own stages, with a clock at the end of every optimizer step.

    python side_dpo_scale.py train|score|profile JOB RESULTS

Checkpoints, the exported model and the report are left out: files are not measured. `profile` is `train` under torch's
profiler: it leaves a table of operations in RESULTS/profile.txt, and a trace for chrome://tracing beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import PROFILED_STEPS, Job, Measured, memory_mib, peak_memory_mib
from torch.profiler import ProfilerActivity

from dpo_scale import stages
from dpo_scale.console import Console
from dpo_scale.distributed.engines import PolicyEngine
from dpo_scale.recipe import load_recipe
from dpo_scale.reference import session
from dpo_scale.training import loop
from dpo_scale.watch import Watch


class Profile:
    """torch's profiler over a few steps, once ZeRO-3 knows the order of the modules."""

    def __init__(self, results: Path) -> None:
        self.results = results
        device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *device])

    def end_step(self, steps: int) -> None:
        first, last = PROFILED_STEPS
        if steps == first:
            self.profiler.start()
        elif steps == last:
            self.profiler.stop()
            order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
            (self.results / "profile.txt").write_text(table)
            self.profiler.export_chrome_trace(str(self.results / "trace.json.gz"))


def main(stage: str, job: Job, results: Path) -> None:
    measured = Measured(baseline_mib=memory_mib())

    profile = Profile(results) if stage == "profile" and os.environ["RANK"] == "0" else None

    plain_step = PolicyEngine.step

    def timed_step(engine: PolicyEngine) -> bool:
        applied = plain_step(engine)
        measured.end_step()
        if profile is not None:
            profile.end_step(len(measured.ends))
        return applied

    plain_score = session.score

    def timed_score(*args: Any, **kwargs: Any) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        plain_score(*args, **kwargs)
        measured.scoring_seconds += time.perf_counter() - started
        measured.scoring_cpu_seconds += time.process_time() - cpu_started
        measured.peak_mib = peak_memory_mib()

    session.score = timed_score
    PolicyEngine.step = timed_step  # type: ignore[method-assign]
    loop.Run.commit = lambda run, status: None  # type: ignore[method-assign]
    loop.Run.export = lambda run: None  # type: ignore[method-assign]
    stages.conclude = lambda folder, console: None
    recipe = load_recipe(job.recipe)
    watch = Watch(None, int(os.environ["RANK"]), lambda message, *, cause: print(message))
    run = stages.score if stage == "score" else stages.train
    run(recipe, Console(is_main=False), watch)

    log = Path(recipe.run.output_dir) / "metrics.jsonl"
    if stage != "score" and log.exists():
        lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
        measured.losses = [line["loss"] for line in lines]
        measured.tokens = lines[-1]["tokens"]
    measured.save(results / f"rank-{os.environ['RANK']}.json")
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Job.load(sys.argv[2]), Path(sys.argv[3]))
