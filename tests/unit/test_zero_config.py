"""One owner a number: what the recipe owns may not stand in a DeepSpeed JSON, and what it says arrives."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_scale.distributed.nvme_folders import own_folder
from dpo_scale.distributed.ops import needed_ops
from dpo_scale.distributed.zero_config import (
    fit_to_node,
    nvme_folders,
    pinning_fits,
    policy_config,
    read_config,
    read_policy_config,
    reference_config,
)
from dpo_scale.distributed.zero_rules import OWNED_BY_THE_RECIPE, TRAINED_WITH
from dpo_scale.errors import RecipeError
from dpo_scale.recipe import Recipe

SHIPPED = Path(__file__).parents[2] / "ds_configs"


def _recipe(**model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "base", **model},
            "data": {"train": ["pairs.jsonl"]},
            "batch": {"global_pairs": 8},
            "loss": {"beta": 0.1},
            "optim": {"max_grad_norm": 0.25},
            "run": {"output_dir": "run"},
        }
    )


def _write(folder: Path, value: Any) -> Path:
    path = folder / "zero.json"
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BASE = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "steps_per_print": 7}
REFERENCE = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


def test_all_keys_that_the_recipe_owns_are_refused_at_once_with_both_places(tmp_path: Path) -> None:
    path = _write(tmp_path, {**BASE, **dict.fromkeys(OWNED_BY_THE_RECIPE, 1)})
    with pytest.raises(RecipeError) as caught:
        read_policy_config(path)
    assert str(caught.value).splitlines() == [
        f"{path}: {key!r} belongs to the recipe ({owner}); remove it here" for key, owner in OWNED_BY_THE_RECIPE.items()
    ]


def test_auto_states_nothing_and_is_dropped(tmp_path: Path) -> None:
    path = _write(tmp_path, {**BASE, "train_batch_size": "auto", "gradient_clipping": "auto"})
    assert read_policy_config(path) == BASE


def test_a_null_states_nothing(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": None, "offload_optimizer": None}
    path = _write(tmp_path, {"zero_optimization": zero, "fp16": None, "aio": None, "communication_data_type": None})
    config = read_policy_config(path)
    assert config == {"zero_optimization": {"stage": 3}}
    assert fit_to_node(config, path, own_folder="", ranks_per_node=8) == config
    assert needed_ops(config, "none") == {}


@pytest.mark.parametrize("size", [0, -1, "4", 1.5, [2]])
def test_a_secondary_partition_is_a_number_of_ranks(size: Any, tmp_path: Path) -> None:
    path = _write(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}})
    with pytest.raises(
        RecipeError, match=r'zero_hpz_partition_size is .*; it takes a number of ranks from 1 on, or "a'
    ):
        read_policy_config(path)


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": "auto"}, {}, None, 3, [3]])
def test_other_stages_are_refused(zero: Any, tmp_path: Path) -> None:
    path = _write(tmp_path, {"zero_optimization": zero, "optimizer": {}})
    with pytest.raises(RecipeError, match=r"(?s)'optimizer' belongs to the recipe.*this trainer runs stage 3"):
        read_policy_config(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "is a JSON object"),
        ("3", "is a JSON object"),
        ('{"aio": {"queue_depth": 8, "queue_depth": 16}}', "'queue_depth' stands in it twice; keep one"),
        (b'{"zero_optimization": {"stage": 3}, "\xe9": 1}', "not UTF-8: .*0xe9 in position 37.*; save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("read", [read_policy_config, read_config])
def test_files_that_are_no_configuration_are_refused(
    read: Any, content: str | bytes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"zero\.json: .*{expected}"):
        read(_write(tmp_path, content))
    with pytest.raises(RecipeError, match=r"absent\.json: No such file or directory; name a DeepSpeed JSON file"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", False, False)]
)
def test_the_recipes_numbers_arrive(dtype: str, bf16: bool, fp16: bool) -> None:
    before = copy.deepcopy(BASE)
    config = policy_config(BASE, _recipe(dtype=dtype))
    assert config["bf16"] == {"enabled": bf16}
    assert config["fp16"] == {"enabled": fp16, "auto_cast": False, "hysteresis": 1}
    assert config["gradient_clipping"] == 0.25
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert {key: config[key] for key in TRAINED_WITH} == TRAINED_WITH
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"] == BASE["zero_optimization"]
    assert before == BASE
    reference = reference_config(BASE, _recipe(dtype=dtype))
    assert (reference["bf16"], reference["fp16"]) == (config["bf16"], config["fp16"])
    assert "gradient_clipping" not in reference


def test_an_offloaded_optimizer_is_not_swapped_for_one_that_compiles() -> None:
    """Accelerate and DeepSpeed both read the key, and take its absence for consent."""
    assert policy_config(BASE, _recipe())["zero_force_ds_cpu_optimizer"] is False


def test_the_references_nvme_folder_is_its_own() -> None:
    before, recipe = copy.deepcopy(REFERENCE), _recipe()
    on_nvme = recipe.reference.model_copy(update={"offload": "nvme", "nvme_path": "/nvme"})
    recipe = recipe.model_copy(update={"reference": on_nvme})
    own = f"/nvme/{own_folder('run', 'reference')}"
    config = reference_config(REFERENCE, recipe)
    assert config["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": own}
    assert nvme_folders(config, policy_config(BASE, recipe)) == [Path(own)]
    assert before == REFERENCE


def test_a_policys_weights_on_nvme_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, REFERENCE)
    with pytest.raises(RecipeError, match=r"zero\.json: zero_optimization\.offload_param\.device is nvme, .*use cpu"):
        read_policy_config(path)
    assert read_config(path) == REFERENCE


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("zero3*.json")), ids=lambda path: path.name)
def test_shipped_configurations_state_nothing_that_the_recipe_owns(path: Path) -> None:
    config = read_policy_config(path)
    assert config == read_config(path)


def test_all_mistakes_of_a_file_are_told_together_each_with_its_path(tmp_path: Path) -> None:
    path = _write(tmp_path, {"zero_optimization": {"stage": "3", "overlap_com": True}, "prescale_gradients": True})
    with pytest.raises(RecipeError) as caught:
        read_policy_config(path)
    assert str(caught.value).splitlines() == [
        f'{path}: zero_optimization.stage is "3"; this trainer runs stage 3',
        f"{path}: zero_optimization.overlap_com: DeepSpeed has no such key; did you mean 'overlap_comm'?",
        f"{path}: prescale_gradients is true, for which zero_optimization.reduce_scatter must be false",
    ]


def test_a_machine_pins_at_most_half_of_its_free_memory() -> None:
    gib = 1 << 30
    assert pinning_fits(140 * gib, 1 / 8, 36 * gib)
    assert not pinning_fits(140 * gib, 1 / 8, 34 * gib)


def test_a_policy_on_nvme_gets_a_folder_of_its_own_run_and_role(tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    base = {"zero_optimization": {"stage": 3, "offload_optimizer": nvme}}
    folder = own_folder("run", "policy")
    zero = fit_to_node(base, Path("zero.json"), own_folder=folder, ranks_per_node=8)["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == str(tmp_path / folder)
    assert nvme["nvme_path"] == str(tmp_path)
    assert nvme_folders({"zero_optimization": zero}) == [tmp_path / folder]


@pytest.mark.parametrize("folder", [{}, {"nvme_path": "/no/such/disk"}])
def test_a_node_without_the_nvme_folder_is_told(folder: dict[str, str]) -> None:
    base = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", **folder}}}
    with pytest.raises(RecipeError, match=r"zero\.json: .*\.offload_optimizer\.nvme_path: .*on this node"):
        fit_to_node(base, Path("zero.json"), own_folder="run/policy", ranks_per_node=8)


def test_a_secondary_partition_fits_a_node() -> None:
    def fitted(size: Any) -> Any:
        base = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}
        config = fit_to_node(base, Path("zero.json"), own_folder="", ranks_per_node=4)
        return config["zero_optimization"]["zero_hpz_partition_size"]

    assert (fitted("auto"), fitted(2), fitted(4)) == (4, 2, 4)
    with pytest.raises(RecipeError, match=r"zero\.json: .*is 8, and the launcher starts 4 ranks on a node"):
        fitted(8)
