"""What a run's folder tells, read as far as it can be: runs that were killed, failed or never began included."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from dpo_scale.errors import UserError
from dpo_scale.training.status import is_alive, read_status

Line = Mapping[str, Any]
Values = npt.NDArray[np.float64]

FILES_OF_A_RUN = ("metrics.jsonl", "recipe.yaml", "environment.json", "status.json")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run, up to its end or to the next start."""

    step: int
    """The step it went on from."""
    began: float
    """Seconds since 1970; NaN where unknown."""
    world_size: int | None
    host: str
    last_step: int
    """The last step that it noted and that was kept."""
    outcome: str
    """finished, stopped, or empty where nothing was noted: it was killed, failed, or still runs."""
    ended: float
    """Seconds since 1970 of its end, or else of its last logged step."""
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunRecords:
    """A run's folder, read."""

    folder: Path
    training: tuple[Line, ...]
    """Lines of log intervals."""
    held_out: tuple[Line, ...]
    """Lines of held-out passes over one set of pairs, that of `data` if any is; the first of each step."""
    other_passes: int
    """How many held-out passes were over other pairs, and are left out."""
    attempts: tuple[Attempt, ...]
    counters: Line
    """The newest line that counts pairs: of a log interval, or of an attempt's end, which may lie between two."""
    recipe: Mapping[str, Mapping[str, Any]]
    """Section -> field -> value; empty where it could not be read."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    is_alive: bool = False
    """Whether the process that wrote `status` still trains there."""
    unreadable: tuple[str, ...] = ()
    """What could not be read and why, a line each."""

    name_parts: int = 1
    """How many folders of its path its name has at least."""

    @property
    def name(self) -> str:
        """The end of the folder's path; that of its parent too where it is as common as `run`."""
        path = self.folder.resolve()
        parts = max(self.name_parts, 2 if path.name in ("run", "output", "out") else 1)
        return "/".join(path.parts[1:][-parts:])

    @property
    def held_out_pairs(self) -> str:
        """Which pairs the held-out lines are of, in words; empty where none says so."""
        noted = [line for line in self.held_out if "eval/data" in line]
        return f"{noted[-1].get('eval/pairs')} pairs ({noted[-1]['eval/data']})" if noted else ""

    def held_out_change(self, key: str) -> list[float]:
        """A metric's first and last value in the held-out passes, as far as they are numbers; of one pass its value.

        Of an accuracy the last alone where policy and reference begin equal, for then the first is rounding.
        """
        values = [value for value in column(self.held_out, f"eval/{key}").tolist() if math.isfinite(value)]
        begin_equal = self.recipe.get("reference", {}).get("path") is None
        has_first = len(values) > 1 and not (key == "rewards/accuracy" and begin_equal)
        return [*values[:1], values[-1]] if has_first else values[-1:]

    @property
    def about_other_passes(self) -> str:
        """A sentence on the held-out passes that are left out; empty where none is."""
        if not self.other_passes:
            return ""
        shown = f"; those shown are of {self.held_out_pairs}" if self.held_out_pairs else ""
        return f"Held-out passes over other pairs are left out ({self.other_passes}){shown}."

    @property
    def last_step(self) -> int:
        """Newest step that was noted; a run that was stopped notes it at its end, between two logged lines too."""
        logged = (int(line["step"]) for line in (*self.training, *self.held_out))
        return max([*logged, *(attempt.last_step for attempt in self.attempts), 0])

    @property
    def outcome(self) -> str:
        """How the run stands: finished, stopped, failed, running, or unfinished where nobody knows more."""
        if self.attempts and self.attempts[-1].outcome:
            return self.attempts[-1].outcome
        if self.is_alive:
            return "running"
        return "failed" if self.status.get("state") == "failed" else "unfinished"

    @property
    def skips(self) -> list[tuple[int, int]]:
        """(step, how many) of log intervals in which optimizer steps were skipped and tried again."""
        counts = column(self.training, "skipped_steps")
        found, before = [], 0.0
        for line, count in zip(self.training, counts, strict=True):
            if count > before:
                found.append((int(line["step"]), int(count - before)))
            before = count if math.isfinite(count) else before
        return found


def told_apart(runs: Sequence[RunRecords]) -> list[RunRecords]:
    """Runs with names that differ: the same ones get more folders of their paths, as few as it takes."""
    depth = max(len(run.folder.resolve().parts) for run in runs)
    named = list(runs)
    for parts in range(2, depth):
        counts = Counter(run.name for run in named)
        named = [replace(run, name_parts=parts) if counts[run.name] > 1 else run for run in named]
    return named


