"""When a batch job queues itself again, and when it must not; with a run in miniature in place of the trainer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from submit_folder import SubmitFolder
from two_nodes import NODES, until

from dpo_scale.training.status import FAILED_TWICE, USER_ERROR

MINIATURE = Path(__file__).parent / "miniature"
RECIPE = """
model: {path: base}
data: {train: [pairs.jsonl]}
batch: {global_pairs: 8}
loss: {beta: 0.1}
run: {output_dir: run}
"""


@pytest.fixture(scope="module")
def miniature(submit_folder: SubmitFolder) -> SubmitFolder:
    """The submit_folder with another `accelerate` first on the path."""
    (submit_folder.folder / "recipe.yaml").write_text(RECIPE)
    path = f"{MINIATURE}:{submit_folder.environment['PATH']}"
    return replace(submit_folder, environment={**submit_folder.environment, "PATH": path}, patience_s=120.0)


@pytest.fixture(scope="module")
def at_its_limit(miniature: SubmitFolder) -> str:
    """A job that heeds no request to stop, and whose time is up in two minutes; other tests pass meanwhile."""
    job = miniature.train("deaf", MINIATURE="steps=100000 deaf")
    until(lambda: miniature.state(job) == "RUNNING", 60, "the job runs")
    miniature.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    return job


@pytest.mark.usefixtures("at_its_limit")
def test_each_node_starts_its_own_share_and_a_request_to_an_earlier_start_is_forgotten(miniature: SubmitFolder) -> None:
    (miniature.folder / "plain").mkdir()
    (miniature.folder / "plain" / "STOP").touch()
    job = miniature.train("plain", "loss.beta=0.5")
    assert miniature.until_it_ends(job) == "COMPLETED", miniature.said(job)
    launches = sorted(line for line in miniature.said(job).splitlines() if line.startswith("launch: "))
    port = 20000 + int(job)
    assert launches == [
        f"launch: launch --config_file launch/zero3_multinode.yaml --num_machines 2 --num_processes 2 "
        f"--machine_rank {rank} --main_process_ip {NODES[0]} --main_process_port {port} "
        "-m dpo_scale.train recipe.yaml run.output_dir=plain loss.beta=0.5"
        for rank in (0, 1)
    ]
    assert "plain: finished; step 10 is committed" in miniature.said(job)
    assert (miniature.folder / "plain" / "logs" / f"job-{job}-start-0").is_dir()


@pytest.mark.parametrize("overrides", [[], ["loss.betta=1"]], ids=["seen by the run", "seen by the recipe"])
def test_a_mistake_is_not_queued_again(miniature: SubmitFolder, overrides: list[str]) -> None:
    job = miniature.train("mistake", *overrides, MINIATURE="mistake")
    assert miniature.until_it_ends(job) == "FAILED"
    assert miniature.cluster.job(job)["ExitCode"] == f"{USER_ERROR}:0"
    assert miniature.restarts(job) == 0
    assert "data.train: no such file" in miniature.said(job) or "did you mean 'beta'" in miniature.said(job)


@pytest.mark.parametrize("how", ["crash_at", "die_at"])
def test_a_failure_is_queued_again_until_it_comes_twice_without_progress(miniature: SubmitFolder, how: str) -> None:
    job = miniature.train(how, MINIATURE=f"steps=60 {how}=15")
    miniature.until_it_starts_again(job, 1)
    assert miniature.until_it_ends(job) == "FAILED"
    assert miniature.cluster.job(job)["ExitCode"] == f"{FAILED_TWICE}:0"
    assert miniature.restarts(job) == 1
    assert "failed twice without a new checkpoint" in miniature.said(job)
    assert (miniature.folder / how / "logs" / f"job-{job}-start-1").is_dir()


def test_a_held_out_pass_that_is_longer_than_a_job_is_queued_again_once(miniature: SubmitFolder) -> None:
    job = miniature.train("held_out", MINIATURE="steps=100000 held_out")
    until(lambda: miniature.state(job) == "RUNNING", 60, "the job runs")
    miniature.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # which is as far ahead as it is told
    miniature.until_it_starts_again(job, 1)
    assert miniature.until_it_ends(job) == "FAILED"
    assert miniature.cluster.job(job)["ExitCode"] == f"{FAILED_TWICE}:0"
    assert miniature.restarts(job) == 1
    assert "stopped by the STOP file in a held-out pass, no step further than before" in miniature.said(job)


def test_a_cancelled_job_does_not_come_back(miniature: SubmitFolder) -> None:
    job = miniature.train("cancelled", MINIATURE="steps=1000")
    miniature.until_committed("cancelled", 10, job)
    miniature.cluster.run("scancel", job)
    assert miniature.until_it_ends(job) == "CANCELLED"
    time.sleep(5)
    assert miniature.state(job) == "CANCELLED"
    assert miniature.restarts(job) == 0


def test_a_job_whose_stage_cannot_stop_in_time_is_queued_again_before_its_limit(
    miniature: SubmitFolder, at_its_limit: str
) -> None:
    until(lambda: miniature.restarts(at_its_limit) == 1, 150, "the job is queued again")
    assert miniature.state(at_its_limit) in ("PENDING", "COMPLETING", "RUNNING")
    miniature.cluster.run("scancel", at_its_limit)
