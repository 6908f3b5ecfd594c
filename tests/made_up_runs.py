"""Folders of runs that never ran: a smooth learning curve with noise, made from a seed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

BEGAN = 1_780_000_000.0
SECONDS_A_STEP = 30.0


def training_line(step: int, rng: random.Random, **changes: Any) -> dict[str, Any]:
    margin = 2.5 * (1 - math.exp(-step / 80)) + rng.gauss(0, 0.15)
    return {
        "step": step,
        "time": BEGAN + SECONDS_A_STEP * step,
        "epoch": step / 100,
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": -0.4 * margin,
        "rewards/rejected": -1.4 * margin,
        "rewards/margin": margin,
        "rewards/accuracy": min(1.0, 0.5 + 0.15 * margin),
        "logps/chosen": -1.5 - 0.1 * margin,
        "logps/rejected": -1.4 - 0.3 * margin,
        "learning_rate": 5e-7 * max(0.0, 1 - step / 200),
        "grad_norm": 8 * math.exp(rng.gauss(0, 0.3)),
        "pairs": 128 * step,
        "tokens": 60_000 * step,
        "completion_tokens": 40_000 * step,
        "tokens_per_second": 2000 + rng.gauss(0, 60),
        "step_seconds": SECONDS_A_STEP,
        "reference_rows_cached": 12_000,
        "reference_rows_computed": 13_600,
        "skipped_steps": 0,
        "peak_memory_gib": 61.5,
        **changes,
    }


def held_out_line(step: int, **changes: Any) -> dict[str, Any]:
    margin = 1.8 * (1 - math.exp(-step / 80))
    values = {
        "eval/loss": math.log1p(math.exp(-margin)),
        "eval/rewards/chosen": -0.5 * margin,
        "eval/rewards/rejected": -1.5 * margin,
        "eval/rewards/margin": margin,
        "eval/rewards/accuracy": 0.5 + 0.13 * margin,
        "eval/logps/accuracy": 0.48 + 0.05 * margin,
    }
    return {"step": step, "time": BEGAN + SECONDS_A_STEP * step, **values, **changes}


def event(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": BEGAN + SECONDS_A_STEP * step, "event": kind, **values}


def lines_of_a_run(steps: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """A finished run: three attempts, two skipped steps, five held-out passes."""
    rng = random.Random(seed)
    lines = [held_out_line(0), event("start", 0, resumes=0, world_size=8, host="node-1")]
    for step in range(1, steps + 1):
        lines.append(training_line(step, rng, skipped_steps=2 if step > steps // 3 else 0))
        if step % (steps // 4) == 0:
            lines.append(held_out_line(step))
        if step in (steps // 2, 3 * steps // 4):
            ended = event("end", step, outcome="stopped", stage_seconds={"Training": 30.0 * step, "Starting": 40.0})
            lines += [ended, event("start", step, resumes=1, world_size=8, host="node-2")]
    return [*lines, event("end", steps, outcome="finished", stage_seconds={"Training": 4000.0, "Starting": 45.0})]


def make_run(folder: Path, lines: list[dict[str, Any]], **files: Any) -> Path:
    """Write a run's folder; `files`: recipe, environment, data_report or status in place of the usual."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"model": {"path": "org/llama"}, "loss": {"beta": 5.0}, "run": {"output_dir": str(folder)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(files.get("recipe", recipe)))
    for name, usual in (("environment", ENVIRONMENT), ("data_report", DATA)):
        (folder / f"{name}.json").write_text(json.dumps(files.get(name, usual)))
    if "status" in files:
        (folder / "status.json").write_text(json.dumps(files["status"]))
    return folder


ENVIRONMENT = {
    "python": "3.11.2",
    "packages": {"torch": "2.13.0"},
    "commit": "0123abc",
    "world_size": 8,
    "device": "cuda:0",
}


def _lengths(longest: int) -> dict[str, Any]:
    counts = [round(400 * math.exp(-(((i - 12) / 9) ** 2))) for i in range(longest // 20)]
    return {
        "mean": 260.0,
        "p5": 40,
        "p50": 250,
        "p95": 600,
        "p99": 800,
        "max": longest,
        "bin_tokens": 20,
        "bins": counts,
    }


_SET = {
    "rows_read": 6500,
    "pairs_kept": 6400,
    "dropped": {"chosen and rejected are equal": 60, "longer than data.max_length": 40},
    "truncated": {},
    "sources": [
        {
            "path": "train.jsonl",
            "first_places": {"chosen and rejected are equal": "train.jsonl:17: chosen and rejected are equal"},
        }
    ],
    "prompt_tokens": _lengths(600),
    "chosen_tokens": _lengths(1000),
    "rejected_tokens": _lengths(980),
    "chosen_longer": 0.61,
    "rejected_longer": 0.37,
    "duplicates": 12,
    "contradictions": 3,
    "tokens": 4_100_000,
}
_SEQUENCE = {"tokens": [" may", " I", "?", " certainly", "</s>"], "scored": [0, 0, 0, 1, 1]}
_PAIR = {"row": "train.jsonl:3", "chosen": _SEQUENCE, "rejected": {**_SEQUENCE, "scored": [0, 0, 0, 0, 1]}}
DATA = {
    "train": {**_SET, "samples": [_PAIR]},
    "evaluate": {**_SET, "dropped": {}, "sources": []},
    "overlap": {"pairs": 2, "prompts": 31},
}
