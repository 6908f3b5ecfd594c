"""Files that are whole or absent, and digests that are read once.

A crash, a kill or a full disk at any moment leaves the old file or the new one, plus at most a
hidden temporary file that readers never look at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dpo_scale.errors import UserError

_READ_BYTES = 4 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
MAY_PASS = (*FULL, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What the same write may not meet a while later: a disk is full, or a file server is away."""


def named(error: OSError) -> str:
    """What is wrong with which file; of a copy or a renaming with both: a full disk is the second one's."""
    return (
        f"{' -> '.join(str(name) for name in (error.filename, error.filename2) if name is not None)}: {error.strerror}"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that names none: a disk that is full does not say so of a file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write bytes, or text in UTF-8, whole or not at all."""
    write_parts(path, [content.encode() if isinstance(content, str) else content])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Write bytes that come in parts, whole or not at all.

    Parent folders are made. Safe with several writers of one path: the last rename wins.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.writelines(parts)
            _fsync(temporary)  # else a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_whole(path, _json(value))


def write_json_over(path: Path, value: Any) -> None:
    """Write a value as JSON into the blocks that a file has already: on a full disk there is no room for a second one.

    Not safe in a power cut. Raises OSError where there is no such file, or it is too short.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        there, content = os.fstat(descriptor), _json(value).encode()
        if len(content) > max(there.st_size, 512 * there.st_blocks):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with naming(path):
            os.pwrite(descriptor, content.ljust(there.st_size), 0)  # blanks end it: in one write, as no truncation is
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_folder(folder.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    try:
        _fsync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems
            raise


def leftovers(folder: Path, older_than_s: float) -> list[Path]:
    """Temporary files of dead writers: those last written more than `older_than_s` seconds ago."""
    before = time.time() - older_than_s
    found = []
    for path in sorted(folder.glob(".*.tmp")):
        try:
            if path.stat().st_mtime < before:
                found.append(path)
        except FileNotFoundError:  # its writer has just put it in place
            continue
    return found


def sha256_of_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; `progress` is told of further bytes that were read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def remembered_sha256(path: Path, memory_dir: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read only if the file is new or changed since it was last asked for.

    A weight file that the Hugging Face hub client stored under its SHA-256 is not read at all.
    """
    return _digest_in_name(path) or _memory_in(memory_dir).sha256(path, progress)


def known_sha256(path: Path, memory_dir: Path) -> str | None:
    """As `remembered_sha256`, but a file that it would have to read is None."""
    return _digest_in_name(path) or _memory_in(memory_dir).recall(_file_state(path))


class DigestMemory:
    """SHA-256 of files by (path, size, modification and change time), in an append-only text file.

    Several processes may share it: lines are appended in one write, and a torn or lost line costs
    one more read of a file, never a wrong digest. Where it cannot be written it remembers for the
    life of this object.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._read_up_to = 0
        self._digests: dict[str, str] = {}

    def sha256(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """The file's SHA-256 in hex. Raises UserError if the file changes while it is read."""
        state = _file_state(path)
        if self.recall(state) is None:
            digest = sha256_of_file(path, progress)
            if _file_state(path) != state:
                raise UserError(f"{path}: changed while it was read; wait until it is complete")
            if not _is_settled(path.stat().st_ctime_ns):
                return digest
            self._remember(state, digest)
        return self._digests[state]

    def recall(self, state: str) -> str | None:
        """What is remembered of a file in this state."""
        if state not in self._digests:
            self._read_new_lines()
        return self._digests.get(state)

    def _remember(self, state: str, digest: str) -> None:
        self._digests[state] = digest
        line = json.dumps({"file": state, "sha256": digest}) + "\n"
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, b"\n" + line.encode())  # the first newline ends a torn line
            finally:
                os.close(descriptor)
        except OSError:  # read-only, full, no folder: it costs one more read of the file, no more
            return

    def _read_new_lines(self) -> None:
        try:
            with open(self._memory, "rb") as file:
                file.seek(self._read_up_to)
                text = file.read()
        except OSError:
            return
        whole, newline, _ = text.rpartition(b"\n")
        self._read_up_to += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                entry = json.loads(line)
                file_state, digest = entry["file"], entry["sha256"]
            except (ValueError, TypeError, KeyError):  # torn by a kill or by a second machine
                continue
            if re.fullmatch(r"[0-9a-f]{64}", digest):
                self._digests[file_state] = digest


@cache
def _memory_in(folder: Path) -> DigestMemory:
    """One in this process: a memory of thousands of files is read once, not once for each of them."""
    return DigestMemory(folder / "sha256.jsonl")


def _file_state(path: Path) -> str:
    """What changes whenever the contents do; the change time even if the other one is restored."""
    status = path.stat()
    real = path.resolve() if os.path.islink(path) else _real_folder(path.absolute().parent) / path.name
    return f"{real} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


@cache
def _real_folder(folder: Path) -> Path:
    """Resolved once: that takes a look at every folder above, for each of thousands of files."""
    return folder.resolve()


def _is_settled(changed_ns: int) -> bool:
    """Whether a later change is certain to get another time stamp: they have a granularity."""
    whole_seconds = changed_ns % 1_000_000_000 == 0  # else the kernel's clock tick, 10 ms at most
    return time.time_ns() - changed_ns > (2_000_000_000 if whole_seconds else 50_000_000)


def _digest_in_name(path: Path) -> str | None:
    """The SHA-256 that names a hub blob: models--*/blobs/<sha256>, reached through a link.

    A blob that is younger than the link to it was written again through the link, so its name
    proves nothing.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve(strict=True)
    in_hub_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    if not (in_hub_cache and re.fullmatch(r"[0-9a-f]{64}", blob.name)):
        return None
    return blob.name if blob.stat().st_mtime_ns <= path.lstat().st_mtime_ns else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
