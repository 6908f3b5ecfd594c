"""Two ranks under ZeRO-3 against one process without DeepSpeed: losses, gathered gradients and their norms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ON_CPUS
from plain_dpo import assert_same_gradients, gradients, plain_losses
from safetensors.torch import load_file
from tiny_llamas import plain_llama, plain_mixture, random_pairs
from torch import nn

CASES = [("untied", 400), ("untied", 31), ("tied", 400), ("tied", 31), ("mixture", 31)]
"""Kind of model and token budget; those that are not untied recompute their activations."""
GLOBAL_PAIRS = [5, 3, 5, 3]
POLICY, REFERENCE = 1, 2
TOLERANCE = 1e-5
RECIPE: dict[str, Any] = {
    "model": {"path": "unused", "dtype": "float32"},
    "reference": {"offload": "none"},
    "data": {"train": ["unused"]},
    "batch": {"global_pairs": 5, "layout": "shared"},
    "loss": {"beta": 2.0, "reduction": "mean"},
    # A large eps keeps the updates smooth where gradients are near zero, and lets clipping show in them.
    "optim": {"learning_rate": 0.02, "eps": 0.01, "max_grad_norm": 0.5, "weight_decay": 0.1},
    "run": {"output_dir": "unused"},
}
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 500,
        "stage3_prefetch_bucket_size": 500,
        "sub_group_size": 2000,
    }
}
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "use_cpu": False,  # DeepSpeed is left out where this is true
    "machine_rank": 0,
    "main_process_port": 0,
    "num_machines": 1,
    "num_processes": 2,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one launch that trained every case."""
    folder = tmp_path_factory.mktemp("zero3")
    for kind in dict(CASES):
        for role, seed in (("policy", POLICY), ("reference", REFERENCE)):
            plain_model(kind, seed).save_pretrained(folder / f"{role}_{kind}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "zero3.json").write_text(json.dumps(DEEPSPEED))
    deepspeed_config = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**ACCELERATE, "deepspeed_config": deepspeed_config}))
    worker = Path(__file__).with_name("zero3_worker.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(folder / "accelerate.yaml")),
            *(str(worker), str(folder / "recipe.yaml"), str(folder)),
        ],
        env=os.environ | ON_CPUS,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def plain_model(kind: str, seed: int) -> nn.Module:
    """The model of a kind and a seed, with nothing of ours."""
    return plain_mixture(seed) if kind == "mixture" else plain_llama(seed, tied=kind == "tied", dtype=torch.float32)


def one_process(kind: str, members: list[list[int]]) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """Loss, gradient norm and gradients of each step of plain DPO with torch's AdamW, given each step's pairs.

    In float64, so that what is seen is the rounding of the ranks alone; the library's experts know fp32 at most.
    """
    pairs, optim = random_pairs(), RECIPE["optim"]
    policy, reference = (plain_model(kind, seed) for seed in (POLICY, REFERENCE))
    if kind != "mixture":
        policy, reference = policy.double(), reference.double()
    matrices = [parameter for parameter in policy.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in policy.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim["learning_rate"],
        eps=optim["eps"],
    )
    steps = []
    for indices in members:
        loss = plain_losses(policy, reference, [pairs[index] for index in indices], **RECIPE["loss"]).mean()
        optimizer.zero_grad()
        loss.backward()
        whole = gradients(policy)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), optim["max_grad_norm"])
        optimizer.step()
        steps.append((loss.item(), norm.item(), whole))
    return steps


@pytest.mark.launch
@pytest.mark.parametrize(("kind", "rank_tokens"), CASES)
def test_two_ranks_train_as_one_process(kind: str, rank_tokens: int, launched: Path) -> None:
    case = launched / f"{kind}_{rank_tokens}"
    steps = json.loads(case.with_suffix(".json").read_text())
    gathered = load_file(case.with_suffix(".safetensors"))
    members = [[*chain(*step["pairs"])] for step in steps]
    assert [len(indices) for indices in members] == GLOBAL_PAIRS
    assert sorted(chain(*members)) == sorted([*range(8)] * 2), "every pair once an epoch"

    expected_steps = one_process(kind, members)
    assert max(norm for _, norm, _ in expected_steps) > RECIPE["optim"]["max_grad_norm"], "clipping is at work"
    for number, (loss, norm, expected) in enumerate(expected_steps):
        actual = {name.split("/")[1]: gradient for name, gradient in gathered.items() if name.startswith(f"{number}/")}
        assert steps[number]["applied"]
        assert steps[number]["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert steps[number]["metric_loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert steps[number]["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        rounded = {name: gradient.float() for name, gradient in expected.items()}
        assert_same_gradients(actual, rounded, TOLERANCE)


@pytest.mark.launch
def test_the_cases_have_what_they_are_for(launched: Path) -> None:
    """One micro-batch a rank, and several with filler among them."""
    whole, split = (json.loads((launched / f"untied_{tokens}.json").read_text()) for tokens in (400, 31))
    assert [step["micro_batches"] for step in whole] == [1, 1, 1, 1]
    assert all(step["fillers"] == 0 for step in whole)
    assert max(step["micro_batches"] for step in split) > 1
    assert any(step["fillers"] for step in split)
