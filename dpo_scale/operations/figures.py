"""Runs -> figures for plotly.js: plain JSON values, drawn by the page of the report.

A trace names the x values that it stands over (`meta`), and the page puts in those of the axis that its reader chose:
optimizer steps, hours or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_scale.operations.run_records import Line, RunRecords, Values, column

Trace = dict[str, Any]

CHOSEN, REJECTED = "#2f80d8", "#e0662f"
TRAINING, HELD_OUT, THIRD = "#2f80d8", "#e0662f", "#8f6fd8"
MARKS = {"resumes": "#8a8f98", "skips": "#d64550"}
RUNS = ("#2f80d8", "#e0662f", "#2a9d74", "#8f6fd8", "#c9971c", "#d64587", "#28a3b8", "#7d8590")
"""Colours that can be told apart on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 2000
"""Points of a curve; longer ones are drawn as means of as many stretches."""
SMOOTHED_FROM = 60
"""Points from which on a curve gets a smoothed one over it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A key of metrics.jsonl in a figure."""

    key: str
    name: str
    color: str

    @property
    def is_held_out(self) -> bool:
        return self.key.startswith("eval/")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the report: its curves, and how to read it."""

    name: str
    title: str
    reading: str
    curves: tuple[Curve, ...]
    unit: str = ""
    log: bool = False
    from_zero: bool = False
    noisy: bool = True
    """Whether a smoothed curve over it helps."""
    level: float | None = None
    """A dotted line to compare with."""


FIGURES = (
    Figure(
        "loss",
        "Loss",
        "Starts at ln 2 = 0.693 (dotted) where policy and reference are equal; with label smoothing it cannot reach 0.",
        (Curve("loss", "training", TRAINING), Curve("eval/loss", "held out", HELD_OUT)),
        level=math.log(2),
    ),
    Figure(
        "accuracy",
        "Reward accuracy",
        "Share of pairs whose chosen answer has the higher reward; 0.5 (dotted) is chance.",
        (
            Curve("rewards/accuracy", "training", TRAINING),
            Curve("eval/rewards/accuracy", "held out", HELD_OUT),
            Curve("eval/logps/accuracy", "held out, policy alone", THIRD),
        ),
        level=0.5,
    ),
    Figure(
        "margin",
        "Reward margin",
        "Reward of the chosen answer minus that of the rejected one.",
        (Curve("rewards/margin", "training", TRAINING), Curve("eval/rewards/margin", "held out", HELD_OUT)),
        level=0.0,
    ),
    Figure(
        "rewards",
        "Rewards",
        "beta x (policy - reference). Chosen below zero: the policy moves away from both answers.",
        (
            Curve("rewards/chosen", "chosen", CHOSEN),
            Curve("rewards/rejected", "rejected", REJECTED),
            Curve("eval/rewards/chosen", "chosen, held out", CHOSEN),
            Curve("eval/rewards/rejected", "rejected, held out", REJECTED),
        ),
        level=0.0,
    ),
    Figure(
        "logps",
        "Policy log-probs",
        "Of the answers, in nats, under the recipe's reduction.",
        (
            Curve("logps/chosen", "chosen", CHOSEN),
            Curve("logps/rejected", "rejected", REJECTED),
            Curve("eval/logps/chosen", "chosen, held out", CHOSEN),
            Curve("eval/logps/rejected", "rejected, held out", REJECTED),
        ),
        unit="nats",
    ),
    Figure("grad_norm", "Gradient norm", "Before clipping.", (Curve("grad_norm", "norm", TRAINING),), log=True),
    Figure(
        "learning_rate",
        "Learning rate",
        "As the optimizer used it.",
        (Curve("learning_rate", "rate", TRAINING),),
        noisy=False,
        from_zero=True,
    ),
    Figure(
        "throughput",
        "Throughput",
        "Over all ranks; held-out passes and checkpoints left out.",
        (Curve("tokens_per_second", "tokens/s", TRAINING),),
        unit="tokens/s",
        from_zero=True,
    ),
    Figure(
        "memory",
        "Peak memory",
        "Of the main rank: its GPU's where there is one, else resident.",
        (Curve("peak_memory_gib", "GiB", TRAINING),),
        unit="GiB",
        noisy=False,
        from_zero=True,
    ),
    Figure("mfu", "Model flops utilization", "Share of the GPUs' bf16 peak.", (Curve("mfu", "MFU", TRAINING),)),
)


def x_values(run: RunRecords) -> dict[str, dict[str, list[float | None]]]:
    """Where a run's lines stand: set of lines -> axis -> x. Axes are steps, hours (if known) and tokens."""
    trained = column(run.training, "step")
    resumes = run.attempts[1:]
    skips = np.array([step for step, _ in run.skips], np.float64)
    axes = {
        "steps": {
            "training": trained,
            "held_out": column(run.held_out, "step"),
            "resumes": np.array([attempt.step for attempt in resumes], np.float64),
            "skips": skips,
        }
    }
    began = run.attempts[0].began if run.attempts else math.nan
    times = column(run.training, "time")
    for axis, start, values in (("hours", began, times), ("tokens", 0.0, column(run.training, "tokens"))):
        known = np.isfinite(values)
        if not (known.any() and math.isfinite(start)):
            continue
        steps, at = np.append(0.0, trained[known]), np.append(start, values[known])
        axes[axis] = {name: np.interp(where, steps, at) for name, where in axes["steps"].items()}
        if axis == "hours":
            axes[axis]["resumes"] = np.array([attempt.began for attempt in resumes], np.float64)
            axes[axis] = {name: (where - start) / 3600 for name, where in axes[axis].items()}
    sets: dict[str, dict[str, list[float | None]]] = {}
    for axis, by_set in axes.items():
        for name, where in by_set.items():
            drawn = _thinned(where) if name == "training" else where
            sets.setdefault(name, {})[axis] = _marks_x(where) if name in MARKS else _json(drawn)
    return sets


