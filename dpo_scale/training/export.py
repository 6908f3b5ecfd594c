"""A trained model as a Hugging Face folder, from a checkpoint or a live engine: the same bytes.

Weights are written tensor by tensor, so memory holds the parameter at hand and never a whole shard.
The folder appears whole: it is filled under a hidden name, by one process at a time, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch

from dpo_scale.distributed import engine_state
from dpo_scale.distributed.lockstep import OneProcess, Ranks, by_main, on_main, together
from dpo_scale.errors import UserError
from dpo_scale.files import fsync_folder, write_json
from dpo_scale.locks import HeldError, take
from dpo_scale.training import model_files
from dpo_scale.training.checkpoints import CheckpointError, open_checkpoint, verify
from dpo_scale.training.hub_names import HubNames, hub_names
from dpo_scale.training.stored_state import StoredState
from dpo_scale.training.tensor_files import FileRecord, TensorEntry, aligned, write_tensors

MAX_SHARD_BYTES = 5_000_000_000


class ExportError(UserError):
    """A model folder that cannot be written. Raised alike on every rank."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Everything in an exported folder but the weights."""

    files: Path
    """Folder of its configuration, tokenizer and code, as `model_files.keep` left it."""
    trajectory_digest: str
    """The run that the weights come from; an export of another run is never replaced."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What else to say about where the model comes from, as JSON values."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights, read on demand."""

    architecture: str
    step: int
    dtype: torch.dtype
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, torch.Tensor]
    values: Iterator[tuple[str, torch.Tensor]]
    """Each of `parameters` whole, in their order."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    folder: ModelFolder,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint's model to the folder `out`, in the precision of training or another.

    Raises CheckpointError for a checkpoint that is not whole, its checksums included, ExportError
    if `out` cannot be written.
    """
    found = open_checkpoint(checkpoint)
    damage = verify(found)
    if damage:
        raise CheckpointError(f"{checkpoint}: damaged: {'; '.join(damage)}. Export another.")
    commit = found.commit
    with StoredState(found) as stored:
        weights = Weights(
            architecture=commit.architecture,
            step=found.step,
            dtype=dtype or getattr(torch, commit.dtype),
            parameters=commit.parameters,
            buffers=stored.buffers(),
            values=((name, stored.read_parameter(name)) for name in commit.parameters),
        )
        _export(weights, folder, out, max_shard_bytes, OneProcess())


