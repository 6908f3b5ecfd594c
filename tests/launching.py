"""Small models and data made by code, and real launches whose artifacts many tests read."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ON_CPUS = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of a launch on CPUs, one core a rank, also where there are GPUs."""

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 4096,
        "sub_group_size": 4096,
        "stage3_prefetch_bucket_size": 4096,
        # DeepSpeed's default keeps parameters as small as these whole, which would hide faults of sharding.
        "stage3_param_persistence_threshold": 0,
    }
}


def make_model(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama and a byte-level tokenizer, saved as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_pairs(path: Path, count: int, seed: int) -> Path:
    """Preference pairs of unequal lengths: kind answers are preferred to rude ones."""
    rng = random.Random(seed)
    things = ["bread", "a rope", "two candles", "the red lantern", "salt and pepper", "a very old map"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            thing = rng.choice(things)
            row = {
                "prompt": f"{number}: may I have {' and '.join([thing] * rng.randint(1, 3))}?",
                "chosen": " Yes" + ", gladly" * rng.randint(0, 3) + ".",
                "rejected": " No" + ", go away" * rng.randint(0, 4) + "!",
            }
            file.write(json.dumps(row) + "\n")
    return path


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, pending = [], [pid]
    while pending:
        children = parents.get(pending.pop(), [])
        found += children
        pending += children
    return found


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all that it started; to this one last, if it is one of them."""
    for target in sorted([pid, *descendants(pid)], key=lambda one: one == os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


@dataclass(frozen=True)
class Launched:
    """A finished launch and the folder of its run."""

    folder: Path
    returncode: int
    output: str

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def training_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics() if "loss" in line]

    def held_out_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics() if "eval/loss" in line]


@dataclass(frozen=True)
class Launcher:
    """Starts stages with `accelerate launch` on CPU processes, from recipes made of a base and overrides."""

    workspace: Path
    base: dict[str, Any]

    def command(self, stage: str, run: str, overrides: list[str], processes: int) -> list[str]:
        """`stage` is one of the program's, or a script that takes a recipe in its place."""
        recipe = self.workspace / f"{run}.yaml"
        settings = {**self.base, "run": {**self.base["run"], "output_dir": str(self.workspace / run)}}
        recipe.write_text(yaml.safe_dump(settings))
        return [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(self.workspace / "accelerate.yaml")),
            *("--num_processes", str(processes), "--main_process_port", "0"),
            *([stage] if stage.endswith(".py") else ["-m", f"dpo_scale.{stage}"]),
            *(str(recipe), *overrides),
        ]

    def start(
        self,
        run: str,
        overrides: list[str] | None = None,
        *,
        stage: str = "train",
        processes: int = 2,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        environment = os.environ | ON_CPUS | (environment or {})
        return subprocess.Popen(
            self.command(stage, run, overrides or [], processes),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self,
        run: str,
        overrides: list[str] | None = None,
        *,
        stage: str = "train",
        processes: int = 2,
        environment: dict[str, str] | None = None,
    ) -> Launched:
        process = self.start(run, overrides, stage=stage, processes=processes, environment=environment)
        try:
            output, _ = process.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
            raise
        return Launched(self.workspace / run, process.returncode, output)


def make_launcher(workspace: Path) -> Launcher:
    """A launcher with a model, data, and a recipe of two epochs of five steps, in an empty folder."""
    (workspace / "zero3.json").write_text(json.dumps(ZERO3))
    (workspace / "accelerate.yaml").write_text(
        yaml.safe_dump(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "deepspeed_config_file": str(workspace / "zero3.json"),
                    "zero3_init_flag": True,
                },
                "num_machines": 1,
                "num_processes": 2,
                "machine_rank": 0,
            }
        )
    )
    base = {
        "model": {"path": str(make_model(workspace / "model")), "dtype": "float32"},
        "reference": {"cache_dir": str(workspace / "cache")},
        "data": {
            "train": str(make_pairs(workspace / "train.jsonl", 45, seed=1)),
            "evaluate": str(make_pairs(workspace / "held_out.jsonl", 11, seed=2)),
            "max_length": 256,
            "cache_dir": str(workspace / "tokens"),
        },
        "batch": {"global_pairs": 10, "rank_tokens": 300},
        "loss": {"beta": 2.0},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "track": {"every_steps": 1},
        "checkpoint": {"keep_last": 9},
        "run": {"epochs": 2, "seed": 5},
    }
    return Launcher(workspace, base)
