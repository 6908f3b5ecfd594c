"""One SLURM for all tests of the batch scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_nodes import TwoNodes, missing
from workplace import ROOT, Workplace, copy_of_launch


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    if reason := missing():
        pytest.skip(reason)
    with TwoNodes(tmp_path_factory.mktemp("two_nodes") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workplace(two_nodes: TwoNodes, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    copy_of_launch(folder)
    path = f"{Path(sys.executable).parent}:{two_nodes.environment['PATH']}"
    python_path = f"{ROOT}:{two_nodes.environment.get('PYTHONPATH', '')}"
    return Workplace(folder, two_nodes, {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"})
