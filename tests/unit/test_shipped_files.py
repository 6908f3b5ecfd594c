"""What travels with the package can be read, and says nothing twice."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.errors import UserError
from dpo_scale.recipe import load_recipe
from dpo_scale.shipped_files import shipped_file

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
LAUNCH_CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch"), ROOT / "tests" / "run.sh"])


def test_the_files_are_found() -> None:
    assert [path.name for path in RECIPES] == ["8b_one_node.yaml"]
    assert [path.name for path in LAUNCH_CONFIGS] == ["zero3.yaml", "zero3_cpu.yaml"]
    assert [path.name for path in SCRIPTS] == ["demo.sh", "install.sh", "train.sbatch", "run.sh"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.name)
def test_a_launch_configuration_names_a_deepspeed_file_that_is_shipped(path: Path) -> None:
    named = yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_config_file"]
    assert read_policy_config(shipped_file(named))["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("reference_*.json")), ids=lambda path: path.name)
def test_a_reference_configuration_is_stage_3_without_an_optimizer(path: Path) -> None:
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert "optimizer" not in config
    assert "offload_optimizer" not in config["zero_optimization"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_file_that_is_not_shipped_is_named() -> None:
    with pytest.raises(UserError, match=r"ds_configs/nowhere\.json"):
        shipped_file("ds_configs/nowhere.json")
