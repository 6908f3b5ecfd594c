"""Small models and data made by code, and real launches whose artifacts many tests read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 4096,
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
        recipe = self.workspace / f"{run}.yaml"
        settings = {**self.base, "run": {**self.base["run"], "output_dir": str(self.workspace / run)}}
        recipe.write_text(yaml.safe_dump(settings))
        return [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(self.workspace / "accelerate.yaml")),
            *("--num_processes", str(processes), "--main_process_port", "0"),
            *("-m", f"dpo_scale.{stage}", str(recipe), *overrides),
        ]

    def start(
        self, run: str, overrides: list[str] | None = None, *, stage: str = "train", processes: int = 2
    ) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            self.command(stage, run, overrides or [], processes),
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self, run: str, overrides: list[str] | None = None, *, stage: str = "train", processes: int = 2
    ) -> Launched:
        process = self.start(run, overrides, stage=stage, processes=processes)
        output, _ = process.communicate(timeout=500)
        return Launched(self.workspace / run, process.returncode, output)