def figure_json(figure: Figure, runs: Sequence[RunRecords]) -> dict[str, Any] | None:
    """Traces and layout of a figure over one run or several; None where no run has anything to show."""
    several = len(runs) > 1
    traces: list[Trace] = []
    for number, run in enumerate(runs):
        for curve in _shown_curves(figure, run, several=several):
            traces += _curve_traces(curve, run, number, several=several, noisy=figure.noisy)
    if not traces:
        return None
    named = len({trace["name"] for trace in traces}) > 1
    for number, run in enumerate(runs):
        traces += _mark_traces(run, number, several=several)
    axis = {"title": {"text": figure.unit}, "rangemode": "tozero" if figure.from_zero else "normal"}
    layout: dict[str, Any] = {"yaxis": {**axis, "type": "log" if figure.log else "linear"}}
    if figure.level is not None:
        dotted = {"dash": "dot", "width": 1, "color": "#8a8f98"}
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": figure.level, "y1": figure.level}
        layout["shapes"] = [{"type": "line", "layer": "below", "line": dotted, **ends}]
    title = figure.title
    if several and figure.curves[0].name == "chosen":
        title += " of the chosen answers"
    return {
        "name": figure.name,
        "title": title,
        "reading": figure.reading,
        "named": named,
        "traces": traces,
        "layout": layout,
    }


