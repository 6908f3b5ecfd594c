from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import note_order
from fake_engine import COUNTERS, TRAJECTORY, make_parameters, on_ranks, save, snapshot_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo_scale.distributed.parameter_slices import SliceAddress, slice_bounds
from dpo_scale.files import sha256_of_file
from dpo_scale.training import checkpoints, stored_state
from dpo_scale.training.checkpoints import CheckpointError, RunState, digest_of, find_checkpoint
from dpo_scale.training.stored_state import StoredState, check_fits

SHAPES = {"embed.weight": (7, 5), "norm.weight": (3,), "head.bias": (1,), "head.weight": (4, 2)}


def find(folder: Path, resume: str = "auto", world_size: int = 2) -> Any:
    """Rank 0's answer or error; all ranks must agree."""
    answers = on_ranks(world_size, lambda ranks: find_checkpoint(folder, resume, ranks))
    assert len({str(answer) for answer in answers}) == 1
    return answers[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is stored


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
)
def test_any_number_of_ranks_reads_what_any_other_number_wrote(
    tmp_path: Path, shapes: list[list[int]], writers: int, readers: int
) -> None:
    parameters = make_parameters({f"p{i}": tuple(shape) for i, shape in enumerate(shapes)})
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    path = save(folder, parameters, world_size=writers)[0]
    with StoredState(checkpoints.open_checkpoint(path)) as stored:
        for name, tensors in parameters.items():
            shape = tuple(tensors[0].shape)
            assert torch.equal(stored.read_parameter(name), tensors[0])
            for rank in range(readers):
                address = SliceAddress.of_rank(name, shape, rank, readers)
                actual = stored.read(address)
                for got, whole in zip((actual.master, actual.exp_avg, actual.exp_avg_sq), tensors, strict=True):
                    assert torch.equal(got, whole.flatten()[address.start : address.stop])


