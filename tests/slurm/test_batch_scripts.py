"""The shipped batch scripts on a real SLURM of two nodes: they finish, and they finish what was interrupted."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import make_model, make_pairs
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root
from two_nodes import NODES, TwoNodes, missing, until

from dpo_scale.training.status import committed_step

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

ROOT = Path(__file__).parents[2]
EDITS = {
    r"--nodes=\d+": "--nodes=2",
    r"--gpus-per-node=\d+": "--ntasks=2",  # no GPUs here: one rank a node
    r"--cpus-per-task=\d+": "--cpus-per-task=1",
    r"--time=[\d:]+": "--time=02:00:00",
}
"""What a user edits at the top of a batch script."""

PATIENCE_S = 600.0
"""For anything that waits for a launch, on a machine that may be busy with others."""


def _edit(script: Path) -> None:
    lines = script.read_text().splitlines()
    for pattern, replacement in EDITS.items():
        (index,) = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        assert "# EDIT" in lines[index], lines[index]
        lines[index] = re.sub(pattern, replacement, lines[index])
    script.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Workplace:
    """A user's folder: a copy of launch/, with its edit points edited, and a recipe."""

    folder: Path
    cluster: TwoNodes

    def submit(self, *command: str) -> str:
        return self.cluster.run("env", "--chdir", str(self.folder), *command)

    def train(self, run: str) -> str:
        """Submit a training job; its id."""
        return self.submit(
            "sbatch", "--parsable", "launch/slurm/train.sbatch", "recipe.yaml", f"run.output_dir={run}"
        ).strip()

    def said(self, job: str) -> str:
        """Everything that a job wrote, over all its starts."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def starts(self, job: str) -> int:
        """How often a job was started again."""
        return int(self.cluster.job(job)["Restarts"])

    def state(self, job: str) -> str:
        return self.cluster.job(job)["JobState"]

    def until_committed(self, run: str, step: int, job: str) -> None:
        """Wait until a running job has a checkpoint of a step or a later one."""

        def reached() -> bool:
            assert self.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.said(job)
            return (committed_step(self.folder / run) or 0) >= step

        until(reached, PATIENCE_S, f"{run} has committed step {step}")

    def until_it_starts_again(self, job: str, restarts: int) -> None:
        until(
            lambda: self.starts(job) >= restarts and self.state(job) == "RUNNING", PATIENCE_S, f"job {job} starts again"
        )

    def until_it_ends(self, job: str) -> str:
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        until(lambda: self.state(job) in ends, PATIENCE_S, f"job {job} ends")
        return self.state(job)

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / run / "model" / "model.safetensors")


NUM_STEPS = 100  # 20 pairs, 4 a step, 20 epochs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copytree(ROOT / "launch", folder / "launch")
    for script in ("train.sbatch", "score.sbatch"):
        _edit(folder / "launch" / "slurm" / script)
    recipe: dict[str, Any] = {
        "model": {"path": str(make_model(folder / "model")), "dtype": "float32"},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {
            "train": str(make_pairs(folder / "train.jsonl", 20, seed=1)),
            "max_length": 256,
            "cache_dir": str(folder / "tokens"),
        },
        "batch": {"global_pairs": 4, "rank_tokens": 300},
        "loss": {"beta": 2.0},
        "optim": {"learning_rate": 3e-3},
        "checkpoint": {"every_steps": 5},
        "track": {"every_steps": 1},
        "run": {"output_dir": "undisturbed", "epochs": NUM_STEPS // 5},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python = Path(sys.executable).parent
    monkeypatch_module.setenv("PATH", f"{python}:{os.environ['PATH']}")
    monkeypatch_module.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch_module.setenv("OMP_NUM_THREADS", "1")
    monkeypatch_module.setenv("DS_ACCELERATOR", "cpu")
    if "TORCH_EXTENSIONS_DIR" not in os.environ:  # what other tests have compiled
        built = Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
        monkeypatch_module.setenv("TORCH_EXTENSIONS_DIR", str(built))
    with TwoNodes(tmp_path_factory.mktemp("two_nodes") / "cluster") as cluster:
        yield Workplace(folder, cluster)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """A scoring job and the training job that waits for it; the training job's id, when it has ended."""
    told = workplace.submit("launch/slurm/train_after_score.sh", "recipe.yaml")
    score, train = re.findall(r"job (\d+)", told)
    assert workplace.job_depends(train, score)
    assert workplace.until_it_ends(score) == "COMPLETED", workplace.said(score)
    assert "Done: 40 rows scored" in workplace.said(score)
    workplace.until_it_ends(train)
    return train


def test_training_on_two_nodes_finishes_after_scoring(workplace: Workplace, undisturbed: str) -> None:
    said = workplace.said(undisturbed)
    assert workplace.state(undisturbed) == "COMPLETED", said
    assert workplace.starts(undisturbed) == 0
    assert "ZeRO stage 3 on 2 ranks" in said
    assert f"undisturbed: finished; step {NUM_STEPS} is committed" in said
    assert "0 to score" in said or "rows scored" not in said  # the other job had scored them
    logs = workplace.folder / "undisturbed" / "logs" / f"job-{undisturbed}-start-0"
    assert sorted(path.name for path in logs.iterdir()) == ["train-rank-0.log", "train-rank-1.log"]


def test_a_run_that_is_requeued_cut_by_its_time_limit_and_robbed_of_a_node_ends_bitwise_as_if_undisturbed(
    workplace: Workplace, undisturbed: str
) -> None:
    cluster = workplace.cluster
    job = workplace.train("disturbed")

    workplace.until_committed("disturbed", 5, job)
    cluster.run("scontrol", "requeue", job)
    workplace.until_it_starts_again(job, 1)

    workplace.until_committed("disturbed", committed_step(workplace.folder / "disturbed") or 0 + 5, job)
    cluster.lose_node(NODES[1])
    until(lambda: workplace.state(job) != "RUNNING", PATIENCE_S, "the loss is noticed")
    cluster.start_node(NODES[1])
    workplace.until_it_starts_again(job, 2)

    before = committed_step(workplace.folder / "disturbed") or 0
    # SLURM checks limits every half minute and gives USR1 ten minutes ahead: with this limit at its next check.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    until(lambda: workplace.starts(job) == 3, PATIENCE_S, "the run stops ahead of its time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=120")
    assert "stopped by the STOP file" in workplace.said(job)
    assert before < (committed_step(workplace.folder / "disturbed") or 0) < NUM_STEPS

    assert workplace.until_it_ends(job) == "COMPLETED", workplace.said(job)
    expected = workplace.weights("undisturbed")
    actual = workplace.weights("disturbed")
    assert expected.keys() == actual.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name
    expected_lines = (workplace.folder / "undisturbed" / "metrics.jsonl").read_text().count('"loss"')
    assert (workplace.folder / "disturbed" / "metrics.jsonl").read_text().count('"loss"') == expected_lines
