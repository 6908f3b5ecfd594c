"""Arguments of `dpo-scale`: their order, their limits, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from dpo_scale import cli
from dpo_scale.cli import main
from dpo_scale.operations import report
from dpo_scale.reference import commands, rescoring
from dpo_scale.training.checkpoints import named_checkpoint
from dpo_scale.training.status import UNFINISHED, USER_ERROR

RECIPE = """
model: {path: base}
data: {train: [pairs.jsonl]}
batch: {global_pairs: 8}
loss: {beta: 0.1}
run: {output_dir: run}
"""


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What argparse says of arguments that it does not take."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "r.yaml", "--mfu", "0"], "--mfu: '0' is not a number above 0 and up to 1"),
        (["plan", "r.yaml", "--mfu", "40"], "--mfu: '40' is not a number above 0 and up to 1"),
        (["plan", "r.yaml", "--gpu-memory", "-80"], "--gpu-memory: '-80' is not a number above 0"),
        (["plan", "r.yaml", "--host-memory", "0"], "--host-memory: '0' is not a number above 0"),
        (["plan", "r.yaml", "--peak-tflops", "nan"], "--peak-tflops: 'nan' is not a number above 0"),
        (["plan", "r.yaml", "--network", "inf"], "--network: 'inf' is not a number above 0"),
        (["check", "r.yaml", "--rows", "abc"], "--rows: 'abc' is not a whole number from 1 on"),
        (["cache", "verify", "abc", "--rows", "0"], "--rows: '0' is not a whole number from 1 on"),
        (["cache", "prune", "--older-than", "-1"], "--older-than: '-1' is not a number of days from 0 on"),
        (["check", "r.yaml", "--rows", "8", "nonsense"], "unrecognized arguments: nonsense"),
        (["status"], "required: RUN\n"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(arguments, capsys)


@pytest.mark.parametrize("stage", ["train", "score", "evaluate"])
def test_a_stage_says_who_starts_it(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "my recipe.yaml", "loss.beta=5.0"]) == 2
    line = f"accelerate launch --config_file launch/zero3.yaml -m dpo_scale.{stage} 'my recipe.yaml' loss.beta=5.0\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_tilde_behind_an_option_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    parse = cli._parser().parse_args
    assert parse(["demo", "--output=~/demo"]).output == Path("/home/ada/demo")
    assert parse(["report", "run", "--out=~/report.html"]).out == Path("/home/ada/report.html")
    assert parse(["cache", "list", "--dir=~/stores"]).dir == Path("/home/ada/stores")
    assert parse(["check", "r.yaml", "--config_file=~/mine.yaml"]).config_file == "/home/ada/mine.yaml"


def test_every_argument_of_the_plan_is_explained() -> None:
    parser = argparse.ArgumentParser()
    cli._add_plan_command(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_all_stores_outlive_a_negative_age(tmp_path: Path) -> None:
    store = tmp_path / "0123"
    store.mkdir()
    with pytest.raises(SystemExit):
        main(["cache", "prune", "--dir", str(tmp_path), "--older-than", "-1"])
    assert store.is_dir()


@pytest.mark.parametrize("order", [["--dir", "here", "list"], ["list", "--dir", "here"]])
def test_the_stores_folder_may_stand_before_the_action_and_behind_it(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    monkeypatch.setattr(commands, "list_stores", lambda folder: listed.append(folder) or [])
    assert main(["cache", *order]) == 0
    assert listed == [Path("here")]


@pytest.mark.parametrize(
    "order",
    [
        ["--recipe", "r.yaml", "abc", "loss.beta=5.0"],
        ["abc", "loss.beta=5.0", "--recipe", "r.yaml"],
        ["abc", "--recipe", "r.yaml", "loss.beta=5.0"],
    ],
)
def test_a_recipe_to_verify_with_leaves_the_store_its_place(
    order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    Path("r.yaml").write_text(RECIPE)
    rescored = []

    def rescore(recipe: object, store: Path, rows: int) -> rescoring.RowComparison:
        rescored.append((recipe, store, rows))
        return rescoring.RowComparison(1, 1, 0.0)

    monkeypatch.setattr(rescoring, "rescore", rescore)
    monkeypatch.setattr(commands, "find_store", lambda _, name: Path(name))
    monkeypatch.setattr(commands, "verify", lambda _: [])
    assert main(["cache", "verify", *order]) == 0
    ((recipe, store, _),) = rescored
    assert (store, recipe.loss.beta) == (Path("abc"), 5.0)
    assert "1 row (1 token) scored anew" in capsys.readouterr().out
    assert not logging.is_progress_bar_enabled()


def test_a_setting_without_its_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", "abc", "loss.beta=5.0"]) == 2
    assert "give it with --recipe RECIPE" in capsys.readouterr().err


# --- export


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with checkpoints that have nothing but a commit record."""
    for step in (9, 10):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "commit.json").touch()
    (tmp_path / "run" / "checkpoints" / "step-00000011").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000010\n")
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "step"),
    [
        (".", 10),
        ("checkpoints", 10),
        ("checkpoints/latest", 10),
        ("checkpoints/step-00000009", 9),
    ],
)
def test_a_checkpoint_is_found_by_its_run_and_by_its_name(run: Path, given: str, step: int) -> None:
    assert named_checkpoint(run / given).resolve() == run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("given", ["checkpoints/step-00000011", "nowhere"])
