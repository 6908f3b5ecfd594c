"""Greedy answers of two exported folders side by side, with nothing but plain transformers.

`python -m dpo_scale.demo.showcase BASE TRAINED HELD_OUT`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = 6


def showcase(base: Path, trained: Path, held_out: Path) -> None:
    """Print the answers of both models to the first held-out prompts."""
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()[:PROMPTS]]
    prompts = [row["prompt"] for row in rows]
    # The base folder holds a bare SentencePiece model, which plain transformers misreads.
    tokenizer = trained
    before = greedy_answers(base, tokenizer, prompts)
    after = greedy_answers(trained, tokenizer, prompts)
    table = Table("held-out request", "before", "after", show_lines=True)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        table.add_row(prompt.split("\n")[0], old, new)
    Console().print(table)


@torch.no_grad()
def greedy_answers(model_folder: Path, tokenizer_folder: Path, prompts: Sequence[str]) -> list[str]:
    """What a model most likely says to each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        answers.append(answer.strip())
    return answers


if __name__ == "__main__":
    showcase(*map(Path, sys.argv[1:4]))
