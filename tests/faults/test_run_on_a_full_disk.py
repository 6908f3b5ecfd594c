"""A run whose disk fills up, and whose newest checkpoint then rots, goes on from the one before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from disks import Disk, small_disk
from launching import Launched, Launcher
from run_kill import wrong_lines
from safetensors.torch import load_file

from dpo_scale.training.checkpoints import open_checkpoint, verify
from dpo_scale.training.status import read_status

pytestmark = pytest.mark.launch

CHECKPOINT_KILOBYTES = 500
SETTINGS = ["checkpoint.every_steps=1"]


@dataclass(frozen=True)
class Cramped:
    """The launch that filled the disk, and what it left."""

    launched: Launched
    disk: Disk
    steps: list[str]
    problems: list[str]
    """Of the checkpoints that were left."""


@pytest.fixture(scope="module")
def cramped(launcher: Launcher, undisturbed: Launched) -> Iterator[Cramped]:
    with small_disk(launcher.workspace / "cramped", kilobytes=int(4.5 * CHECKPOINT_KILOBYTES)) as disk:
        done = launcher("cramped", SETTINGS)
        folder = disk.path / "checkpoints"
        steps = sorted(path.name for path in folder.iterdir() if path.name != "latest")
        problems = [problem for name in steps for problem in verify(open_checkpoint(folder / name))]
        yield Cramped(done, disk, steps, problems)


def test_a_disk_that_fills_up_ends_the_run_with_its_message_and_keeps_what_was_committed(cramped: Cramped) -> None:
    output = cramped.launched.output
    assert cramped.launched.returncode != 0
    assert len(cramped.steps) >= 2
    assert cramped.steps == [f"step-{step:08d}" for step in range(1, len(cramped.steps) + 1)]
    assert cramped.problems == []
    failed = f"step-{len(cramped.steps) + 1:08d}: not written"
    assert f"error: {cramped.disk.path / 'checkpoints' / failed}" in output
    assert "No space left on device" in output
    assert "Earlier checkpoints are untouched" in output
    ours, _, launchers = output.partition("ChildFailedError")
    assert ours.count(failed) == 1, output  # whatever the ranks
    assert failed in launchers.partition("Root Cause")[2], output
    assert "CheckpointError" not in output  # no traceback of ours: a full disk is the user's to mend
    status = read_status(cramped.disk.path, "train")
    assert status is not None
    assert (status.state, status.users_mistake) == ("failed", False)  # a batch script tries once more


def test_the_same_command_goes_on_from_the_newest_checkpoint_that_is_whole(
    launcher: Launcher, cramped: Cramped, undisturbed: Launched
) -> None:
    folder = cramped.disk.path / "checkpoints"
    newest, before = cramped.steps[-1], cramped.steps[-2]
    with (folder / newest / "rank-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    (folder / "latest").write_text("step-00000099\n")
    cramped.disk.resize(kilobytes=20 * CHECKPOINT_KILOBYTES)
    done = launcher("cramped", SETTINGS)
    assert done.returncode == 0, done.output
    assert f"Passed over {folder / newest}: rank-00001-of-00002.safetensors: its contents changed" in done.output
    assert f"Resuming from {folder / before}" in done.output
    assert wrong_lines(undisturbed.folder, done.folder) == []
    expected, actual = (load_file(run.folder / "model" / "model.safetensors") for run in (undisturbed, done))
    assert all(actual[name].equal(expected[name]) for name in expected)
