"""The shipped batch scripts and the trainer on a real SLURM of two nodes: they finish, also what was interrupted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from launching import make_model, make_pairs
from safetensors.torch import load_file
from submit_folder import SubmitFolder
from two_nodes import NODES, until

pytestmark = [pytest.mark.launch, pytest.mark.timeout(2400)]

NUM_STEPS = 100  # 20 pairs, 4 a step, 20 epochs


@pytest.fixture(scope="module")
def user(submit_folder: SubmitFolder) -> SubmitFolder:
    """The submit_folder with a small model, pairs and a recipe in it."""
    folder = submit_folder.folder
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
    return replace(submit_folder, environment={**submit_folder.environment, "DS_ACCELERATOR": "cpu"})


def weights(user: SubmitFolder, run: str) -> dict[str, torch.Tensor]:
    return load_file(user.folder / run / "model" / "model.safetensors")


def losses(user: SubmitFolder, run: str) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step."""
    lines = map(json.loads, (user.folder / run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(user: SubmitFolder) -> str:
    """A scoring job and the training job that waits for it; the training job's id, when it has ended."""
    told = user.submit("launch/slurm/train_after_score.sh", "recipe.yaml")
    score, train = re.findall(r"job (\d+)", told)
    assert user.cluster.job(train)["Dependency"].startswith(f"afterok:{score}")
    assert user.until_it_ends(score) == "COMPLETED", user.said(score)
    assert "Done: 40 rows scored" in user.said(score)
    user.until_it_ends(train)
    return train


def test_training_on_two_nodes_finishes_after_scoring(user: SubmitFolder, undisturbed: str) -> None:
    said = user.said(undisturbed)
    assert user.state(undisturbed) == "COMPLETED", said
    assert user.restarts(undisturbed) == 0
    assert "ZeRO stage 3 on 2 ranks" in said
    assert f"undisturbed: finished; step {NUM_STEPS} is committed" in said
    assert "0 to score" in said or "rows scored" not in said  # the other job had scored them
    logs = user.folder / "undisturbed" / "logs" / f"job-{undisturbed}-start-0"
    assert sorted(path.name for path in logs.iterdir()) == ["train-rank-0.log", "train-rank-1.log"]


def test_a_run_that_is_requeued_loses_a_node_and_meets_its_time_limit_ends_bitwise_as_if_undisturbed(
    user: SubmitFolder, undisturbed: str
) -> None:
    cluster = user.cluster
    job = user.train("disturbed")

    user.until_committed("disturbed", 5, job)
    cluster.run("scontrol", "requeue", job)
    user.until_it_starts_again(job, 1)

    user.until_committed("disturbed", user.committed("disturbed") + 5, job)
    cluster.lose_node(NODES[1])
    until(lambda: user.state(job) != "RUNNING", user.patience_s, "the loss is noticed")
    cluster.start_node(NODES[1])
    user.until_it_starts_again(job, 2)

    before = user.committed("disturbed")
    user.until_committed("disturbed", before + 5, job)
    # SLURM checks limits every half minute and gives USR1 ten minutes ahead: with this limit at its next check. The
    # run stands still until then, since it may have less than half a minute to go.
    with cluster.ranks_held():
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
        until((user.folder / "disturbed" / "STOP").exists, user.patience_s, "the script asks the run to stop")
    until(lambda: user.restarts(job) == 3, user.patience_s, "the run stops ahead of its time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=120")
    assert "stopped by the STOP file" in user.said(job)
    assert before < user.committed("disturbed") < NUM_STEPS
    user.until_it_starts_again(job, 3)

    assert user.until_it_ends(job) == "COMPLETED", user.said(job)
    expected = weights(user, "undisturbed")
    actual = weights(user, "disturbed")
    assert expected.keys() == actual.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name
    assert losses(user, "disturbed") == losses(user, "undisturbed")
