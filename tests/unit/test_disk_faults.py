"""Disks that are full, read-only or not what they seem: what is said, and what stays whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disks import Disk, small_disk
from fake_engine import TRAJECTORY, make_parameters, on_ranks, save

from dpo_scale.errors import UserError
from dpo_scale.files import write_json
from dpo_scale.reference.cache import ReferenceStore
from dpo_scale.reference.fingerprint import ReferenceFingerprint
from dpo_scale.training.checkpoints import CheckpointError, digest_of, find_checkpoint, open_checkpoint
from dpo_scale.training.export import ExportError, ModelFolder, export_checkpoint
from dpo_scale.training.metrics import MetricsFile
from dpo_scale.training.status import read_status

MATRIX = {"matrix": (256, 256)}  # 786 kB a checkpoint, in two halves


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An empty disk of 2 MB."""
    with small_disk(tmp_path / "disk", kilobytes=2000) as disk:
        yield disk


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(disk: Disk) -> None:
    folder = disk.path / "checkpoints"
    save(folder, make_parameters(MATRIX, seed=1), step=1)
    save(folder, make_parameters(MATRIX, seed=2), step=2)
    errors = save(folder, make_parameters(MATRIX, seed=3), step=3)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "step-00000003: not written" in str(errors[0])
    assert isinstance(errors[0], CheckpointError)
    assert errors[0].may_pass  # a batch script tries once more
    assert "No space left on device" in str(errors[0])
    assert "Free space" in str(errors[0])
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    (found, passed_over), *_ = on_ranks(2, lambda ranks: find_checkpoint(folder, "auto", ranks))
    assert (found.step, passed_over) == (2, [])
    disk.resize(kilobytes=4000)
    assert save(folder, make_parameters(MATRIX, seed=3), step=3)[0] == folder / "step-00000003"


def test_a_read_only_disk_is_named_and_what_is_on_it_is_read(disk: Disk) -> None:
    folder = disk.path / "checkpoints"
    save(folder, make_parameters(MATRIX), step=1)
    disk.make_read_only()
    errors = save(folder, make_parameters(MATRIX), step=2)
    assert all("Read-only file system" in str(error) for error in errors)
    (found, _), *_ = on_ranks(2, lambda ranks: find_checkpoint(folder, "auto", ranks))
    assert found.step == 1


def test_an_export_that_does_not_fit_leaves_nothing_behind(disk: Disk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    checkpoint = save(tmp_path / "checkpoints", make_parameters(MATRIX), buffers={}, architecture="Unknown")[0]
    disk.fill(leave_kilobytes=100)
    with pytest.raises(ExportError, match=r"model: model not written\n.*No space left on device"):
        export_checkpoint(checkpoint, disk.path / "model", ModelFolder(source, digest_of(TRAJECTORY)))
    assert {path.name for path in disk.path.iterdir()} == {".model.lock", "filler"}
    open_checkpoint(checkpoint)


def test_a_mount_point_is_refused_before_anything_is_written_to_it(disk: Disk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    checkpoint = save(tmp_path / "checkpoints", make_parameters(MATRIX), buffers={}, architecture="Unknown")[0]
    with pytest.raises(ExportError, match="disk: a file system is mounted there and cannot be replaced"):
        export_checkpoint(checkpoint, disk.path, ModelFolder(source, digest_of(TRAJECTORY)))
    assert not list(tmp_path.glob(".*"))


def test_metrics_that_do_not_fit_name_their_file_and_keep_what_was_there(disk: Disk) -> None:
    path = disk.path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 0.5})
    disk.fill()
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        file.write({"step": 2, "note": "x" * 20_000})  # type: ignore[dict-item]
    (disk.path / "filler").unlink()
    MetricsFile(path)  # drops the line that was torn
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def fingerprint() -> ReferenceFingerprint:
    return ReferenceFingerprint(scoring_version=1, dtype="float32", weights={"model.safetensors": "0" * 64}, config={})


