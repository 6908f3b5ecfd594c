"""The files beside the code: all that are there are found, and each is what its reader expects."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_scale import shipped_files
from dpo_scale.distributed.zero_config import OWNED_BY_THE_RECIPE, read_policy_config
from dpo_scale.errors import UserError
from dpo_scale.recipe import load_recipe
from dpo_scale.shipped_files import shipped_file

ROOT = Path(__file__).parents[2]
POLICY = ["zero3", "zero3_hpz", "zero3_nvme", "zero3_offload_all", "zero3_offload_optimizer"]
REFERENCE = ["reference_cpu", "reference_gpu", "reference_nvme"]
LAUNCH = sorted(path.name for path in (ROOT / "launch").glob("*.yaml"))
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("launch", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path.parent.name == ".ci"
)


def zero_config(name: str) -> dict[str, object]:
    config: dict[str, dict[str, object]] = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    return config["zero_optimization"]


def device(name: str, what: str) -> object:
    section = zero_config(name).get(what, {})
    assert isinstance(section, dict)
    return section.get("device", "none")


def test_the_tests_below_see_every_file() -> None:
    configs = sorted(path.stem for path in (ROOT / "ds_configs").iterdir())
    assert configs == sorted(POLICY + REFERENCE)
    assert {"zero3.yaml", "zero3_cpu.yaml"} <= set(LAUNCH)
    assert {"launch/install.sh", "launch/demo.sh", "tests/run.sh", ".ci/run"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", POLICY + REFERENCE)
def test_a_deepspeed_json_is_stage_3_and_has_only_keys_that_deepspeed_knows(name: str) -> None:
    parsed = DeepSpeedZeroConfig(**zero_config(name))
    assert parsed.stage == 3
    assert not parsed.gather_16bit_weights_on_model_save


@pytest.mark.parametrize("name", POLICY + REFERENCE)
def test_a_deepspeed_json_states_nothing_that_the_recipe_owns(name: str) -> None:
    path = ROOT / "ds_configs" / f"{name}.json"
    assert not OWNED_BY_THE_RECIPE.keys() & json.loads(path.read_text()).keys()
    read_policy_config(path)


@pytest.mark.parametrize("name", POLICY)
def test_a_policy_accumulates_gradients_in_fp32(name: str) -> None:
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("name", "optimizer", "parameters"),
    [
        ("zero3", "none", "none"),
        ("zero3_hpz", "none", "none"),
        ("zero3_offload_optimizer", "cpu", "none"),
        ("zero3_offload_all", "cpu", "cpu"),
        ("zero3_nvme", "nvme", "nvme"),
        ("reference_gpu", "none", "none"),
        ("reference_cpu", "none", "cpu"),
        ("reference_nvme", "none", "nvme"),
    ],
)
def test_a_deepspeed_json_offloads_what_its_name_says(name: str, optimizer: str, parameters: str) -> None:
    assert device(name, "offload_optimizer") == optimizer
    assert device(name, "offload_param") == parameters


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_keeps_no_parameter_between_forwards(name: str) -> None:
    config = zero_config(name)
    assert config["stage3_param_persistence_threshold"] == 0
    assert config["stage3_max_reuse_distance"] == 0
    assert config["memory_efficient_linear"] is False  # true would replace torch's linear for the policy too


@pytest.mark.parametrize("name", LAUNCH)
def test_accelerate_reads_a_launch_file_and_finds_its_deepspeed_json(name: str) -> None:
    config = load_config_from_file(str(ROOT / "launch" / name))
    assert config.distributed_type == "DEEPSPEED"
    assert config.mixed_precision is None  # the recipe's
    assert config.num_processes > 0  # else accelerate demands it on the command line
    # Accelerate refuses other settings beside a DeepSpeed JSON.
    assert config.deepspeed_config.keys() <= {
        "deepspeed_config_file",
        "deepspeed_multinode_launcher",
        "zero3_init_flag",
    }
    assert shipped_file(config.deepspeed_config["deepspeed_config_file"]).parent == ROOT / "ds_configs"


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_is_one(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_parse_a_script(script: str) -> None:
    parsed = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_an_installed_wheel_finds_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that pyproject.toml asks for: shipped/ inside the package."""
    assert '"launch" = "dpo_scale/shipped/launch"' in (ROOT / "pyproject.toml").read_text()
    package = tmp_path / "site-packages" / "dpo_scale"
    inside = package / "shipped" / "launch" / "zero3.yaml"
    stranger = tmp_path / "site-packages" / "launch" / "zero3.yaml"
    for path in (inside, stranger):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(shipped_files, "_PACKAGE", package)
    assert shipped_file("launch/zero3.yaml") == inside


def test_a_file_that_is_not_shipped_is_named() -> None:
    with pytest.raises(UserError, match=r"ds_configs/zero9\.json"):
        shipped_file("ds_configs/zero9.json")
