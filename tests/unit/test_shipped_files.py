"""What travels with the package can be read, and says nothing twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.errors import UserError
from dpo_scale.recipe import load_recipe
from dpo_scale.shipped_files import shipped_file

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
LAUNCH_CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
LAUNCH_SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])
SCRIPTS = [*LAUNCH_SCRIPTS, ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
BATCH_SCRIPTS = [path for path in LAUNCH_SCRIPTS if path.suffix == ".sbatch"]


def named(path: Path) -> str:
    return path.name


def test_the_files_are_found() -> None:
    assert [path.name for path in RECIPES] == [
        "1b_one_gpu.yaml",
        "70b_eight_nodes.yaml",
        "70b_one_node_offload.yaml",
        "8b_one_node.yaml",
        "hh_cpu.yaml",
    ]
    assert [path.name for path in LAUNCH_CONFIGS] == ["zero3.yaml", "zero3_cpu.yaml", "zero3_multinode.yaml"]
    assert [path.name for path in DS_CONFIGS] == [
        "reference_cpu.json",
        "reference_gpu.json",
        "reference_nvme.json",
        "zero3.json",
        "zero3_cpu.json",
        "zero3_hpz.json",
        "zero3_nvme.json",
        "zero3_offload_all.json",
        "zero3_offload_optimizer.json",
    ]
    assert [path.name for path in LAUNCH_SCRIPTS] == [
        "demo.sh",
        "install.sh",
        "job.sh",
        "node.sh",
        "score.sbatch",
        "train.sbatch",
        "train_after_score.sh",
    ]
    found = [path for folder in ("launch", "ds_configs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    others = set(found) - {*RECIPES, *LAUNCH_CONFIGS, *DS_CONFIGS, *LAUNCH_SCRIPTS}
    assert [path.name for path in others] == ["constraints-cpu.txt"]


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_states_only_what_differs_from_the_default_and_explains_it_there(path: Path) -> None:
    recipe, section, unexplained, defaults = load_recipe(path), "", [], []
    for line in path.read_text().splitlines():
        if match := re.match(r"(\w+):$", line):
            section = match[1]
        elif match := re.match(r"  (\w+): ", line):
            values = getattr(recipe, section)
            default = type(values).model_fields[match[1]].get_default(call_default_factory=True)
            if getattr(values, match[1]) == default:
                defaults.append(line)
            if "  # " not in line:
                unexplained.append(line)
    assert section
    assert (unexplained, defaults) == ([], [])


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=named)
def test_a_launch_configuration_names_a_deepspeed_file_that_is_shipped(path: Path) -> None:
    name = yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_config_file"]
    assert read_policy_config(shipped_file(name))["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=named)
def test_accelerate_knows_every_field_of_a_launch_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    known = {option.dest for option in launch_command_parser()._actions} | {"deepspeed_config_file"}
    assert set(config.deepspeed_config) <= known


@pytest.mark.parametrize("path", DS_CONFIGS, ids=named)
def test_a_deepspeed_configuration_is_one_that_deepspeed_knows(path: Path) -> None:
    """Stage 3, whole numbers, and no key that DeepSpeed would ignore in silence."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(path.read_text())["zero_optimization"]
    assert zero["stage"] == 3
    assert not [key for key, value in zero.items() if isinstance(value, float)]
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(zero) <= known


@pytest.mark.parametrize("path", [path for path in DS_CONFIGS if "reference" in path.name], ids=named)
def test_a_reference_configuration_has_no_optimizer(path: Path) -> None:
    config = json.loads(path.read_text())
    assert "optimizer" not in config
    assert "offload_optimizer" not in config["zero_optimization"]


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_a_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", ["train.sbatch", "score.sbatch", "train_after_score.sh"])
def test_a_batch_script_without_a_recipe_says_what_it_takes(name: str) -> None:
    script = f"launch/slurm/{name}"
    done = subprocess.run(["bash", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{script} RECIPE [section.field=value ...]\n" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_shellcheck_finds_nothing_in_a_script(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_flag_of_accelerate_launch_that_is_shipped_exists() -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = set()
    for path in [*LAUNCH_SCRIPTS, *LAUNCH_CONFIGS, *RECIPES]:
        text = re.sub(r"\\\n\s*#?", " ", path.read_text())  # commands that go on in the next line
        for command in re.findall(r"accelerate launch (.*)", text):
            used |= set(re.findall(r"(--\w+)", command.partition(" -m ")[0]))
    assert used >= {"--config_file", "--num_machines", "--num_processes", "--machine_rank", "--main_process_ip"}
    assert [flag for flag in sorted(used) if not re.search(rf"{flag}\b", help_text)] == []


@pytest.mark.parametrize("path", BATCH_SCRIPTS, ids=named)
def test_a_batch_script_is_edited_at_its_top(path: Path) -> None:
    lines = path.read_text().splitlines()
    edits = [number for number, line in enumerate(lines) if "# EDIT" in line]
    assert edits == [1, 2, 3, 4]


COMPILED = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Where a compiler's results are, from which they are loaded as code."""


def compiled_on_a_node(local_files: Path, **environment: str) -> list[Path]:
    """The folders of compiled code that node.sh gives to its launcher."""
    tools = local_files.parent / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "accelerate").write_text("#!/bin/sh\nprintenv " + " ".join(COMPILED) + "\n")
    (tools / "accelerate").chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "TMPDIR": str(local_files),
        **dict.fromkeys(["DPO_SCALE_LOGS", "LAUNCH_CONFIG", "FIRST_NODE"], "any"),
        **dict.fromkeys(["SLURM_CPUS_ON_NODE", "SLURM_JOB_NUM_NODES", "SLURM_NODEID", "PORT"], "1"),
        **environment,
    }
    command = ["bash", "launch/slurm/node.sh", "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


def test_what_a_node_compiles_is_kept_for_the_next_job_where_nobody_else_can_put_code(tmp_path: Path) -> None:
    local_files = tmp_path / "local files"
    local_files.mkdir(mode=0o1777)
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (local_files / "dpo_scale-compiled-link").symlink_to(mine)
    (local_files / "dpo_scale-compiled-open").mkdir()
    (local_files / "dpo_scale-compiled-open").chmod(0o770)
    if os.geteuid() == 0:
        (local_files / "dpo_scale-compiled-theirs").mkdir(mode=0o700)
        os.chown(local_files / "dpo_scale-compiled-theirs", 65534, 65534)
    there = set(local_files.iterdir())
    folders = compiled_on_a_node(local_files)
    (made,) = set(local_files.iterdir()) - there
    assert [folder.parent for folder in folders] == [made] * len(COMPILED)
    assert made.stat().st_mode & 0o777 == 0o700
    assert all(folder.is_dir() for folder in folders)
    assert compiled_on_a_node(local_files) == folders


def test_a_folder_of_compiled_code_may_be_named(tmp_path: Path) -> None:
    named = str(tmp_path / "kernels")
    assert Path(named) == compiled_on_a_node(tmp_path / "not there yet", TRITON_CACHE_DIR=named)[-1]


def test_a_file_that_is_not_shipped_is_named() -> None:
    with pytest.raises(UserError, match=r"ds_configs/nowhere\.json"):
        shipped_file("ds_configs/nowhere.json")