def column(lines: Sequence[Line], name: str) -> Values:
    """One key of some lines, float64 [lines]; NaN where it is missing or no number."""
    return np.array([_number(line.get(name)) for line in lines], np.float64)


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder.

    Raises UserError if it is no run's folder; anything less is told in `unreadable`.
    """
    if not any((folder / name).exists() for name in FILES_OF_A_RUN):
        raise UserError(f"{folder}: no run here; a run's folder holds {' or '.join(FILES_OF_A_RUN[:2])}")
    unreadable: list[str] = []
    lines = _metrics(folder / "metrics.jsonl", unreadable)
    recipe, environment, data = (
        _document(folder / name, unreadable) for name in ("recipe.yaml", "environment.json", "data_report.json")
    )
    passes = [line for line in lines if "eval/loss" in line]
    of_one_set = _of_one_set(passes, _sections(data).get("evaluate", {}).get("digest"))
    held_out = {line["step"]: line for line in reversed(of_one_set)}
    return RunRecords(
        folder=folder,
        training=tuple(line for line in lines if "loss" in line),
        held_out=tuple(held_out[step] for step in sorted(held_out)),
        other_passes=len(passes) - len(of_one_set),
        attempts=_attempts(lines),
        counters=next((line for line in reversed(lines) if "pairs" in line), {}),
        recipe=_sections(recipe),
        environment=environment,
        data=data,
        status=_document(folder / "status.json", unreadable, optional=True),
        is_alive=_is_alive(folder),
        unreadable=tuple(unreadable),
    )


def _is_alive(folder: Path) -> bool:
    with suppress(UserError):  # a status of another form
        status = read_status(folder, "train")
        return status is not None and status.state == "running" and is_alive(folder, "train", status)
    return False


def _of_one_set(passes: Sequence[Line], trained_beside: str | None) -> list[Line]:
    """The held-out passes over the pairs that the run was trained beside; if there is none, over those of the newest.

    Passes of earlier versions do not say of which pairs they are, and stay.
    """
    sets = [line.get("eval/data") for line in passes]
    shown = trained_beside if trained_beside in sets else sets[-1] if sets else None
    return [line for line, pairs in zip(passes, sets, strict=True) if pairs in (shown, None)]


def _metrics(path: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    """The objects that have a step; others are counted."""
    lines, bad, number = [], [], 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                line = _object(text)
                if math.isfinite(_number(line.get("step"))):
                    lines.append(line)
                else:
                    bad.append(number)
    except OSError as error:
        unreadable.append(f"{path.name}: {error.strerror}")
        return []
    if bad:
        torn = " (the last one, cut off by a kill)" if bad == [number] else ""
        unreadable.append(f"{path.name}: {len(bad)} of {len(bad) + len(lines)} lines cannot be read{torn}")
    if not lines and not bad:
        unreadable.append(f"{path.name}: empty")
    return lines


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty where it is none or cannot be read."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _attempts(lines: Sequence[Line]) -> tuple[Attempt, ...]:
    starts = [index for index, line in enumerate(lines) if line.get("event") == "start"]
    found = []
    for index, following in pairwise([*starts, len(lines)]):
        start, rest = lines[index], lines[index + 1 : following]
        end = next((line for line in rest if line.get("event") == "end"), None)
        steps = [line for line in rest if "loss" in line]  # held-out lines may be of an `evaluate` much later
        last = end or (steps[-1] if steps else start)
        seconds = end.get("stage_seconds") if end else None
        found.append(
            Attempt(
                step=int(start["step"]),
                began=_number(start.get("time")),
                world_size=start.get("world_size"),
                host=str(start.get("host", "")),
                last_step=int(last["step"]),
                outcome=str(end.get("outcome", "")) if end else "",
                ended=_number(last.get("time")),
                stage_seconds=seconds if isinstance(seconds, dict) else {},
            )
        )
    return tuple(found)


def _document(path: Path, unreadable: list[str], *, optional: bool = False) -> dict[str, Any]:
    """A JSON or YAML mapping; empty, with a remark, where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        if not (optional and isinstance(error, FileNotFoundError)):
            unreadable.append(f"{path.name}: {error.strerror}")
        return {}
    except (ValueError, yaml.YAMLError):
        unreadable.append(f"{path.name}: damaged")
        return {}
    if not isinstance(value, dict):
        unreadable.append(f"{path.name}: {'empty' if value is None else 'damaged'}")
        return {}
    return value


def _sections(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: fields for name, fields in recipe.items() if isinstance(fields, dict)}


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan
