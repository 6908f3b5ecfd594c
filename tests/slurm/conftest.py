"""One SLURM for all tests of the batch scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from submit_folder import ROOT, SubmitFolder, copy_of_launch
from two_nodes import TwoNodes, missing


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    if reason := missing():
        pytest.skip(reason)
    with TwoNodes(tmp_path_factory.mktemp("two_nodes") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def submit_folder(two_nodes: TwoNodes, tmp_path_factory: pytest.TempPathFactory) -> SubmitFolder:
    folder = tmp_path_factory.mktemp("submit_folder")
    copy_of_launch(folder)
    path = f"{Path(sys.executable).parent}:{two_nodes.environment['PATH']}"
    python_path = f"{ROOT}:{two_nodes.environment.get('PYTHONPATH', '')}"
    return SubmitFolder(folder, two_nodes, {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"})
