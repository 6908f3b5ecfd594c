"""Our side of a comparison: the trainer's own stages, with a clock at the end of every optimizer step.

    python side_dpo_scale.py train|score JOB RESULTS

Checkpoints and the exported model are left out: files are not measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from measuring import Job, Measured, memory_mib, peak_memory_mib

from dpo_scale import stages
from dpo_scale.console import Console
from dpo_scale.distributed.engines import PolicyEngine
from dpo_scale.recipe import load_recipe
from dpo_scale.reference import session
from dpo_scale.training import loop


def main(stage: str, job: Job, results: Path) -> None:
    measured = Measured(baseline_mib=memory_mib())

    class Timed(PolicyEngine):
        def step(self) -> bool:
            applied = super().step()
            measured.end_step()
            return applied

    plain_score = session.score

    def timed_score(*args: Any, **kwargs: Any) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        plain_score(*args, **kwargs)
        measured.scoring_seconds += time.perf_counter() - started
        measured.scoring_cpu_seconds += time.process_time() - cpu_started
        measured.peak_mib = peak_memory_mib()

    session.score = timed_score
    loop.PolicyEngine = Timed  # type: ignore[misc]
    loop.Run.commit = lambda run: None  # type: ignore[method-assign]
    loop.Run.export = lambda run: None  # type: ignore[method-assign]
    recipe = load_recipe(job.recipe)
    getattr(stages, stage)(recipe, Console(is_main=False))

    log = Path(recipe.run.output_dir) / "metrics.jsonl"
    if stage == "train" and log.exists():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        measured.losses = [line["loss"] for line in lines if "loss" in line]
        measured.tokens = lines[-1]["tokens"]
    measured.save(results / f"rank-{os.environ['RANK']}.json")
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Job.load(sys.argv[2]), Path(sys.argv[3]))
