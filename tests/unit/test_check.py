"""`dpo-scale check` on a folder of its own: what it shows, and that it refuses what `train` would."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launching import make_model, make_pairs

from dpo_scale import files
from dpo_scale.cli import main
from dpo_scale.console import Console
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.files import write_json
from dpo_scale.inputs import prepare_data
from dpo_scale.operations import check, machine
from dpo_scale.recipe import dump_recipe, load_recipe
from dpo_scale.reference.cache import KEY_BYTES, ReferenceStore
from dpo_scale.reference.row_keys import pair_row_keys
from dpo_scale.reference.source import find_reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, pairs, a recipe and no launch files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    make_model(tmp_path / "model")
    make_pairs(tmp_path / "pairs.jsonl", 40, seed=0)
    recipe: dict[str, Any] = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "pairs.jsonl"},
        "batch": {"global_pairs": 4},
        "loss": {"beta": 2.0},
        "run": {"output_dir": "run"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_check_shows_pairs_as_they_are_trained_on_and_a_plan(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own.yaml"]) == 0
    output = capsys.readouterr().out
    rows = [json.loads(line) for line in (own / "pairs.jsonl").read_text().splitlines()]
    shown = re.findall(r"pairs\.jsonl:(\d+)\n +chosen: (.*)\n +rejected: (.*)", output)
    assert len(shown) == 3
    for number, *sides in shown:
        row = rows[int(number) - 1]
        for name, line in zip(("chosen", "rejected"), sides, strict=True):
            scored = [f"[{token}]" for token in [*row[name], "</s>"]]  # a token a letter
            assert "?" in line.partition("[")[0], "the prompt's last letter is not scored"
            if len(scored) <= 20:
                assert line.endswith("".join(scored))
            else:
                assert "".join(scored[:16]) in line
                assert line.endswith("".join(scored[-4:]))
    assert "10 steps of 4 pairs" in output
    assert "loss.beta" not in output
    assert output.rstrip().endswith("Nothing is wrong with this recipe; dpo-scale doctor RECIPE looks at this machine")


@pytest.mark.parametrize("on", ["accelerator", "launch file", "GPUs"])
def test_a_launch_on_cpus_is_not_judged_by_the_memory_of_gpus(
    on: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if on != "accelerator":
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    launch = ROOT / "launch" / ("zero3.yaml" if on == "GPUs" else "zero3_cpu.yaml")
    assert main(["check", "own.yaml", "--config_file", str(launch)]) == 0
    output = capsys.readouterr().out
    assert ("Fits on 1 node of 8 GPUs" in output) == (on == "GPUs")
    assert ("on the 2 CPU processes of" in output) == (on != "GPUs")


def test_check_speaks_of_one_in_the_singular(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "one.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 1\n"
        "deepspeed_config: {deepspeed_config_file: ds_configs/zero3.json}\n"
    )
    assert main(["check", "own.yaml", "--config_file", "one.yaml", "batch.global_pairs=40"]) == 0
    assert "1 step of 40 pairs, 1 micro-batch each on the 1 " in capsys.readouterr().out


def test_a_reference_with_another_tokenizer_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(own / "other")
    tokenizer = json.loads((own / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (own / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["check", "own.yaml", "reference.path=other"]) == 2
    assert "other has another tokenizer (2 tokens differ" in capsys.readouterr().err


def test_a_beta_that_is_usual_for_sums_is_doubted_and_taken(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own.yaml", "loss.beta=0.1"]) == 0
    assert "loss.beta is 0.1: 0.1 is usual for sums, 2 to 10 for means" in capsys.readouterr().out


def test_check_reads_as_many_rows_as_it_is_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own.yaml", "--rows", "8", "batch.global_pairs=2"]) == 0
    output = capsys.readouterr().out
    assert "Only 8 rows of each source, drawn as for `rows`, are read" in output
    assert "4 steps of 2 pairs" in output


def test_check_tells_mistakes_of_several_parts_at_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(own / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "x", "chosen": 3, "rejected": "y"}\n')
    (own / "model" / "model.safetensors").unlink()
    (own / "launch").mkdir()
    (own / "zero.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    (own / "launch" / "mine.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: zero.json}\n"
    )
    assert main(["check", "own.yaml"]) == 2
    error = capsys.readouterr().err
    assert "3 parts of this recipe are wrong" in error
    assert "pairs.jsonl:41" in error
    assert "'gradient_clipping' belongs to the recipe (optim.max_grad_norm)" in error
    assert "mine.yaml names this file" in error
    assert "model" in error


def test_check_judges_a_launch_file_as_the_run_does(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deepspeed = {"deepspeed_config_file": "ds_configs/zero3.json", "offload_param_device": "none"}
    launch: dict[str, Any] = {"distributed_type": "DEEPSPEED", "mixed_precision": "no", "deepspeed_config": deepspeed}
    (own / "mine.yaml").write_text(yaml.safe_dump(launch))
    assert main(["check", "own.yaml", "--config_file", "mine.yaml"]) == 0
    deepspeed |= {"offload_param_device": "cpu", "gradient_clipping": 0.5}
    (own / "mine.yaml").write_text(yaml.safe_dump(launch))
    assert main(["check", "own.yaml", "--config_file", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "mine.yaml: gradient_clipping: 0.5 in the configuration" in error
    assert "mine.yaml: offload_param_device: cpu in the configuration" in error


def test_check_reads_the_rows_as_text_where_the_model_is_not_found(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(own / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "x", "chosen": 3, "rejected": "y"}\n{"prompt": "x"\n')
        file.write('{"prompt": "x", "chosen": "same", "rejected": "same"}\n')
    assert main(["check", "own.yaml", "model.path=nowhere"]) == 2
    error = capsys.readouterr().err
    assert "2 parts of this recipe are wrong" in error
    assert "model.path: 'nowhere'" in error
    assert "2 rows cannot be used" in error  # the equal answers of row 43 are left out and counted, unless told
    assert "pairs.jsonl:41" in error
    assert "pairs.jsonl:42" in error
    assert main(["check", "own.yaml", "model.path=nowhere", "data.on_no_preference=error"]) == 2
    assert "pairs.jsonl:43: chosen and rejected are equal" in capsys.readouterr().err
    assert main(["check", "own.yaml", "model.path=nowhere", "data.on_bad_row=skip"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.path: 'nowhere'")
    assert "pairs.jsonl" not in error


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, whose user has no configuration of accelerate."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "default_launch_file", lambda: None)


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.parametrize(
    ("named", "first"), [("launch/zero3_multinode.yaml", "zero3_multinode.yaml"), (None, "zero3_cpu.yaml")]
)
def test_the_launch_file_in_force_comes_first_and_none_comes_twice(named: str | None, first: str) -> None:
    names = [Path(file.path).name for file in check._launch_files(named)]
    assert names[0] == first
    assert sorted(names) == sorted(path.name for path in (ROOT / "launch").glob("*.yaml"))


def test_check_refuses_what_train_would_refuse_at_its_start(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "run.output_dir=pairs.jsonl/run",
        "reference.cache_dir=pairs.jsonl/cache",
        "track.to=[jsonl, wand]",
        "run.resume=nowhere",
    ]
    assert main(["check", "own.yaml", *overrides]) == 2
    error = capsys.readouterr().err
    assert "4 parts of this recipe are wrong" in error
    assert f"run.output_dir: pairs.jsonl/run: {own / 'pairs.jsonl'} is no folder; choose another folder" in error
    assert "reference.cache_dir: pairs.jsonl/cache: " in error
    assert "track.to: 'wand' is no tracker" in error
    assert "run.resume: nowhere: no commit record: no such checkpoint" in error


def test_weights_that_were_cut_short_are_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = own / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["check", "own.yaml"]) == 2
    assert "model/model.safetensors: cut short, or no safetensors file" in capsys.readouterr().err


def test_weights_that_may_not_be_read_are_named(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path_open = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return path_open(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    assert main(["check", "own.yaml"]) == 2
    said = "model/model.safetensors: Permission denied; have it made readable (chmod a+r)"
    assert said in capsys.readouterr().err


def test_a_store_that_may_only_be_read_is_no_mistake(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "store").mkdir()
    monkeypatch.setattr(machine.os, "access", lambda path, _: Path(path) != own / "store")
    assert main(["check", "own.yaml", "reference.cache_dir=store"]) == 0
    assert main(["check", "own.yaml", "reference.cache_dir=store/new"]) == 2


def test_a_store_that_lacks_rows_and_may_not_be_written_is_a_mistake(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("own.yaml", ["reference.cache_dir=store"])
    monkeypatch.setattr(files, "_is_settled", lambda changed_ns: True)
    data = prepare_data(recipe, OneProcess(), Console(is_main=False))
    fingerprint = find_reference(recipe, data, OneProcess(), Console(is_main=False)).fingerprint  # as a run leaves it
    store = ReferenceStore.open(Path("store"), fingerprint)
    store.ensure_writable()
    with monkeypatch.context() as patch:
        patch.setattr(machine.os, "access", lambda path, _: Path(path) != own / store.folder)
        assert main(["check", "own.yaml", "reference.cache_dir=store"]) == 2
    said = f"reference.cache_dir: {own / store.folder} may not be written to, and 80 rows are still to be scored"
    assert said in capsys.readouterr().err
    keys = pair_row_keys(data.train).reshape(-1, KEY_BYTES)
    store.append(keys, [np.zeros(3, np.float32)] * len(keys))
    monkeypatch.setattr(machine.os, "access", lambda path, _: Path(path) != own / store.folder)
    assert main(["check", "own.yaml", "reference.cache_dir=store"]) == 0


def test_a_run_that_has_checkpoints_does_not_need_the_one_it_went_on_from(own: Path) -> None:
    committed = own / "run" / "checkpoints" / "step-00000004"
    committed.mkdir(parents=True)
    (committed / "commit.json").touch()
    assert main(["check", "own.yaml", "run.resume=nowhere"]) == 0


@pytest.mark.parametrize("model", ["model", "nowhere"])
def test_all_missing_sources_are_named_together(own: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["data.train=[nope1.jsonl, nope2.jsonl]", "data.evaluate=[nope3.jsonl]"]
    assert main(["check", "own.yaml", f"model.path={model}", *missing]) == 2
    error = capsys.readouterr().err
    assert [name for name in ("nope1", "nope2", "nope3") if error.count(f"{name}.jsonl: no such file") == 1] == [
        "nope1",
        "nope2",
        "nope3",
    ]


def test_check_refuses_the_folder_of_another_recipe_and_leaves_it_as_it_is(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(own / "run" / "checkpoints" / "step-00000004" / "commit.json", {})
    stored = dump_recipe(load_recipe("own.yaml", ["loss.beta=0.2"]))
    (own / "run" / "recipe.yaml").write_text(stored)
    assert main(["check", "own.yaml"]) == 2
    error = capsys.readouterr().err
    assert "run.output_dir: run holds a run of another recipe\n  loss.beta: was 0.2, is 2.0\n" in error
    assert (own / "run" / "recipe.yaml").read_text() == stored
    assert main(["check", "own.yaml", "loss.beta=0.2"]) == 0
