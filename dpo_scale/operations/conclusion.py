"""The last words of a run: what was done, where things are, what took the time, and the report beside them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_scale.console import Console, counted, duration
from dpo_scale.operations.run_records import RunRecords, column, read_run

REPORT_SECONDS = 120
STAGES_NAMED = 5


def conclude(folder: Path, console: Console) -> None:
    """Write RUN/report.html and say what the run came to. What fails here is said, and fails no run."""
    with console.progress("Writing the report", None):
        trouble = _write_report(folder)
    try:
        console.say("\n".join(summary(read_run(folder), console.clock.seconds)))
    except Exception as error:  # whatever damaged records may raise: the run itself is done
        console.say(f"What the run came to could not be read: {error!r}")
    if trouble:
        console.say(f"The report could not be written: {trouble}; try dpo-scale report {folder}")


def _write_report(folder: Path) -> str:
    """Have the report written by a process of its own, which can take nothing down; returns what went wrong."""
    command = [sys.executable, "-m", "dpo_scale.cli", "report", str(folder)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=REPORT_SECONDS,
            check=False,
            start_new_session=True,  # the signal that stops a run goes to its whole group, and may come twice
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")


def summary(run: RunRecords, stage_seconds: Mapping[str, float]) -> list[str]:
    """The run as a few lines of words and paths; not a table, which would break paths at its width."""
    return [f"{name:<12}{text}" for name, text in _rows(run, stage_seconds)]


def _rows(run: RunRecords, stage_seconds: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    last = run.counters
    done = [counted(run.last_step, "step")]
    done += [counted(last[f"{noun}s"], noun) for noun in ("pair", "token") if f"{noun}s" in last]
    starts = f" in {len(run.attempts)} starts" if len(run.attempts) > 1 else ""
    yield run.outcome.capitalize(), ", ".join(done) + starts
    if run.held_out:
        parts = []
        for key, name in (("loss", "loss"), ("rewards/margin", "margin"), ("rewards/accuracy", "accuracy")):
            values = [f"{value:.3f}" for value in run.held_out_change(key)] or ["?"]
            parts.append(f"{name} {' to '.join(dict.fromkeys(values))}")
        yield "Held out", ", ".join(parts)
    if run.about_other_passes:
        yield "", run.about_other_passes
    cached, computed = (column([last], f"reference_rows_{name}")[0] for name in ("cached", "computed"))
    if math.isfinite(cached + computed):
        yield "Reference", f"{counted(int(cached), 'row')} found in the cache, {computed:,.0f} scored"
    yield "Time", time_by_stage(stage_seconds)
    for name, path in (("Model", run.folder / "model"), ("Report", run.folder / "report.html")):
        if path.exists():
            yield name, str(path)
    checkpoints = run.folder / "checkpoints"
    latest = checkpoints / "latest"
    if latest.exists():
        yield "Checkpoint", str(checkpoints / latest.read_text(encoding="utf-8", errors="replace").strip())


def time_by_stage(stage_seconds: Mapping[str, float]) -> str:
    """All seconds, and the longest stages of them."""
    longest = sorted(stage_seconds.items(), key=lambda item: -item[1])[:STAGES_NAMED]
    named = ", ".join(f"{name[:1].lower()}{name[1:]} {duration(seconds)}" for name, seconds in longest)
    return f"{duration(sum(stage_seconds.values()))}: {named}"
