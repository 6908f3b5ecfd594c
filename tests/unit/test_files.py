"""Files are whole or absent; digests are remembered only as long as they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disks import note_order

from dpo_scale import files
from dpo_scale.errors import UserError
from dpo_scale.files import (
    DigestMemory,
    fsync_folder,
    leftovers,
    remembered_sha256,
    sha256_of_file,
    write_json,
    write_json_over,
    write_parts,
    write_whole,
)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _settle() -> None:
    """Wait until a file that was just written is older than its time stamp's granularity."""
    time.sleep(0.06)


def _forget() -> None:
    """Open memories anew, as a new process would."""
    files._memory_in.cache_clear()


@pytest.fixture
def read_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read for a digest."""
    paths: list[Path] = []

    def recording(path: Path, progress: object = None) -> str:
        paths.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(files, "sha256_of_file", recording)
    return paths


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_text("old")

    def fail_halfway() -> Iterator[bytes]:
        yield b"ne"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_parts(path, fail_halfway())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["value"]


def test_a_file_is_written_over_only_in_the_room_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"reason": "x" * 50})
    inode, size = path.stat().st_ino, path.stat().st_size
    for reason in ("", "y" * 60):
        if size + 10 <= 512 * path.stat().st_blocks or not reason:
            write_json_over(path, {"reason": reason})
            assert json.loads(path.read_text()) == {"reason": reason}
    assert path.stat().st_ino == inode
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_json_over(path, {"reason": "z" * 10**6})
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        write_json_over(tmp_path / "other.json", {})
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file_and_a_leftover_that_is_found(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dpo_scale.files import write_parts\n"
        "def die_halfway():\n    yield b'ne' * 10**6; os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_parts(Path(sys.argv[1]), die_halfway())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [p.read_text()[:2] for p in leftovers(tmp_path, older_than_s=-1)] == ["ne"]
    assert leftovers(tmp_path, older_than_s=60) == []


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = note_order(monkeypatch)
    write_whole(tmp_path / "value", b"")
    assert events == ["sync .value", "name value", f"sync {tmp_path.name}/"]


def test_missing_parents_are_made_and_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "fsync_folder", synced.append)
    write_json(tmp_path / "a" / "b" / "value.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b" / "value.json").read_text()) == {"x": 1}
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_a_folder_whose_names_do_not_reach_the_disk_is_an_error_but_where_none_ever_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    fsync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_folder(tmp_path)


def test_new_files_have_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "value.json", [])
    finally:
        os.umask(before)
    assert (tmp_path / "value.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
def test_digest_is_the_sha256_of_all_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of_file(tmp_path / "file") == _sha256(content[:size])


def test_a_file_is_read_once_for_all_processes(tmp_path: Path, read_paths: list[Path]) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    _settle()
    for _ in range(3):
        _forget()
        assert remembered_sha256(weights, tmp_path / "memory") == _sha256(b"weights")
    assert read_paths == [weights]


def test_a_memory_of_many_files_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_text(path.name)
    _settle()
    for path in paths:
        remembered_sha256(path, tmp_path / "memory")
    _forget()
    lines: list[bytes] = []
    monkeypatch.setattr(files, "json", SimpleNamespace(loads=lambda line: lines.append(line) or json.loads(line)))
    for path in paths:
        assert remembered_sha256(path, tmp_path / "memory") == _sha256(path.name.encode())
    assert sum(map(bool, lines)) == len(paths)


def test_one_process_profits_from_what_another_remembered_meanwhile(tmp_path: Path, read_paths: list[Path]) -> None:
    first, second = (DigestMemory(tmp_path / "memory.jsonl") for _ in range(2))
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    _settle()
    first.sha256(tmp_path / "a")
    second.sha256(tmp_path / "a")
    first.sha256(tmp_path / "b")
    assert second.sha256(tmp_path / "b") == _sha256(b"b")
    assert read_paths == [tmp_path / "a", tmp_path / "b"]


def test_a_file_is_remembered_by_its_real_path_and_the_folders_above_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "real" / "folder"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    names = [f"part-{n}" for n in range(20)]
    for name in names:
        (folder / name).write_text(name)
    (folder / "linked").symlink_to(folder / "part-7")
    looked_at, lstat = [], os.lstat

    def noting(path: Any, **options: Any) -> os.stat_result:
        looked_at.append(os.fspath(path))
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", noting)
    states = [files._file_state(tmp_path / "link" / name) for name in names]
    assert looked_at.count(str(tmp_path)) <= 2  # on the way to the link, and to what it leads to
    assert [state.split(" ")[0] for state in states] == [str(folder / name) for name in names]
    assert files._file_state(folder / "linked") == states[7]


def _overwrite(path: Path) -> None:
    path.write_bytes(b"WEIGHTS")


def _overwrite_and_restore_the_modification_time(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _move_another_file_here(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    other.replace(path)


@pytest.mark.parametrize("change", [_overwrite, _overwrite_and_restore_the_modification_time, _move_another_file_here])
def test_other_contents_of_the_same_size_are_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    _settle()
    assert remembered_sha256(weights, tmp_path / "memory") == _sha256(b"weights")
    change(weights)
    assert remembered_sha256(weights, tmp_path / "memory") == _sha256(b"WEIGHTS")


@pytest.mark.parametrize(
    ("changed_ns", "age_ns", "expected_reads"),
    [
        (5_000_000_001, 49_000_000, 2),  # another write could still get the same time stamp
        (5_000_000_001, 51_000_000, 1),
        (5_000_000_000, 1_900_000_000, 2),  # the file system may count whole seconds
        (5_000_000_000, 2_100_000_000, 1),
    ],
)
def test_a_file_is_remembered_only_when_its_time_stamp_is_past(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_paths: list[Path],
    changed_ns: int,
    age_ns: int,
    expected_reads: int,
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    status = SimpleNamespace(st_size=7, st_mtime_ns=changed_ns, st_ctime_ns=changed_ns)
    monkeypatch.setattr(Path, "stat", lambda path: status)
    monkeypatch.setattr(time, "time_ns", lambda: changed_ns + age_ns)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)  # it would ask stat for more
    memory = DigestMemory(tmp_path / "memory.jsonl")
    for _ in range(2):
        assert memory.sha256(weights) == _sha256(b"weights")
    assert len(read_paths) == expected_reads


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"half")

    def read_while_written(path: Path, progress: object = None) -> str:
        digest = sha256_of_file(path)
        path.write_bytes(b"half and the rest")
        return digest

    monkeypatch.setattr(files, "sha256_of_file", read_while_written)
    with pytest.raises(UserError, match="changed while it was read"):
        remembered_sha256(weights, tmp_path / "memory")


def test_torn_and_foreign_lines_of_the_memory_are_passed_over(tmp_path: Path, read_paths: list[Path]) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    _settle()
    remembered_sha256(tmp_path / "a", tmp_path)
    memory = tmp_path / "sha256.jsonl"
    memory.write_bytes(memory.read_bytes() + b'17\n[]\n\xff\n{"file": "x", "sha256": "short"}\n{"fi')
    _forget()
    remembered_sha256(tmp_path / "b", tmp_path)  # its line must not join the torn one
    _forget()
    for name in ("a", "b"):
        assert remembered_sha256(tmp_path / name, tmp_path) == _sha256(name.encode())
    assert read_paths == [tmp_path / "a", tmp_path / "b"]


def test_a_memory_that_cannot_be_written_serves_one_process(
    tmp_path: Path, read_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("a")
    _settle()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    memory = DigestMemory(tmp_path / "memory.jsonl")
    assert memory.sha256(tmp_path / "a") == memory.sha256(tmp_path / "a") == _sha256(b"a")
    assert read_paths == [tmp_path / "a"]


def _hub_file(hub: Path, content: bytes, blob_name: str) -> Path:
    """A model file as the hub client lays it out: a blob, and a link to it in a snapshot."""
    blob = hub / "models--org--name" / "blobs" / blob_name
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    link = hub / "models--org--name" / "snapshots" / "0123abcd" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def test_a_hub_blob_is_known_by_its_name_without_being_read(tmp_path: Path, read_paths: list[Path]) -> None:
    link = _hub_file(tmp_path, b"weights", _sha256(b"weights"))
    assert remembered_sha256(link, tmp_path / "memory") == _sha256(b"weights")
    assert read_paths == []


def test_a_digest_is_known_without_reading_a_file_or_not_at_all(tmp_path: Path, read_paths: list[Path]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    _settle()
    assert files.known_sha256(path, tmp_path / "memory") is None
    assert read_paths == []
    files.remembered_sha256(path, tmp_path / "memory")
    assert files.known_sha256(path, tmp_path / "memory") == _sha256(b"weights")
    blob = _hub_file(tmp_path / "hub", b"blob", _sha256(b"blob"))
    assert files.known_sha256(blob, tmp_path / "memory") == _sha256(b"blob")
    assert read_paths == [path]


def test_a_hub_blob_that_was_overwritten_through_its_link_is_read(tmp_path: Path) -> None:
    link = _hub_file(tmp_path, b"weights", _sha256(b"weights"))
    _settle()
    link.write_bytes(b"WEIGHTS")
    assert remembered_sha256(link, tmp_path / "memory") == _sha256(b"WEIGHTS")


def test_a_hub_blob_that_is_named_by_a_git_hash_is_read(tmp_path: Path) -> None:
    link = _hub_file(tmp_path, b"weights", "a" * 40)
    assert remembered_sha256(link, tmp_path / "memory") == _sha256(b"weights")


def test_a_hex_name_outside_the_hub_cache_proves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "blobs" / ("a" * 64)
    target.parent.mkdir()
    target.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(target)
    expected = _sha256(b"weights")
    assert remembered_sha256(tmp_path / "model.safetensors", tmp_path / "memory") == expected
