"""The shipped files at work, as far as CPUs can: launch configurations, recipes and DeepSpeed configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ON_CPUS, make_model, make_pairs

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("shipped_worker.py")

pytestmark = pytest.mark.launch


def launch(config: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{config}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPUS, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses under every DeepSpeed configuration and how many files offloading made, in a launch of two ranks with the
    configuration of one GPU node.
    """
    folder = tmp_path_factory.mktemp("shipped")
    recipe = "launch/recipes/8b_one_node.yaml"
    launch(
        "zero3.yaml", "--num_processes", "2", str(WORKER), recipe, str(folder / "losses.json"), "model.dtype=float32"
    )
    found: dict[str, Any] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def losses(found: dict[str, Any]) -> dict[str, list[float]]:
    return {name: losses for name, (losses, _) in found.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_deepspeed_configuration_computes_the_same(losses: dict[str, list[float]], path: Path) -> None:
    actual = losses[path.name]
    expected = losses["reference_gpu.json" if path.name.startswith("reference") else "zero3.json"]
    assert len(actual) == 3
    assert actual == pytest.approx(expected, rel=1e-6)


def test_the_policys_losses_move_and_the_references_do_not(losses: dict[str, list[float]]) -> None:
    assert len(set(losses["zero3.json"])) == 3
    assert len(set(losses["reference_gpu.json"])) == 1


def test_what_belongs_on_nvme_lies_in_files(found: dict[str, Any]) -> None:
    files = {name: files for name, (_, files) in found.items() if files}
    assert files.keys() == {"reference_nvme.json", "zero3_nvme.json"}
    assert files["reference_nvme.json"] == 2 * 7  # the matrices of two layers
    assert files["zero3_nvme.json"] >= 2 * 3  # a weight and two moments of two sub-groups and more


def test_the_recipe_for_a_cpu_runs_with_a_file_and_a_model_of_ones_own(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    make_pairs(tmp_path / "mine.jsonl", 16, seed=3)
    own = {
        "model.path": tmp_path / "model",
        "data.train": tmp_path / "mine.jsonl",
        "run.output_dir": tmp_path / "run",
        "run.max_steps": 2,
        "batch.global_pairs": 8,
        "reference.cache_dir": tmp_path / "cache",
        "data.cache_dir": tmp_path / "tokens",
    }
    overrides = [f"{name}={value}" for name, value in own.items()]
    launch("zero3_cpu.yaml", "-m", "dpo_scale.train", "launch/recipes/hh_cpu.yaml", *overrides)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
