"""The doctor under a real `srun`, a task on each of two nodes."""

from __future__ import annotations

import subprocess
import sys

from submit_folder import ROOT
from two_nodes import NODES, TwoNodes


def test_doctor_looks_at_every_node_and_its_clock(two_nodes: TwoNodes) -> None:
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "dpo_scale.cli", "doctor"]
    python_path = f"{ROOT}:{two_nodes.environment.get('PYTHONPATH', '')}"
    environment = two_nodes.environment | {"PYTHONPATH": python_path, "COLUMNS": "200", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("This machine is ready") == 1  # the first node speaks for all
    for node in NODES:
        assert f"│ {node} " in done.stdout
    assert "2 nodes within" in done.stdout
