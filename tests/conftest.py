"""What tests of every kind share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import Launched, Launcher, make_launcher


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums of floats depend on how many threads share them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _clean_tree() -> Iterator[None]:
    """What tests write belongs into their temporary folders."""
    before = _untracked_files()
    yield
    assert sorted(_untracked_files() - before) == [], "tests have left files in the working tree"


def _untracked_files() -> set[str]:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "ls-files",
        "--others",
        "--exclude-standard",
        "--full-name",
        ":/",
    ]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # not in a checkout
        return set()
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="session")
def hh_pairs_path() -> Path:
    """Real dialogues as JSONL.gz: `chosen` and `rejected`, the prompt inside both."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
    path = Path(os.environ.get("DPO_SCALE_HH_PAIRS") or beside)
    if not path.is_file():
        pytest.skip(f"no preference data at {path}; name a file in DPO_SCALE_HH_PAIRS")
    return path


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return make_launcher(tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="session")
def undisturbed(launcher: Launcher) -> Launched:
    """Two epochs on two ranks, ten steps, from nothing to an exported model, tracked by TensorBoard too.

    It comes before every other launch of the same recipe, since it fills the store of reference log-probs for them.
    """
    return launcher("undisturbed", ["track.to=[tensorboard]"])