def lengths_json(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Histograms of prompt, chosen and rejected lengths of the training pairs; None without them.

    Bins may differ in width, so heights are sequences per token of length.
    """
    traces = []
    for part, color in (("prompt", THIRD), ("chosen", CHOSEN), ("rejected", REJECTED)):
        summary = data.get("train", {}).get(f"{part}_tokens", {})
        counts, width = summary.get("bins"), summary.get("bin_tokens")
        if not counts or not width:
            continue
        line = {"shape": "hv", "color": color, "width": 1.5}
        trace = {"x": [width * number for number in range(len(counts) + 1)], "y": [n / width for n in [*counts, 0]]}
        hover = {"customdata": [*counts, 0], "hovertemplate": f"%{{customdata:,}} of %{{x:,}} to +{width - 1} tokens"}
        shape = {"mode": "lines", "fill": "tozeroy", "fillcolor": f"{color}22", "line": line}
        traces.append({"name": part, "meta": {}, **trace, **hover, **shape})
    if not traces:
        return None
    y = {"title": {"text": "sequences per token"}}
    layout = {"xaxis": {"title": {"text": "tokens"}, "rangemode": "tozero"}, "yaxis": y}
    return {"name": "lengths", "named": True, "traces": traces, "layout": layout}


def _shown_curves(figure: Figure, run: RunRecords, *, several: bool) -> list[Curve]:
    """Curves that have a value; of several runs only the first of each kind, as colours tell the runs apart."""
    found: list[Curve] = []
    for curve in figure.curves:
        if several and any(curve.is_held_out == other.is_held_out for other in found):
            continue
        if np.isfinite(column(_lines(curve, run), curve.key)).any():
            found.append(curve)
    return found


def _curve_traces(curve: Curve, run: RunRecords, number: int, *, several: bool, noisy: bool) -> list[Trace]:
    values = column(_lines(curve, run), curve.key)
    color, dash = curve.color, "solid"
    if several:
        color, dash = RUNS[number % len(RUNS)], DASHES[number // len(RUNS) % len(DASHES)]
    kind = "held out" if curve.is_held_out else "training"
    name = f"{run.name}, {kind}" if several else curve.name
    trace: Trace = {
        "name": name,
        "legendgroup": curve.key,
        "meta": {"run": number, "lines": "held_out" if curve.is_held_out else "training"},
        "hovertemplate": "%{y:.4g}",
    }
    if curve.is_held_out:
        marker = {"color": color, "size": 8, "symbol": "diamond", "line": {"width": 1, "color": "#ffffff"}}
        line = {"color": color, "width": 1, "dash": "dot"}
        return [{**trace, "y": _json(values), "mode": "lines+markers", "marker": marker, "line": line}]
    raw, line = _thinned(values), {"color": color, "dash": dash}
    first = {**trace, "y": _json(raw), "mode": "lines+markers" if len(raw) < 3 else "lines"}
    if not noisy or len(raw) < SMOOTHED_FROM:
        return [{**first, "line": {**line, "width": 2}}]
    first |= {"line": {**line, "width": 1}, "opacity": 0.3, "showlegend": False}
    smoothed = {"y": _json(_smoothed(raw)), "mode": "lines", "line": {**line, "width": 2}, "hoverinfo": "skip"}
    return [first, {"name": name, "meta": trace["meta"], "legendgroup": curve.key, **smoothed}]


def _mark_traces(run: RunRecords, number: int, *, several: bool) -> list[Trace]:
    """Vertical lines over the height of a figure, at resumes and at skipped steps."""
    resumes = [f"resumed at step {attempt.step}" for attempt in run.attempts[1:]]
    skips = [f"{count} skipped before step {step}" for step, count in run.skips]
    traces: list[Trace] = []
    for name, texts in (("resumes", resumes), ("skips", skips)):
        if texts:
            y, text = [0, 1, None] * len(texts), [part for said in texts for part in (said, said, None)]
            color = RUNS[number % len(RUNS)] if several and name == "resumes" else MARKS[name]
            line = {"color": color, "width": 1, "dash": "dash"}
            trace = {"name": name, "y": y, "text": text, "line": line, "mode": "lines", "yaxis": "y2"}
            traces.append({**trace, "hovertemplate": "%{text}<extra></extra>", "meta": {"run": number, "lines": name}})
    return traces


def _lines(curve: Curve, run: RunRecords) -> Sequence[Line]:
    return run.held_out if curve.is_held_out else run.training


def _thinned(values: Values) -> Values:
    """At most MOST_POINTS means of equal stretches; what is not a number in them is left out."""
    if len(values) <= MOST_POINTS:
        return values
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)[:-1]
    known = np.isfinite(values)
    sums, counts = np.add.reduceat(np.where(known, values, 0.0), edges), np.add.reduceat(known.astype(float), edges)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _smoothed(values: Values) -> Values:
    """Centred moving means over a twentieth of the curve; NaN where a value is."""
    known = np.isfinite(values)
    window = np.ones(2 * (len(values) // 40) + 1)
    sums = np.convolve(np.where(known, values, 0.0), window, "same")
    counts = np.convolve(known.astype(float), window, "same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _json(values: npt.NDArray[np.float64]) -> list[float | None]:
    """JSON knows no NaN; plotly.js draws a gap for null."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _marks_x(where: Values) -> list[float | None]:
    return [x for value in _json(where) for x in (value, value, None)]