def test_reference_rows_that_do_not_fit_name_their_store_and_keep_its_parts(disk: Disk) -> None:
    store = ReferenceStore.open(disk.path, fingerprint())
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    store.append(keys[:1], [np.zeros(10, np.float32)])
    with pytest.raises(OSError, match=r"No space left on device: '.*part-.*\.safetensors'"):
        store.append(keys[1:], [np.zeros(1_000_000, np.float32)])
    again = ReferenceStore.open(disk.path, fingerprint())
    assert again.contains(keys).tolist() == [True, False]
    assert not list(disk.path.rglob(".*.tmp"))


def test_a_store_that_cannot_be_written_says_what_to_set(disk: Disk) -> None:
    disk.make_read_only()
    with pytest.raises(UserError, match=r"Read-only file system; set reference\.cache_dir"):
        ReferenceStore.open(disk.path, fingerprint()).ensure_writable()


def test_json_that_does_not_fit_leaves_the_old_file(disk: Disk) -> None:
    write_json(disk.path / "report.json", {"old": True})
    with pytest.raises(OSError, match=r"No space left on device: '.*report\.json'"):
        write_json(disk.path / "report.json", {"new": "x" * 3_000_000})
    assert json.loads((disk.path / "report.json").read_text()) == {"old": True}
    assert [path.name for path in disk.path.iterdir()] == ["report.json"]


LAST_WORDS = """
import sys
from dpo_scale import launched

def stage(recipe, console, watch):
    {body}

launched._stage = lambda name: stage
launched._console_of_run = lambda recipe, name, is_main: launched.Console(is_main=is_main)
launched.run_stage("train")
"""


@pytest.fixture
def run_rank(tmp_path: Path) -> Callable[[str], tuple[int, str, str]]:
    """Runs a stage as one rank whose log is on a full disk; exit code, console, and what the launcher repeats."""
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "batch": {"global_pairs": 1},
        "loss": {"beta": 1.0},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    recipe.write_text(json.dumps(sections))

    def run(body: str) -> tuple[int, str, str]:
        error_file = tmp_path / "attempt" / "0" / "error.json"
        error_file.parent.mkdir(parents=True)
        with open("/dev/full", "w") as full_disk:
            done = subprocess.run(
                [sys.executable, "-c", LAST_WORDS.format(body=body), str(recipe)],
                env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(error_file), "RANK": "0"},
                stdout=subprocess.PIPE,
                stderr=full_disk,
                text=True,
                timeout=60,
                check=False,
            )
        return done.returncode, done.stdout, json.loads(error_file.read_text())["message"]

    return run


def test_the_last_words_are_heard_though_the_log_is_full(run_rank: Callable[[str], tuple[int, str, str]]) -> None:
    code, said, repeated = run_rank("raise RuntimeError('this forward fails')")
    assert code == 1
    assert said == repeated + "\n"
    assert said.startswith("rank 0 failed:\nTraceback")
    assert said.endswith("RuntimeError: this forward fails\n\n")


def test_a_full_disk_is_told_without_a_traceback(
    run_rank: Callable[[str], tuple[int, str, str]], tmp_path: Path
) -> None:
    code, said, repeated = run_rank("raise OSError(28, 'No space left on device', 'run/metrics.jsonl')")
    assert code == 2
    assert said == repeated + "\n" == "error: rank 0: run/metrics.jsonl: No space left on device\n"
    found = read_status(tmp_path / "run", "train")
    assert found is not None
    assert found.reason == "rank 0: run/metrics.jsonl: No space left on device"


def test_a_stop_is_told_to_the_launcher_as_what_it_is(run_rank: Callable[[str], tuple[int, str, str]]) -> None:
    code, said, repeated = run_rank("return 85")
    assert (code, said) == (85, "")
    assert repeated == "stopped as it was asked to, which is no fault; the same command goes on"
