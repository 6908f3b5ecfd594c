"""What the launcher brings: a DeepSpeed JSON and ranks; of numbers and switches, nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_scale.distributed import runtime
from dpo_scale.distributed.launch_environment import (
    LAUNCHERS_TWINS,
    OF_A_LAUNCHER,
    OUT_OF_PLACE,
    check_launcher,
    environment_of,
    forget,
    out_of_place,
    policy_config_path,
)
from dpo_scale.errors import RecipeError, UserError
from dpo_scale.recipe import Recipe

LAUNCHED = {
    **dict.fromkeys(OF_A_LAUNCHER, "1"),
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero3.json",
}


def test_the_file_that_the_launcher_names_is_found_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert policy_config_path(LAUNCHED).parts[-2:] == ("ds_configs", "zero3.json")
    own = tmp_path / "own.json"
    own.touch()
    assert policy_config_path(LAUNCHED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(own)}) == own


@pytest.mark.parametrize("lacking", ["ACCELERATE_USE_DEEPSPEED", *OF_A_LAUNCHER])
def test_ranks_that_no_launcher_started_are_told_the_command(lacking: str) -> None:
    """Also where a shell or srun exports what Accelerate would have set."""
    with pytest.raises(UserError, match="this command runs under Accelerate with DeepSpeed: accelerate launch"):
        policy_config_path({name: value for name, value in LAUNCHED.items() if name != lacking})


def test_a_configuration_that_names_no_deepspeed_file_is_told_so() -> None:
    """It states stage and offload itself, as `accelerate config` writes it by default."""
    inline = {name: value for name, value in LAUNCHED.items() if name != "ACCELERATE_DEEPSPEED_CONFIG_FILE"}
    with pytest.raises(UserError, match="deepspeed_config_file is missing; name a DeepSpeed JSON there"):
        policy_config_path(inline)


def test_what_the_launcher_states_beside_its_owner_is_refused_with_both_places() -> None:
    check_launcher({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true"}, Path("zero.json"))
    with pytest.raises(RecipeError) as caught:
        check_launcher(dict.fromkeys(LAUNCHERS_TWINS, "7"), Path("zero.json"))
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [field for field, _ in LAUNCHERS_TWINS.values()]
    assert (
        "gradient_clipping: 7 in the configuration or the options of accelerate launch belongs to the recipe"
        in lines[1]
    )
    assert "(optim.max_grad_norm)" in lines[1]
    assert "zero.json (zero_optimization.stage)" in lines[3]


def test_the_launcher_still_says_it_in_these_variables() -> None:
    """Stated as options, the fields arrive under the names that are checked."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    values = {"mixed_precision": "bf16", "zero3_save_16bit_model": "true"}
    flags = [f"--{field}={values.get(field, 3)}" for field, _ in LAUNCHERS_TWINS.values()]
    flags += ["--use_deepspeed", "--num_machines=1", "--num_processes=1", "--main_process_port=0"]
    options = launch_command_parser().parse_args([*flags, "train.py"])
    options.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(options)
    with pytest.raises(RecipeError) as caught:
        check_launcher(environment, Path("zero.json"))
    assert len(str(caught.value).splitlines()) == len(LAUNCHERS_TWINS)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((name, "true") for name in OUT_OF_PLACE if not name.endswith("_SIZE")),
        *((name, "2") for name in OUT_OF_PLACE if name.endswith("_SIZE")),
        ("ACCELERATE_USE_CPU", "1"),
        ("ACCELERATE_FP8_BACKEND", "MSAMP"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_no_run_can_use_is_refused_by_name(variable: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"^{variable}={value} .*; unset it, or remove it from the configuration"):
        check_launcher(LAUNCHED | {variable: value}, Path("zero.json"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_CPU", "False"),
        ("ACCELERATE_USE_FSDP", "0"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_FP8_BACKEND", "NO"),
        ("PARALLELISM_CONFIG_SP_SIZE", "1"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
    ],
)
def test_what_is_switched_off_is_no_mistake(variable: str, value: str) -> None:
    check_launcher(LAUNCHED | {variable: value}, Path("zero.json"))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("deepspeed_config", "zero_stage", 3),
        ("deepspeed_config", "offload_param_device", "cpu"),
        ("deepspeed_config", "zero3_save_16bit_model", True),
        ("deepspeed_config", "deepspeed_moe_layer_cls_names", "Experts"),
        ("parallelism_config", "parallelism_config_sp_size", 2),
        (None, "mixed_precision", "bf16"),
    ],
)
def test_a_configuration_is_judged_as_its_launch_will_be(section: str | None, field: str, value: object) -> None:
    settings = {field: value} if section is None else {section: {field: value}}
    with pytest.raises(RecipeError, match=field if field in dict(LAUNCHERS_TWINS.values()) else "unset it"):
        check_launcher(environment_of(settings), Path("zero.json"))


def test_a_configuration_that_states_nothing_is_fine() -> None:
    stated = {"zero_stage": None, "offload_param_device": "none", "gradient_accumulation_steps": "auto"}
    stated |= {"zero3_save_16bit_model": False, "zero3_init_flag": True}
    sizes = {"parallelism_config_tp_size": 1}
    settings = {"mixed_precision": False, "deepspeed_config": stated, "parallelism_config": sizes}
    assert out_of_place(environment_of(settings)) == []
    check_launcher(environment_of(settings), Path("zero.json"))
    assert environment_of({"mixed_precision": "no", "deepspeed_config": None}) == {"ACCELERATE_MIXED_PRECISION": "no"}


class _ReachedError(Exception):
    """A start came as far as Accelerate, with its plugins built."""


@pytest.mark.parametrize(
    ("brought", "expected"),
    [
        ({"ACCELERATE_CONFIG_DS_FIELDS": "mixed_precision", "ACCELERATE_MIXED_PRECISION": "no"}, _ReachedError),
        ({"ACCELERATE_USE_FSDP": "true"}, RecipeError),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, RecipeError),
        ({"MASTER_ADDR": ""}, UserError),
    ],
)
def test_a_start_heeds_its_launcher(
    brought: dict[str, str], expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(**_: object) -> None:
        raise _ReachedError

    process_wide = ("_keep_one_heap", "_ask_for_huge_pages", "_compute_in_parallel_only_here")
    for name in ("leave_out_unused_ops", "load_muon_uncompiled", *process_wide):
        monkeypatch.setattr(runtime, name, lambda: None)
    monkeypatch.setattr(runtime, "Accelerator", reached)
    monkeypatch.setattr(os, "environ", dict(os.environ) | LAUNCHED | brought)
    recipe = {
        "model": {"path": "base"},
        "data": {"train": ["pairs.jsonl"]},
        "batch": {"global_pairs": 8},
        "loss": {"beta": 2.0},
        "run": {"output_dir": "run"},
    }
    with pytest.raises(expected):
        runtime.start(Recipe.model_validate(recipe))


def test_accelerate_takes_what_states_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses such fields by their names alone, and reads some of their values as numbers."""
    from accelerate.utils import DeepSpeedPlugin

    fields = ",".join(["deepspeed_config_file", *(field for field, _ in LAUNCHERS_TWINS.values())])
    harmless = dict.fromkeys(LAUNCHERS_TWINS, "auto") | {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "none",
        "ACCELERATE_CONFIG_DS_FIELDS": fields,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero3.json",
    }
    for name, value in harmless.items():
        monkeypatch.setenv(name, value)
    check_launcher(harmless, Path("zero.json"))
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    with pytest.raises(ValueError, match=r"invalid literal|will be ignored"):
        DeepSpeedPlugin(hf_ds_config=dict(config))
    forget(os.environ)
    assert DeepSpeedPlugin(hf_ds_config=config).zero_stage == 3
