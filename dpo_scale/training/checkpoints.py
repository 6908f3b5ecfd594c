"""Checkpoints: commit, find, resume, retain. Files and plain data; no engine and no process group.

    checkpoints/
      step-00000100/
        rank-00000-of-00002.safetensors   one rank's fp32 slices of parameters and Adam moments
        buffers.safetensors               the model's persistent buffers
        commit.json                       written last: a folder without it is not a checkpoint
      latest                              name of the newest commit, for people and commands; resuming never reads it

Any number of ranks can read what any other number wrote, by slicing. A folder is written under a
hidden name and renamed once it is whole, so a kill at any moment costs the folder that was being
written and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_scale.distributed.lockstep import Ranks, on_main, together
from dpo_scale.distributed.parameter_slices import EngineCounters, EngineSnapshot, LossScale
from dpo_scale.errors import UserError
from dpo_scale.files import fsync_folder, make_folder, sha256_of_file, write_json, write_whole
from dpo_scale.training.rank_files import write_rank
from dpo_scale.training.retention import remove, remove_superseded
from dpo_scale.training.tensor_files import FileRecord

_LOG = logging.getLogger(__name__)
FORMAT = 2
CUT_SHORT = "writing it was not finished"
"""The reason for passing over a checkpoint that a kill cut short: harmless."""
_NO_LONGER_NOTED = ("tied", "epoch", "seconds_trained")
"""What earlier versions put into a commit record and nothing read."""
_NAME = re.compile(r"(?P<partial>\.)?(?P<name>step-(?P<step>\d{8,}))(?(partial)\.partial)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read. Raised alike on every rank."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after `step` optimizer steps; counters go on across restarts."""

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    reference_rows_cached: int = 0
    reference_rows_computed: int = 0
    skipped_steps: int = 0
    resumes: int = 0
    evaluated_step: int | None = None
    """Step of the last held-out pass that was finished."""
    unlogged: tuple[float, ...] = ()
    """Sums of the metrics over all ranks since the last logged line."""
    origin: str = ""
    """The checkpoint that run.resume named, if the run went on from one."""
    tracker_run_ids: Mapping[str, str] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    """Metric name -> its best value so far."""
    held_out: str = ""
    """Digest of the held-out pairs that `best` is of; empty where it was not noted."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit record: what a checkpoint holds and how to tell that it is whole."""

    run: RunState
    world_size: int
    trajectory: Mapping[str, Any]
    """What determines the trajectory, as JSON values: a resumed run must have the same."""
    source_model: str
    architecture: str
    dtype: str
    parameters: Mapping[str, tuple[int, ...]]
    counters: EngineCounters
    files: tuple[FileRecord, ...]

    @property
    def trajectory_digest(self) -> str:
        """Names the trajectory in what is made of it."""
        return digest_of(self.trajectory)

    def to_json(self) -> dict[str, Any]:
        record = {"format": FORMAT, "step": self.run.step, **asdict(self)}
        return {**record, "sha256": digest_of(record)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Commit:
        """Raises KeyError, TypeError or ValueError for a record of another form or that changed."""
        digested = {key: value for key, value in record.items() if key != "sha256"}
        digest = digest_of(digested)
        if record.get("sha256", digest) != digest:  # earlier versions noted none
            raise ValueError("it changed after the commit")
        step = record["step"]
        if type(step) is not int or step != record["run"]["step"]:
            raise ValueError(f"its step is {step!r}")
        fields = {key: value for key, value in digested.items() if key not in ("format", "step", *_NO_LONGER_NOTED)}
        counters = dict(fields["counters"])
        scale = counters.pop("loss_scale")
        fields["counters"] = EngineCounters(**counters, loss_scale=None if scale is None else LossScale(**scale))
        run = {key: value for key, value in fields["run"].items() if key not in _NO_LONGER_NOTED}
        fields["run"] = RunState(**{**run, "unlogged": tuple(run["unlogged"])})
        fields["parameters"] = {name: tuple(dims) for name, dims in fields["parameters"].items()}
        fields["files"] = tuple(FileRecord(**file) for file in fields["files"])
        return cls(**fields)


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values such as a trajectory, in hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    commit: Commit

    @property
    def step(self) -> int:
        return self.commit.run.step


# --- save


def save(
    folder: Path,
    snapshot: EngineSnapshot,
    run: RunState,
    ranks: Ranks,
    *,
    trajectory: Mapping[str, Any],
    source_model: str,
    keep_last: int = 2,
    keep_every: int | None = None,
    say: Callable[[str], None] = _LOG.warning,
) -> Path:
    """Commit a checkpoint of `run.step` in `folder`, then remove superseded ones. Collective.

    Returns the checkpoint's folder; the main rank says what could not be removed. Raises CheckpointError on every rank
    if any fails; what was committed before is then untouched.
    """
    target = folder / _name(run.step)
    partial = folder / f".{target.name}.partial"
    try:
        on_main(ranks, lambda: _make_empty(partial), CheckpointError)
        files = together(ranks, lambda: write_rank(partial, snapshot, ranks), CheckpointError)
        commit = Commit(
            run=run,
            world_size=ranks.world_size,
            trajectory=trajectory,
            source_model=source_model,
            architecture=snapshot.architecture,
            dtype=str(snapshot.dtype).removeprefix("torch."),
            parameters=snapshot.parameters,
            counters=snapshot.counters,
            files=tuple(record for records in files for record in records),
        )
        on_main(ranks, lambda: _commit(partial, target, commit), CheckpointError)
    except CheckpointError as error:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise CheckpointError(
            f"{target}: not written\n{error}\nEarlier checkpoints are untouched. "
            "Free space or mend the folder, then run the same command again.",
            may_pass=True,  # a disk that is full or away, for now or until somebody sees to it
        ) from error
    for trouble in on_main(ranks, lambda: _prune(folder, run.step, keep_last, keep_every), CheckpointError):
        if ranks.is_main:
            say(trouble)
    return target


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    make_folder(folder)


def _commit(partial: Path, target: Path, commit: Commit) -> None:
    """See that every rank's files are there, write the record, then give the folder its name."""
    problems = _wrong_sizes(partial, commit)
    if problems:
        raise CheckpointError(f"{problems[0]}; the run folder must be on a file system that all nodes share")
    write_json(partial / "commit.json", commit.to_json())
    _put_in_place(partial, target)


def _put_in_place(partial: Path, target: Path) -> None:
    """Name a folder that has its commit record, and move `latest`."""
    if target.exists():  # an older attempt at this step; its successor has its commit record already
        remove(target)
    os.replace(partial, target)
    fsync_folder(target.parent)
    write_whole(target.parent / "latest", f"{target.name}\n")


# --- find


def find_checkpoint(
    folder: Path, resume: Literal["auto", "never"] | str, ranks: Ranks, *, origin: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, and what was passed over and why. Collective.

    auto: the newest valid commit in `folder`, or the newest that went on from the checkpoint `origin`, a real path;
    never: none; else the path of a checkpoint. The ranks share the reading of checksums. Raises CheckpointError for a
    path that is no valid checkpoint.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        chosen = on_main(ranks, lambda: open_checkpoint(Path(resume)), CheckpointError)
        problems = _verify_together(chosen, ranks)
        if problems:
            raise CheckpointError(f"{resume}: damaged: {'; '.join(problems)}. Choose another, or run.resume=auto.")
        return chosen, []
    checkpoints, broken = on_main(ranks, lambda: _committed(folder), CheckpointError)
    passed_over = list(broken)
    for checkpoint in checkpoints:
        before = checkpoint.commit.run.origin
        if origin is not None and not (before and os.path.realpath(before) == origin):
            continue
        problems = _verify_together(checkpoint, ranks)
        if not problems:
            newer = [line for step, line in passed_over if step >= checkpoint.step]
            return checkpoint, newer
        passed_over.append((checkpoint.step, f"{checkpoint.path}: {'; '.join(problems)}"))
    return None, [line for _, line in passed_over]


def named_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, the one that `latest` names, or the newest of a run.

    Raises CheckpointError where there is none, OSError where a folder cannot be looked into.
    """
    if path.name == "latest" and path.is_file():
        return path.with_name(path.read_text(encoding="utf-8").strip())
    if (path / "commit.json").is_file():
        return path
    folders = [folder for folder in (path, path / "checkpoints") if folder.is_dir()]
    steps = [step for folder in folders for step in folder.iterdir() if step.name.startswith("step-") and step.is_dir()]
    for step in sorted(steps, reverse=True):
        if "commit.json" in os.listdir(step):
            return step
    raise CheckpointError(f"{path}: no committed checkpoint; give RUN/checkpoints/step-..., or RUN for its newest")


def open_checkpoint(path: Path) -> Checkpoint:
    """A commit whose files all have their sizes. Raises CheckpointError, naming what is wrong."""
    record_path = path / "commit.json"
    try:
        record = json.loads(record_path.read_text("utf-8"))
        written = record["format"]
        commit = Commit.from_json(record) if written == FORMAT else None
    except FileNotFoundError:
        reason = CUT_SHORT if path.is_dir() else "no such checkpoint"
        raise CheckpointError(f"{path}: no commit record: {reason}") from None
    except OSError as error:
        raise CheckpointError(f"{record_path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record_path}: not a commit record ({error!r})") from error
    if commit is None:
        raise CheckpointError(
            f"{record_path}: format {written}, and this version reads {FORMAT}; use the version that wrote it"
        )
    named = _NAME.fullmatch(path.name)
    problems = _wrong_sizes(path, commit)
    if named and int(named["step"]) != commit.run.step:
        problems.append(f"it holds step {commit.run.step}")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return Checkpoint(path, commit)


def verify(checkpoint: Checkpoint, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files' contents; reads every `shares`-th file from `share` on."""
    problems = []
    for record in checkpoint.commit.files[share::shares]:
        try:
            if sha256_of_file(checkpoint.path / record.name) != record.sha256:
                problems.append(f"{record.name}: its contents changed after the commit (checksum)")
        except OSError as error:
            problems.append(f"{record.name}: {error.strerror}")
    return problems


def _verify_together(checkpoint: Checkpoint, ranks: Ranks) -> list[str]:
    found = together(ranks, lambda: verify(checkpoint, ranks.rank, ranks.world_size), CheckpointError)
    return [problem for problems in found for problem in problems]


def _wrong_sizes(folder: Path, commit: Commit) -> list[str]:
    problems = []
    for record in commit.files:
        try:
            size = (folder / record.name).stat().st_size
        except OSError as error:
            problems.append(f"{record.name}: {error.strerror}")
            continue
        if size != record.bytes:
            problems.append(f"{record.name}: {size} bytes, and the commit says {record.bytes}")
    return problems


def _committed(folder: Path) -> tuple[list[Checkpoint], list[tuple[int, str]]]:
    """Checkpoints, newest first, and (step, why not) of what looks like one and is not."""
    checkpoints, passed_over = [], []
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if not match:
            continue
        try:
            checkpoints.append(_open_named(path, folder / match["name"]))
        except CheckpointError as error:
            passed_over.append((int(match["step"]), str(error)))
    checkpoints.sort(key=lambda checkpoint: checkpoint.step, reverse=True)
    return checkpoints, sorted(passed_over, reverse=True)


def _open_named(path: Path, target: Path) -> Checkpoint:
    """An open checkpoint, by its name: its run may have died between the commit record and the rename."""
    found = open_checkpoint(path)
    if path == target:
        return found
    _put_in_place(path, target)
    return Checkpoint(target, found.commit)


# --- retain


def _prune(folder: Path, step: int, keep_last: int, keep_every: int | None) -> list[str]:
    """Remove superseded checkpoints up to `step`; returns what stays though it should go, a line each.

    Later steps stay: they exist only if the run was sent back, by hand or by damage.
    """
    try:
        superseded = _superseded(folder, step, keep_last, keep_every)
    except OSError as error:
        return [f"Could not look for superseded checkpoints: {error.filename}: {error.strerror}"]
    return remove_superseded(folder, superseded)


def _superseded(folder: Path, step: int, keep_last: int, keep_every: int | None) -> list[Path]:
    """Checkpoints that may go. Of the others only the last are opened: that takes a look at every rank's file."""
    kept, superseded = 0, []
    named = [(int(match["step"]), path, match) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    for number, path, match in sorted(named, key=lambda found: found[0], reverse=True):
        if match["partial"] or (number <= step and kept < keep_last):
            with suppress(CheckpointError):
                _open_named(path, folder / match["name"])
                kept += number <= step
        elif number <= step and (keep_every is None or number % keep_every) and (path / "commit.json").is_file():
            superseded.append(path)
    return superseded
