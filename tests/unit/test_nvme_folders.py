"""Runs that share a node's NVMe disk have folders of their own, and leave none behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_scale.distributed import nvme_folders
from dpo_scale.distributed.nvme_folders import hold, own_folder


@pytest.fixture(autouse=True)
def _let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    held: list[int] = []
    monkeypatch.setattr(nvme_folders, "_held", held)
    yield
    for descriptor in held:
        os.close(descriptor)


def test_a_folder_belongs_to_one_role_of_one_run(tmp_path: Path) -> None:
    names = [own_folder(str(tmp_path / run), role) for run in ("a", "b") for role in ("policy", "reference")]
    assert len(set(names)) == 4
    assert len({Path(name).parent for name in names}) == 2


def test_a_run_of_the_same_path_in_another_container_has_another_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ours = own_folder(str(run), "policy")
    assert own_folder(str(run), "policy") == ours
    run.rename(tmp_path / "run of another container")
    run.mkdir()
    theirs = own_folder(str(run), "policy")
    assert theirs != ours
    assert theirs.split("-")[:2] == ours.split("-")[:2]


def test_a_mount_that_gets_another_number_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for device in (os.makedev(0, 41), os.makedev(0, 42), os.makedev(259, 1), os.makedev(259, 2)):
        found = os.stat_result((0o40755, 128, device, 1, 0, 0, 0, 0, 0, 0))
        monkeypatch.setattr(Path, "stat", lambda path, found=found: found)
        names.append(own_folder(str(tmp_path), "policy"))
    assert names[0] == names[1]
    assert len(set(names)) == 3


USER = """
import sys, time
from pathlib import Path
from dpo_scale.distributed.nvme_folders import hold
hold(Path(sys.argv[1]))
print("holds", flush=True)
time.sleep(600)
"""


def test_what_an_earlier_start_left_is_deleted_and_what_is_used_stays(tmp_path: Path) -> None:
    names = ("dpo_scale-a-1", "dpo_scale-a-2", "dpo_scale-a-3", "dpo_scale-b-1", "notes")
    own, used, left, other_run, notes = (tmp_path / name for name in names)
    for folder in (used, left, other_run, notes):
        (folder / "policy").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", USER, str(used)], stdout=subprocess.PIPE, text=True) as user:
        try:
            assert user.stdout is not None
            assert user.stdout.readline() == "holds\n"
            hold(own)
            assert {path.name for path in tmp_path.iterdir()} == set(names) - {left.name}
        finally:
            user.kill()
    hold(own)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {used.name, left.name}


def test_where_folders_cannot_be_locked_none_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> bool:
        raise OSError("no locks available")

    monkeypatch.setattr(nvme_folders, "try_lock", refuse)
    (tmp_path / "dpo_scale-a-2").mkdir()
    hold(tmp_path / "dpo_scale-a-1")
    assert len(list(tmp_path.iterdir())) == 2
