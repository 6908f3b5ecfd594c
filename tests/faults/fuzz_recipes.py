"""Random recipes for random small models, interrupted at random, against the same training without any of that.

    python tests/faults/fuzz_recipes.py --recipes 20 [--seed 0]

Each recipe is run on one or two ranks in the layout, budget and schedule that were drawn, may be killed or stopped
and started again, also on another number of ranks, and must end as one undisturbed padded run on one rank does: the
same steps logged, the same held-out passes, losses and weights equal to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from launching import Launched, Launcher, kill_all, make_launcher, make_pairs
from tiny_models import SERVED, save_tiny_model

from dpo_scale.training.status import FINISHED, UNFINISHED, USER_ERROR, committed_step, is_alive, judge, read_status

OTHERS = ("bloom", "falcon", "gemma", "gpt_oss", "mpt", "olmo", "opt", "qwen2_moe", "stablelm", "starcoder2")
"""Architectures of which some fall back to the padded layout."""
TOLERANCE = 1e-4
MOST_STARTS = 4
UNDISTURBED = {
    "batch.layout": "padded",
    "batch.rank_tokens": 2000,
    "reference.schedule": "upfront",
    "model.activation_checkpointing": False,
}
"""What must not change the result, as the run that is compared with has it."""

Settings = dict[str, Any]


def draw_recipe(rng: random.Random, launcher: Launcher) -> Settings:
    """Settings over the launcher's base; small learning rates, so that rounding stays rounding."""
    model = make_model(launcher, rng.choice([*SERVED, *OTHERS]))
    train, held_out = (launcher.workspace / name for name in ("train.jsonl", "held_out.jsonl"))
    make_pairs(train, rng.randint(15, 90), seed=rng.randint(0, 99))
    amount = rng.choice([{}, {}, {"weight": rng.choice([0.5, 1.5, 2.0])}, {"rows": rng.randint(5, 30)}])
    return {
        "model.path": model,
        "model.activation_checkpointing": rng.random() < 0.4,
        "reference.path": rng.choice([None, None, make_model(launcher, "llama")]),
        "reference.schedule": rng.choice(["upfront", "per_batch"]),
        "reference.offload": rng.choice(["none", "cpu"]),
        "reference.rank_tokens": rng.choice([None, 400, 2000]),
        "data.train": [{"path": str(train), **amount}],
        "data.evaluate": rng.choice([[], [str(held_out)], [str(train), str(held_out)]]),
        "data.max_length": rng.choice([60, 120, 200]),
        "data.truncation": rng.choice(["drop", "keep_start_of_prompt", "keep_end_of_prompt", "keep_start"]),
        "batch.global_pairs": rng.choice([1, 2, 3, 5, 8, 16, 70]),
        "batch.rank_tokens": rng.choice([400, 450, 600, 3000]),
        "batch.layout": rng.choice(["auto", "auto", "padded"]),
        "loss.reduction": rng.choice(["mean", "sum"]),
        "loss.beta": rng.choice([0.1, 2.0]),
        "loss.label_smoothing": rng.choice([0.0, 0.1]),
        "optim.learning_rate": 1e-4,
        "optim.eps": 1e-4,
        "optim.schedule": rng.choice(["linear", "cosine", "constant"]),
        "optim.warmup_ratio": rng.choice([0.0, 0.1, 1.0]),
        "optim.max_grad_norm": rng.choice([0.0, 0.1, 1.0]),
        "evaluate.every_steps": rng.choice([None, 1, 2, 5]),
        "evaluate.at_start": rng.random() < 0.5,
        "checkpoint.every_steps": rng.choice([None, 1, 3]),
        "checkpoint.keep_last": rng.choice([1, 2]),
        "track.every_steps": rng.choice([1, 3]),
        "run.epochs": rng.choice([1, 2, 4]),
        "run.max_steps": rng.choice([None, None, 9, 40]),
        "run.seed": rng.randint(0, 9),
    }


def make_model(launcher: Launcher, model_type: str) -> str:
    """A small model of a type with the launcher's tokenizer."""
    folder = launcher.workspace / f"model-{model_type}"
    if not folder.exists():
        shutil.copytree(launcher.workspace / "model", folder)
        (folder / "model.safetensors").unlink()
        save_tiny_model(
            folder,
            model_type,
            vocab_size=301,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            initializer_range=0.1,
        )
    return str(folder)


def disturbed(launcher: Launcher, run: str, settings: Settings, rng: random.Random) -> tuple[Launched, str]:
    """The run, interrupted in its first starts if that is drawn; and what was done to it."""
    how, story = rng.choice(["undisturbed", "killed", "SIGTERM", "STOP"]), []
    for start in range(MOST_STARTS):
        processes = rng.choice([1, 2])
        story.append(f"{how} on {processes}")
        process = launcher.start(run, overrides(settings), processes=processes)
        patience = rng.uniform(5, 25) if how != "undisturbed" and start < MOST_STARTS - 1 else None
        try:
            output, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            if how == "killed":
                kill_all(process.pid)
            elif how == "SIGTERM":
                os.kill(process.pid, signal.SIGTERM)
            elif (launcher.workspace / run).exists():
                (launcher.workspace / run / "STOP").touch()
            output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        # A launch that is killed in its last moments leaves a finished run.
        assert code_of(launcher.workspace / run) in (FINISHED, UNFINISHED), output
    return Launched(launcher.workspace / run, process.returncode, output), ", ".join(story)


def code_of(folder: Path) -> int:
    """What `dpo-scale status` would exit with."""
    status = read_status(folder, "train") if folder.exists() else None
    alive = status is not None and is_alive(folder, "train", status)
    return judge(status, alive=alive, committed=committed_step(folder)).code


def overrides(settings: Settings) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def gap(expected: Launched, actual: Launched) -> float:
    """Largest difference of two runs, in logged losses and in weights relative to each tensor's largest."""
    held = [{line["step"]: line["eval/loss"] for line in run.held_out_lines()} for run in (expected, actual)]
    logged = [{line["step"]: line["loss"] for line in run.training_lines()} for run in (expected, actual)]
    gaps = [0.0]
    for one, other in (held, logged):
        assert one.keys() == other.keys(), f"{sorted(one)} and {sorted(other)}"
        gaps += [abs(one[step] - other[step]) for step in one]
    before, after = (weights(run.folder / "model") for run in (expected, actual))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        largest = tensor.abs().max().clamp_min(1e-3)
        gaps.append(((after[name] - tensor).abs().max() / largest).item())
    return max(gaps)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        launcher = make_launcher(Path(folder))
        for seed in range(options.seed, options.seed + options.recipes):
            rng = random.Random(seed)
            settings = draw_recipe(rng, launcher)
            own_cache = {"reference.cache_dir": str(launcher.workspace / f"cache-{seed}")}
            expected = launcher(f"undisturbed-{seed}", overrides({**settings, **UNDISTURBED, **own_cache}), processes=1)
            if code_of(expected.folder) == USER_ERROR:
                print(f"{seed}: no pair fits the limits that were drawn", flush=True)
                continue
            assert expected.returncode == 0, expected.output
            run, story = disturbed(launcher, f"disturbed-{seed}", settings, rng)
            difference = gap(expected, run) if run.returncode == 0 else float("inf")
            print(f"{seed}: {Path(settings['model.path']).name}, {story}: gap {difference:.1e}", flush=True)
            if difference > TOLERANCE:
                failed += 1
                print(" ".join(overrides(settings)), run.output[-3000:], sep="\n", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