def test_what_is_no_checkpoint_is_told_from_one(run: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run / given), str(run / "model")]) == 2
    assert f"{given}: no committed checkpoint; give RUN/checkpoints/step-..." in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["checkpoints", "checkpoints/step-00000011"])
def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    run: Path, closed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(path: Any = ".") -> Any:
            if Path(path) == run / closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return look(path)

        return refuse

    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    assert main(["export", str(run), str(run / "model")]) == USER_ERROR
    assert capsys.readouterr().err == f"error: {run / closed}: Permission denied\n"


def test_a_checkpoint_away_from_its_run_lacks_the_runs_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "elsewhere" / "kept" / "step-00000010"
    shutil.copytree(run / "checkpoints" / "step-00000010", copied)
    assert main(["export", str(copied), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'elsewhere' / 'recipe.yaml'} is missing" in error
    assert f"copy RUN/recipe.yaml and RUN/model_files to {tmp_path / 'elsewhere'}" in error


# --- status of what is no run


def test_status_of_nothing_names_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "nowhere")]) == USER_ERROR
    assert "nowhere: not there; give a run's folder or a recipe" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").touch()
    assert main(["status", str(tmp_path), "--count-failure"]) == USER_ERROR
    assert "no run's folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_recipe_alone_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert main(["status", str(tmp_path)]) == USER_ERROR
    assert "no run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["logs", "checkpoints", "status-score.json"])
def test_a_run_that_died_early_is_one(left: str, tmp_path: Path) -> None:
    (tmp_path / left).mkdir()
    assert main(["status", str(tmp_path)]) == UNFINISHED


def test_a_recipes_run_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    assert main(["status", "--count-failure", "--", "r.yaml"]) == UNFINISHED
    assert main(["status", "--", "r.yaml"]) == UNFINISHED


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a command returns whose work ends in an error."""

    def fail(runs: object, out: object) -> None:
        raise error

    monkeypatch.setattr(report, "write_report", fail)
    return main(["report", "run"])


def test_what_stops_a_command_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "Stopped by SIGINT\n"
    full = OSError(errno.ENOSPC, "No space left on device", "base/tokenizer.json", None, "/tmp/tokenizer.json")
    assert failing(full, monkeypatch) == USER_ERROR
    assert capsys.readouterr().err == "error: base/tokenizer.json -> /tmp/tokenizer.json: No space left on device\n"
    with pytest.raises(OSError, match="of no file"):
        failing(OSError(errno.EIO, "of no file"), monkeypatch)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As `head` is; what is printed goes out at the end."""
    command = [sys.executable, "-m", "dpo_scale.cli", "cache", "list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
