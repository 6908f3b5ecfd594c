"""A user's folder on the cluster: a copy of launch/ with its edit points edited, jobs, and what became of them."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from two_nodes import TwoNodes, until

from dpo_scale.training.status import committed_step

ROOT = Path(__file__).parents[2]
EDITS = {
    r"--nodes=\d+": "--nodes=2",
    r"--gpus-per-node=\d+": "--ntasks=2",  # no GPUs here: one rank a node
    r"--cpus-per-task=\d+": "--cpus-per-task=1",
    r"--time=[\d:]+": "--time=02:00:00",
}
"""What a user edits at the top of a batch script."""

TRAIN = "launch/slurm/train.sbatch"
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@dataclass(frozen=True)
class SubmitFolder:
    """A user's folder: a copy of launch/, recipes, runs, and what SLURM writes."""

    folder: Path
    cluster: TwoNodes
    environment: Mapping[str, str] = field(default_factory=dict)
    patience_s: float = 600.0
    """For anything that waits for a launch, on a machine that may be busy with others."""

    def submit(self, *command: str, **environment: str) -> str:
        """Run a command in the folder; its output."""
        added = [f"{name}={value}" for name, value in {**self.environment, **environment}.items()]
        return self.cluster.run("env", "--chdir", str(self.folder), *added, *command).strip()

    def train(self, run: str, *overrides: str, **environment: str) -> str:
        """Submit a training job; its id."""
        run = f"run.output_dir={run}"
        return self.submit("sbatch", "--parsable", TRAIN, "recipe.yaml", run, *overrides, **environment)

    def said(self, job: str) -> str:
        """Everything that a job wrote, over all its starts."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        return self.cluster.job(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def committed(self, run: str) -> int:
        """Step of a run's newest checkpoint."""
        return committed_step(self.folder / run) or 0

    def until_committed(self, run: str, step: int, job: str) -> None:
        """Wait until a job has a checkpoint of a step or a later one."""

        def reached() -> bool:
            assert self.state(job) not in ENDS, self.said(job)
            return self.committed(run) >= step

        until(reached, self.patience_s, f"{run} has committed step {step}")

    def until_it_starts_again(self, job: str, restarts: int) -> None:
        """Wait for a further start. SLURM holds a job that was queued again for two minutes; here it need not."""

        def started() -> bool:
            if self.restarts(job) == restarts and self.cluster.job(job)["Reason"] == "BeginTime":
                time.sleep(3)  # the credential of the start before is revoked for the second in which it ended
                self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.restarts(job) >= restarts and self.state(job) in ("RUNNING", *ENDS)

        until(started, self.patience_s, f"job {job} starts again")

    def until_it_ends(self, job: str) -> str:
        """Wait for a job's end; its state."""
        until(lambda: self.state(job) in ENDS, self.patience_s, f"job {job} ends")
        return self.state(job)


def _edit(script: Path) -> None:
    """Edit a batch script as a user does: at the lines that say so."""
    lines = script.read_text().splitlines()
    for pattern, replacement in EDITS.items():
        (index,) = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        assert "# EDIT" in lines[index], lines[index]
        lines[index] = re.sub(pattern, replacement, lines[index])
    script.write_text("\n".join(lines) + "\n")


def copy_of_launch(folder: Path) -> None:
    """Copy launch/ to a folder, and edit its batch scripts."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    for script in ("train.sbatch", "score.sbatch"):
        _edit(folder / "launch" / "slurm" / script)
