"""Ranks that fail at once on one machine: one cause is said, and all know it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread

import pytest
from disks import full_pipe

from dpo_scale import launched
from dpo_scale.console import Console
from dpo_scale.launched import LastWords
from dpo_scale.training.status import StatusFile, read_status

RANKS = 8


def test_one_cause_is_said_whatever_fails_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(100):
        together, said = Barrier(RANKS), []
        folder = tmp_path / str(attempt)
        told = [folder / str(rank) / "error.json" for rank in range(RANKS)]

        def fail(rank: int, told: Path, together: Barrier = together, said: list[str] = said) -> None:
            told.parent.mkdir(parents=True)
            words = LastWords(Console(is_main=False))
            words._error_file = told
            words.console.say = said.append  # type: ignore[assignment, method-assign]
            together.wait()
            words(f"rank {rank} failed", cause=True)

        ranks = [Thread(target=fail, args=(rank, path)) for rank, path in enumerate(told)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert len(said) == 1, attempt
        assert {path.read_text().partition(",")[0] for path in told} == {f'{{"message": "{said[0]}"'}
        assert {path.name for path in folder.iterdir()} == {"said", *(str(rank) for rank in range(RANKS))}


def test_a_failure_that_the_main_rank_noted_its_next_stage_over_is_recorded_after_all(tmp_path: Path) -> None:
    """Another rank fails over a mistake; the main one notes that it is loading, and then fails over the other's end."""
    ranks = []
    for rank in range(2):
        words = LastWords(Console(is_main=False))
        words._error_file = tmp_path / str(rank) / "error.json"
        words._error_file.parent.mkdir()
        words.run = tmp_path, "train"
        words.console.say = lambda message: None  # type: ignore[method-assign]
        ranks.append(words)
    status = StatusFile(tmp_path, "train")
    ranks[1]("error: no such kernel", cause=True, reason="no such kernel", users_mistake=True)
    status.enter("loading")
    ranks[0]("rank 0 failed:\nTraceback", cause=True, reason="RuntimeError: connection closed")
    found = read_status(tmp_path, "train")
    assert found is not None
    assert (found.state, found.reason, found.users_mistake) == ("failed", "no such kernel", True)


def test_a_log_that_hangs_keeps_the_words_from_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = full_pipe()
    console, error_file = io.StringIO(), tmp_path / "0" / "error.json"
    error_file.parent.mkdir()
    monkeypatch.setattr(launched, "LOG_SECONDS", 0.1)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    words = LastWords(Console(console))
    words._error_file, words.has_log, words.run = error_file, True, (tmp_path, "train")
    words("no disk", cause=True)
    assert console.getvalue() == "no disk\n"
    assert json.loads(error_file.read_text())["message"] == "no disk"
    found = read_status(tmp_path, "train")
    assert found is not None
    assert found.reason == "no disk"
    os.close(reader)  # and the thread that writes goes on


def test_a_mistake_that_every_rank_finds_is_said_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m}\ndata: {train: t}\nbatch: {global_pairs: 1}\nloss: {beta: -1.0}\nrun: {output_dir: r}"
    )
    output = tmp_path / "output"
    ranks = []
    for rank in range(3):
        told = tmp_path / "attempt" / str(rank) / "error.json"
        told.parent.mkdir(parents=True)
        environment = os.environ | {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(told)}
        command = [sys.executable, "-m", "dpo_scale.train", str(recipe)]
        with output.open("a") as stream:
            ranks.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
    assert [rank.wait(60) for rank in ranks] == [2, 2, 2]
    first, second = output.read_text().splitlines()
    assert first == f"error: {recipe}: 1 mistake"
    assert second.startswith("  loss.beta: ")


def test_help_is_no_mistake() -> None:
    command = [sys.executable, "-m", "dpo_scale.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dpo_scale.train RECIPE" in done.stdout


INTERRUPTED = """
import os, signal, sys, time
from dpo_scale import launched

def stage(recipe, console, watch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts in the background
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)

launched._stage = lambda name: stage
launched.run_stage("train")
"""


def test_an_interrupt_before_a_stage_listens_for_signals_is_told_in_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = ["model: {path: m}", "data: {train: t}", "batch: {global_pairs: 1}", "loss: {beta: 1.0}"]
    recipe.write_text("\n".join([*settings, f"run: {{output_dir: {tmp_path / 'run'}}}"]))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_ERROR_FILE")}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(recipe)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["Stopped by SIGINT; the same command starts again"]
    found = read_status(tmp_path / "run", "train")
    assert found is not None
    assert not found.users_mistake


CRASHED_EARLY = """
from dpo_scale import launched

def read(name):
    raise RuntimeError("a fault of ours")

launched._recipe_of_arguments = read
launched.run_stage("train")
"""


def test_a_crash_before_there_is_a_log_prints_its_traceback_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_ERROR_FILE")}
    command = [sys.executable, "-c", CRASHED_EARLY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: a fault of ours") == 1


def test_half_a_message_is_none_for_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a full disk it would end with a traceback about its JSON, the last thing said."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def fill(path: Path, text: str) -> None:
        with path.open("w") as stream:
            stream.write(text[:5])
        raise OSError(28, "No space left on device")

    words = LastWords(Console(io.StringIO()))  # type: ignore[arg-type]
    words.tell_launcher("over")
    assert json.loads(file.read_text())["message"] == "over"
    monkeypatch.setattr(Path, "write_text", fill)
    words.tell_launcher("over")
    assert not file.exists()
