"""The benchmarks run, and their sides do the same work. What they measure is nobody's pass or fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import HERE
from launching import make_pairs
from scaling import WARM_UP, Bench

from dpo_scale.reference.commands import list_stores

pytest.importorskip("trl")
pytestmark = pytest.mark.launch


def run(script: str, *arguments: str | Path) -> str:
    """What a benchmark prints."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def results(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return entries


def test_training_step_compares_equal_work(tmp_path: Path) -> None:
    """The losses of both sides agree, step by step."""
    out = tmp_path / "figures.json"
    pairs = make_pairs(tmp_path / "pairs.jsonl", count=6, seed=0)
    few = ("--pairs", pairs, "--steps", "2", "--warm-up", "1", "--repeats", "1", "--step-pairs", "2")
    run("training_step.py", *few, "--sides", "shared", "trl", "--json", out)
    sides = {entry["side"]: entry for entry in results(out)}
    assert sides.keys() == {"shared", "trl"}
    assert sides["trl"]["loss_gap"] < 1e-4


def test_reference_pass_scores_every_pair(tmp_path: Path) -> None:
    """A pass over fewer pairs than it is divided by would look fast."""
    out = tmp_path / "figures.json"
    run("reference_pass.py", "--rows", "5", "--trl-batch", "2", "--repeats", "1", "--work", tmp_path, "--json", out)
    assert [entry["side"] for entry in results(out)] == ["ours", "trl"]
    (cache_dir,) = tmp_path.glob("score-*-ours/reference")
    assert sum(store.rows for store in list_stores(cache_dir)) == 2 * 5


def test_start_up_sees_every_milestone(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    run("start_up.py", "--rows", "8", "--processes", "1", "--repeats", "1", "--json", out)
    cold, warm = results(out)
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert cold["milestones"].keys() - warm["milestones"].keys() == {"Loading the reference"}


def test_plan_error_measures_every_phase(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    run("plan_error.py", "--shapes", "wide head", "--processes", "1", "--json", out)
    (entry,) = results(out)
    assert all(entry["measured"].values())


def test_scaling_measures_made_up_lengths(tmp_path: Path) -> None:
    few = argparse.Namespace(
        pairs=None, processes=[1], device="cpu", threads=1, vocabulary=[8000], shape="small", dtype="float32", repeats=1
    )
    lengths = np.tile([8, 4, 4], (WARM_UP + 2, 1))
    (entry,) = Bench(few, tmp_path).measure({"short": lengths}, step_pairs=1)
    assert entry["case"] == "short"


def test_growth_with_the_number_of_rows_is_measured() -> None:
    assert json.loads(run("planning_cost.py", "1000"))["pairs"] == 1000
    assert json.loads(run("store_scale.py", "--rows", "1000"))["parts"] == 1
    assert json.loads(run("data_scale.py", "--pairs", "2000", "--workers", "1"))["tokenize"]["tokens"] > 2000


def test_tokenization_is_compared() -> None:
    printed = json.loads(run("tokenization.py", "--pairs", "64", "--repeats", "1", "--cores", "1"))
    assert printed["pairs"] == 64