def export_engine(
    engine: Any,
    out: Path,
    folder: ModelFolder,
    ranks: Ranks,
    *,
    step: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a live engine's model to the folder `out`, a gathered parameter at a time. Collective.

    `progress` is told of further elements that were written.
    Raises ExportError on every rank if it cannot be written.
    """
    state = engine_state.snapshot(engine)
    weights = Weights(
        architecture=state.architecture,
        step=step,
        dtype=state.dtype,
        parameters=state.parameters,
        buffers=state.buffers,
        values=_watched(engine_state.gathered_parameters(engine), progress),
    )
    _export(weights, folder, out, max_shard_bytes, ranks)


def _watched(
    values: Iterator[tuple[str, torch.Tensor]], progress: Callable[[int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values:
        yield name, value
        if progress is not None:
            progress(value.numel())


def _export(weights: Weights, folder: ModelFolder, out: Path, max_shard_bytes: int, ranks: Ranks) -> None:
    """Both ways of exporting, from the point on where they are one."""
    out = out.resolve()  # what a link leads to is replaced, and not the link
    hidden = out.parent / f".{out.name}.partial"
    names = hub_names(weights.architecture, folder.files, weights.parameters)
    shards = plan_shards(_entries(weights, names), max_shard_bytes)
    with by_main(ranks, lambda: _reserve(out)) or nullcontext():
        try:
            on_main(ranks, lambda: _prepare(hidden, out, folder), ExportError)
            files = _write_shards(hidden, shards, _tensors(shards, weights, names, ranks), ranks)
            on_main(ranks, lambda: _finish(hidden, out, weights, folder, shards, files), ExportError)
        except ExportError as error:
            raise ExportError(f"{out}: model not written\n{error}") from error
        finally:  # an interrupt leaves nothing behind either
            if ranks.is_main:
                shutil.rmtree(hidden, ignore_errors=True)


# --- weights


def plan_shards(entries: Sequence[TensorEntry], max_bytes: int) -> list[list[TensorEntry]]:
    """Cut entries into shards of at most `max_bytes`; a larger tensor gets one of its own."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    return shards


def _entries(weights: Weights, names: HubNames) -> list[TensorEntry]:
    parameters = [
        TensorEntry(piece, weights.dtype, shape)
        for name in weights.parameters
        for piece, shape in names.pieces[name].items()
    ]
    buffers = [TensorEntry(name, held.dtype, tuple(held.shape)) for name, held in weights.buffers.items()]
    return aligned(parameters + buffers)


def _tensors(
    shards: Sequence[Sequence[TensorEntry]], weights: Weights, names: HubNames, ranks: Ranks
) -> Iterator[torch.Tensor]:
    """The tensors of the shards in their order; where nothing is written, stand-ins of no cost."""
    pieces = _pieces(weights, names, ranks)
    for shard in shards:
        for entry in shard:
            yield weights.buffers[entry.name] if entry.name in weights.buffers else next(pieces)
    assert next(pieces, None) is None  # asking also lets go of the last parameter


def _pieces(weights: Weights, names: HubNames, ranks: Ranks) -> Iterator[torch.Tensor]:
    for name, value in weights.values:
        if ranks.is_main:
            yield from names.split(name, value.to(weights.dtype)).values()
        else:
            yield from [value] * len(names.pieces[name])


def _write_shards(
    folder: Path,
    shards: Sequence[Sequence[TensorEntry]],
    tensors: Iterator[torch.Tensor],
    ranks: Ranks,
) -> list[FileRecord]:
    """The main rank writes; the others follow, so that all gather the same parameters."""
    files = []
    for number, entries in enumerate(shards, 1):
        path = folder / _shard_name(number, len(shards))
        shard = islice(tensors, len(entries))
        record = together(ranks, partial(_write_shard, path, entries, shard, ranks), ExportError)[0]
        assert record is not None
        files.append(record)
    assert next(tensors, None) is None
    return files


def _write_shard(
    path: Path, entries: Sequence[TensorEntry], shard: Iterator[torch.Tensor], ranks: Ranks
) -> FileRecord | None:
    try:
        return write_tensors(path, entries, shard, {"format": "pt"}) if ranks.is_main else None
    finally:
        for _ in shard:  # after a failure too: the other ranks are gathering
            pass


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


# --- the folder


def _reserve(out: Path) -> TextIO:
    """A lock for whoever writes to `out`, beside it: what is there is replaced meanwhile.

    Raises ExportError where another process writes to it, or where nothing can be renamed to it.
    """
    if os.path.ismount(out):
        raise ExportError(f"{out}: a file system is mounted there and cannot be replaced; name a folder in it")
    path = out.with_name(f".{out.name}.lock")
    try:
        return take(path)
    except HeldError as error:
        in_use = f"{out}: {error.holder} is exporting to it; wait for its end, or name another folder"
        raise ExportError(in_use + error.remedy, may_pass=error.is_elsewhere) from error
    except OSError as error:
        theirs = isinstance(error, PermissionError) and path.exists()
        remedy = "; name another folder, or remove the lock if its owner is done exporting" if theirs else ""
        raise ExportError(f"{out}: no lock can be had at {path}: {error.strerror}{remedy}") from error


def _prepare(hidden: Path, out: Path, folder: ModelFolder) -> None:
    model_files.check(folder.files)
    check_replaceable(out, folder.trajectory_digest)
    _check_removable(_replaced(out))
    if hidden.exists():
        shutil.rmtree(hidden)
    hidden.mkdir(parents=True)


def check_replaceable(out: Path, trajectory_digest: str) -> None:
    """Only nothing, an empty folder, or an earlier export of the same run may stand at `out`; else ExportError.

    That export is to be one that this user may remove.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        provenance = json.loads((out / "provenance.json").read_text("utf-8"))
        is_of_this_run = provenance.get("trajectory_digest") == trajectory_digest
    except (OSError, ValueError, AttributeError):
        is_of_this_run = False
    if not is_of_this_run:
        raise ExportError(f"{out} holds something else than an export of this run; name another folder")
    _check_removable(out)


def _check_removable(export: Path) -> None:
    if export.exists() and not os.access(export, os.W_OK):
        raise ExportError(f"{export}: another user's export, which you may not remove; name another folder")


def _replaced(out: Path) -> Path:
    """Where an earlier export is for the moment in which another takes its name."""
    return out.with_name(f".{out.name}.replaced")


def _finish(
    hidden: Path,
    out: Path,
    weights: Weights,
    folder: ModelFolder,
    shards: Sequence[Sequence[TensorEntry]],
    files: Sequence[FileRecord],
) -> None:
    """Everything that stands beside the weights, then the folder's name."""
    if len(shards) > 1:
        _write_index(hidden, shards, files)
    _write_config(hidden, weights, folder)
    model_files.copy(folder.files, hidden)
    provenance = {
        **folder.provenance,
        "trajectory_digest": folder.trajectory_digest,
        "step": weights.step,
        "weights": {file.name: file.sha256 for file in files},
    }
    write_json(hidden / "provenance.json", provenance)
    for file in files:
        if not (hidden / file.name).is_file() or (hidden / file.name).stat().st_size != file.bytes:
            raise ExportError(f"{hidden / file.name}: changed or removed by another process; export again")
    fsync_folder(hidden)
    replaced = _replaced(out)
    if replaced.exists():
        shutil.rmtree(replaced)
    if out.exists():
        os.replace(out, replaced)
    os.replace(hidden, out)
    fsync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_index(folder: Path, shards: Sequence[Sequence[TensorEntry]], files: Sequence[FileRecord]) -> None:
    total = sum(entry.bytes for shard in shards for entry in shard)
    weight_map = {entry.name: file.name for shard, file in zip(shards, files, strict=True) for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _write_config(hidden: Path, weights: Weights, folder: ModelFolder) -> None:
    config = json.loads((folder.files / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)  # the older spelling of dtype
    config.pop("transformers_weights", None)  # the name of the source's file of weights
    config["dtype"] = str(weights.dtype).removeprefix("torch.")
    config["architectures"] = [weights.architecture]
    write_json(hidden / "config.json", config)