def test_the_files_of_many_ranks_are_not_all_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 1,024 files open, and there are checkpoints of more ranks."""
    monkeypatch.setattr(stored_state, "_MAX_OPEN_FILES", 2)
    parameters = make_parameters(SHAPES)
    path = save(tmp_path, parameters, world_size=5)[0]

    def num_open() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(link.exists() and link.resolve().parent == path for link in links)

    with StoredState(checkpoints.open_checkpoint(path)) as stored:
        for _ in range(2):
            for name, tensors in parameters.items():
                assert torch.equal(stored.read_parameter(name), tensors[0])
                assert num_open() <= 2
    assert num_open() == 0


@given(elements=st.integers(0, 50), world_size=st.integers(1, 9))
def test_slices_are_those_of_the_padded_parameter(elements: int, world_size: int) -> None:
    size = -(-elements // world_size)
    padded = torch.full((size * world_size,), -1)
    padded[:elements] = torch.arange(elements)
    for rank, row in enumerate(padded.view(world_size, size)):
        start, stop = slice_bounds(elements, rank, world_size)
        assert list(range(start, stop)) == row[row >= 0].tolist()


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    parameters = make_parameters(SHAPES)
    path = save(tmp_path, parameters, world_size=2)[0]
    halves = [load_file(path / f"rank-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    for name, tensors in parameters.items():
        for moment, expected in zip(("master", "exp_avg", "exp_avg_sq"), tensors, strict=True):
            actual = torch.cat([half[f"{name}.{moment}"] for half in halves])
            assert torch.equal(actual, expected.flatten())
    buffers = load_file(path / "buffers.safetensors")
    assert buffers["flag"].tolist() == [True, False, True]
    assert buffers["scale"].item() == 2.5


def test_counters_and_run_state_come_back(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES), step=100)
    found, passed_over = find(tmp_path)
    assert passed_over == []
    assert found.path == tmp_path / "step-00000100"
    assert found.commit.run == RunState(step=100, pairs=800, tracker_run_ids={"wandb": "x1"})
    assert found.commit.counters == COUNTERS
    assert found.commit.parameters == SHAPES
    assert found.commit.trajectory == TRAJECTORY
    with StoredState(found) as stored:
        assert stored.buffers()["scale"].item() == 2.5


def test_random_state_comes_back_to_as_many_ranks_only(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save(tmp_path, make_parameters(SHAPES), world_size=1)
    expected = torch.rand(3)

    def drawn(world_size: int) -> torch.Tensor:
        torch.manual_seed(8)
        (found, _), *_ = on_ranks(1, lambda ranks: find_checkpoint(tmp_path, "auto", ranks))
        with StoredState(found) as stored:
            on_ranks(world_size, stored.restore_random_state)
        return torch.rand(3)

    assert torch.equal(drawn(1), expected)
    torch.manual_seed(8)
    torch.manual_seed(8)
    untouched = torch.rand(3)
    assert torch.equal(drawn(2), untouched)


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES))
    found, _ = find(tmp_path)
    check_fits(found, SHAPES)
    with pytest.raises(CheckpointError, match=r"1 parameters differ; norm.weight: \(3,\) stored, \(4,\)"):
        check_fits(found, SHAPES | {"norm.weight": (4,)})
    with pytest.raises(CheckpointError, match=r"extra: absent stored, \(2,\) in the model"):
        check_fits(found, SHAPES | {"extra": (2,)})


# --- damage


def damaged(tmp_path: Path) -> Path:
    """Steps 1 and 2; the second is to be damaged."""
    save(tmp_path, make_parameters(SHAPES, seed=1), step=1)
    save(tmp_path, make_parameters(SHAPES, seed=2), step=2)
    return tmp_path / "step-00000002"


def flip_a_byte(path: Path) -> None:
    with (path / "rank-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def cut_a_file(path: Path) -> None:
    os.truncate(path / "rank-00001-of-00002.safetensors", 1000)


def lose_a_rank(path: Path) -> None:
    (path / "rank-00001-of-00002.safetensors").unlink()


def lose_the_record(path: Path) -> None:
    (path / "commit.json").unlink()


def cut_the_record(path: Path) -> None:
    os.truncate(path / "commit.json", 200)


def change_the_format(path: Path) -> None:
    record = json.loads((path / "commit.json").read_text())
    (path / "commit.json").write_text(json.dumps(record | {"format": 99}))


def rewrite_the_record(path: Path, change: Callable[[dict[str, Any]], None], *, of_an_earlier_version: bool) -> None:
    record = json.loads((path / "commit.json").read_text())
    change(record)
    if of_an_earlier_version:
        del record["sha256"]
    (path / "commit.json").write_text(json.dumps(record))


def flip_a_bit_of_the_record(path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["counters"]["optimizer_steps"] ^= 1

    rewrite_the_record(path, change, of_an_earlier_version=False)


def quote_the_steps(path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["step"] = record["run"]["step"] = "2"

    rewrite_the_record(path, change, of_an_earlier_version=True)


def let_the_steps_differ(path: Path) -> None:
    rewrite_the_record(path, lambda record: record.update(step=3), of_an_earlier_version=True)


def let_the_name_differ(path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["step"] = record["run"]["step"] = 3

    rewrite_the_record(path, change, of_an_earlier_version=True)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, r"rank-00001-of-00002.safetensors: its contents changed"),
        (cut_a_file, r"rank-00001-of-00002.safetensors: 1000 bytes, and the commit says \d+"),
        (lose_a_rank, r"rank-00001-of-00002.safetensors: No such file or directory$"),
        (lose_the_record, r"writing it was not finished"),
        (cut_the_record, r"commit.json: not a commit record"),
        (flip_a_bit_of_the_record, r"commit.json: not a commit record \(.*it changed after the commit"),
        (quote_the_steps, r"commit.json: not a commit record \(.*its step is '2'"),
        (let_the_steps_differ, r"commit.json: not a commit record \(.*its step is 3"),
        (let_the_name_differ, r"step-00000002: it holds step 3"),
        (change_the_format, r"format 99, and this version reads 2"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, damage: Any, reason: str) -> None:
    path = damaged(tmp_path)
    damage(path)
    found, passed_over = find(tmp_path)
    assert found.step == 1
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(passed_over[0])
    error = find(tmp_path, resume=str(path))
    assert isinstance(error, CheckpointError)
    assert "step-00000002" in str(error)


@pytest.mark.parametrize("name", ["rank-00000-of-00003", "rank-00001-of-00003", "rank-00002-of-00003", "buffers"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_a_changed_byte_of_any_file_is_seen_by_any_number_of_ranks(tmp_path: Path, name: str, world_size: int) -> None:
    path = save(tmp_path, make_parameters(SHAPES), world_size=3)[0]
    assert find(tmp_path, world_size=world_size)[0].path == path
    with (path / f"{name}.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    found, passed_over = find(tmp_path, world_size=world_size)
    assert found is None
    assert passed_over == [f"{path}: {name}.safetensors: its contents changed after the commit (checksum)"]


def test_a_file_that_the_disk_does_not_give_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(tmp_path)

    def fail_in_the_second(file: Path) -> str:
        if file == path / "rank-00001-of-00002.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of_file(file)

    monkeypatch.setattr(checkpoints, "sha256_of_file", fail_in_the_second)
    found, passed_over = find(tmp_path)
    assert found.step == 1
    assert passed_over == [f"{path}: rank-00001-of-00002.safetensors: Input/output error"]


def test_the_order_of_its_settings_is_no_part_of_a_trajectory() -> None:
    assert digest_of({"a": 1, "b": {"c": 2, "d": 3}}) == digest_of({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_record_of_an_earlier_version_without_a_checksum_is_one(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    rewrite_the_record(path, lambda record: None, of_an_earlier_version=True)
    assert find(tmp_path)[0].step == 2


def test_what_an_earlier_version_noted_and_nothing_reads_is_no_matter(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    expected = find(tmp_path)[0].commit

    def change(record: dict[str, Any]) -> None:
        record["tied"] = {"lm_head.weight": "model.embed_tokens.weight"}
        record["run"] |= {"epoch": 1, "seconds_trained": 12.5}
        record["sha256"] = digest_of({key: value for key, value in record.items() if key != "sha256"})

    rewrite_the_record(path, change, of_an_earlier_version=False)
    assert find(tmp_path)[0].commit == expected


def test_a_checkpoint_may_have_another_name_where_it_is_named(tmp_path: Path) -> None:
    path = damaged(tmp_path).rename(tmp_path / "best")
    assert find(tmp_path, resume=str(path))[0].step == 2


def test_older_damage_is_not_worth_a_word(tmp_path: Path) -> None:
    damaged(tmp_path)
    flip_a_byte(tmp_path / "step-00000001")
    cut_a_file(tmp_path / "step-00000001")
    found, passed_over = find(tmp_path)
    assert (found.step, passed_over) == (2, [])


def test_latest_that_points_nowhere_is_harmless(tmp_path: Path) -> None:
    damaged(tmp_path)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    (tmp_path / "latest").write_text("step-00000077\n")
    assert find(tmp_path)[0].step == 2


def test_resume_never_and_an_empty_folder_find_nothing(tmp_path: Path) -> None:
    assert find(tmp_path / "absent") == (None, [])
    damaged(tmp_path)
    assert find(tmp_path, resume="never") == (None, [])


def test_resume_from_a_path_takes_that_one(tmp_path: Path) -> None:
    damaged(tmp_path)
    assert find(tmp_path, resume=str(tmp_path / "step-00000001"))[0].step == 1
    error = find(tmp_path, resume=str(tmp_path / "step-00000009"))
    assert isinstance(error, CheckpointError)
    assert "no such checkpoint" in str(error)


# --- failures while writing


def test_a_rank_that_fails_stops_all_with_one_message_and_harms_nothing(tmp_path: Path) -> None:
    parameters = make_parameters(SHAPES)
    save(tmp_path, parameters, step=1)

    def attempt(ranks: Any) -> None:
        snapshot = snapshot_of(parameters, ranks.rank, 3)
        if ranks.rank == 1:
            healthy = snapshot.read_slices

            def read_slices() -> Any:
                yield next(healthy())
                raise OSError(28, "No space left on device")

            snapshot = replace(snapshot, read_slices=read_slices)
        checkpoints.save(tmp_path, snapshot, RunState(step=2), ranks, trajectory={}, source_model="")

    start = time.monotonic()
    errors = on_ranks(3, attempt)
    assert time.monotonic() - start < 10
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "step-00000002: not written" in str(errors[0])
    assert "rank 1: [Errno 28] No space left on device" in str(errors[0])
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert find(tmp_path)[0].step == 1


def test_a_write_that_the_system_refuses_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES), step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        errors = save(tmp_path, make_parameters({"big": (300, 300)}), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all("File too large" in str(error) for error in errors)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert find(tmp_path)[0].step == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    errors = save(tmp_path / "checkpoints", make_parameters(SHAPES))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "rank 0" in str(errors[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES), step=1)
    tmp_path.chmod(0o555)
    try:
        errors = save(tmp_path, make_parameters(SHAPES), step=2)
        assert all("Permission denied" in str(error) for error in errors)
        assert find(tmp_path)[0].step == 1
    finally:
        tmp_path.chmod(0o755)


def test_files_that_the_main_rank_cannot_see_are_not_committed(tmp_path: Path) -> None:
    def attempt(ranks: Any) -> None:
        calls = iter(range(9))

        def lose_the_file() -> None:
            if ranks.rank == 1 and next(calls) == 1:
                (tmp_path / ".step-00000001.partial/rank-00001-of-00002.safetensors").unlink()

        ranks.before_gather = lose_the_file
        checkpoints.save(
            tmp_path,
            snapshot_of(make_parameters(SHAPES), ranks.rank, 2),
            RunState(step=1),
            ranks,
            trajectory={},
            source_model="",
        )

    errors = on_ranks(2, attempt)
    assert all("a file system that all nodes share" in str(error) for error in errors)
    assert find(tmp_path) == (None, [])


class Killed(BaseException):
    """The process dies here."""


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_parameters(SHAPES, seed=1), make_parameters(SHAPES, seed=2)
    steps_found = []
    for new_step in (2, 1):  # a further step, and the same step again
        for moment in range(100):
            folder = tmp_path / f"{new_step}_{moment}"
            save(folder, old, step=1, world_size=1)
            died = _save_and_die(monkeypatch, folder, new, new_step, moment)
            found, _ = find(folder, world_size=1)
            with StoredState(found) as stored:
                actual = stored.read_parameter("embed.weight")
            expected = (old, new)[int(torch.equal(actual, new["embed.weight"][0]))]
            assert torch.equal(actual, expected["embed.weight"][0])
            steps_found.append(found.step)
            save(folder, new, step=new_step, world_size=1, keep_last=1)
            assert names(folder) == ["latest", f"step-{new_step:08d}"]
            if not died:
                break
        assert not died
    assert set(steps_found) == {1, 2}


def test_what_a_checkpoint_holds_reaches_the_disk_before_its_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = note_order(monkeypatch)
    save(tmp_path, make_parameters(SHAPES), step=7, world_size=1)
    partial, folder = "sync .step-00000007.partial/", f"sync {tmp_path.name}/"

    def small(name: str) -> list[str]:
        return [f"sync .{name}", f"name {name}"]

    rank = "rank-00000-of-00001"
    assert events == [
        folder,
        f"sync {rank}.safetensors",
        "sync buffers.safetensors",
        *small("commit.json"),
        partial,
        "name step-00000007",
        folder,
        *small("latest"),
        folder,
    ]


def _save_and_die(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    parameters: Any,
    step: int,
    moment: int,
) -> bool:
    """Save, and die before the file operation number `moment`; False if there are fewer."""
    left = iter(range(moment, -1, -1))

    def mortal(operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, 0) == 0:
                raise Killed
            return operation(*args, **kwargs)

        return call

    died = False
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(shutil, "rmtree", mortal(shutil.rmtree))

        def attempt(ranks: Any) -> None:
            nonlocal died
            try:
                checkpoints.save(
                    folder,
                    snapshot_of(parameters, 0, 1),
                    RunState(step=step),
                    ranks,
                    trajectory={},
                    source_model="",
                    keep_last=1,
                )
            except Killed:
                died = True

        on_ranks(1, attempt)
    return died


def test_a_commit_that_only_lacked_its_name_is_used(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    path.rename(tmp_path / ".step-00000002.partial")
    found, passed_over = find(tmp_path)
    assert (found.step, found.path, passed_over) == (2, path, [])
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_half_written_checkpoint_is_passed_over_and_swept_up_later(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    path.rename(tmp_path / ".step-00000002.partial")
    (tmp_path / ".step-00000002.partial" / "commit.json").unlink()
    found, passed_over = find(tmp_path)
    assert found.step == 1
    assert "writing it was not finished" in passed_over[0]
    save(tmp_path, make_parameters(SHAPES), step=3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


# --- retention


def test_only_the_newest_and_the_multiples_are_kept(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, make_parameters(SHAPES), step=step, keep_last=2, keep_every=30)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (30, 60, 70))]
    assert (tmp_path / "latest").read_text() == "step-00000070\n"


def test_a_commit_opens_no_more_checkpoints_the_more_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    look = checkpoints.open_checkpoint
    for step in range(10, 80, 10):
        save(tmp_path, make_parameters(SHAPES), step=step, keep_last=2, keep_every=10)
    monkeypatch.setattr(checkpoints, "open_checkpoint", lambda path: opened.append(path.name) or look(path))
    save(tmp_path, make_parameters(SHAPES), step=85, keep_last=2, keep_every=20)
    assert sorted(opened) == ["step-00000070", "step-00000085"]
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (20, 40, 60, 70, 85))]


def test_a_later_commit_that_only_lacked_its_name_stays_when_the_run_was_sent_back(tmp_path: Path) -> None:
    damaged(tmp_path).rename(tmp_path / ".step-00000002.partial")
    save(tmp_path, make_parameters(SHAPES), step=1)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_the_checkpoint_just_written_is_never_the_one_removed(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES), step=50)
    save(tmp_path, make_parameters(SHAPES), step=20, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000020", "step-00000050"]


def test_a_checkpoint_that_cannot_be_removed_is_told_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, make_parameters(SHAPES), step=step)
    replace_path, remove_tree = os.replace, shutil.rmtree

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name == "step-00000002":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace_path(source, target)

    def keep_the_removed(path: Any, *, ignore_errors: bool = False) -> None:
        if not Path(path).name.startswith(".step-00000001.removed"):
            remove_tree(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(shutil, "rmtree", keep_the_removed)
        answers = save(tmp_path, make_parameters(SHAPES), step=4, keep_last=1, world_size=3)
    assert answers == [tmp_path / "step-00000004"] * 3
    (hidden,) = tmp_path.glob(".step-00000001.removed-*")
    assert names(tmp_path) == [hidden.name, "latest", "step-00000002", "step-00000004"]
    assert [record.message for record in caplog.records] == [
        f"Could not remove {tmp_path / 'step-00000002'}: Permission denied; keeping it",
        f"Could not remove all of {hidden}, which nothing needs; remove it by hand",
    ]
    save(tmp_path, make_parameters(SHAPES), step=5, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_leftovers_of_an_older_removal_are_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, make_parameters(SHAPES), step=1)
    (tmp_path / ".step-00000001.removed").mkdir()
    (tmp_path / ".step-00000001.removed" / "busy").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    assert save(tmp_path, make_parameters(SHAPES), step=2, keep_last=1)[0] == tmp_path / "step-00000002"
    assert not (tmp_path / "step-00000001").exists()


def test_checkpoints_that_cannot_be_listed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(Path, "iterdir", fail)
    assert checkpoints._prune(tmp_path, 3, 1, None) == [
        f"Could not look for superseded checkpoints: {tmp_path}: Input/output error"
    ]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    cut_a_file(path)
    save(tmp_path, make_parameters(SHAPES), step=3, keep_last=2)
    assert "step-00000001" in names(tmp_path)


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, make_parameters(SHAPES, seed=1), step=1)
    newer = make_parameters(SHAPES, seed=2)
    save(tmp_path, newer, step=1)
    found, _ = find(tmp_path)
    with StoredState(found) as stored:
        assert torch.equal(stored.read_parameter("norm.weight"), newer["norm.weight"][0])
