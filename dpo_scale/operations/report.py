"""`dpo-scale report`: a run, or several of a sweep, as one HTML file that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dpo_scale import __version__
from dpo_scale.console import duration
from dpo_scale.errors import UserError
from dpo_scale.files import write_whole
from dpo_scale.operations.figures import DASHES, FIGURES, RUNS, figure_json, lengths_json, x_values
from dpo_scale.operations.run_records import RunRecords, column, read_run, told_apart

SHOWN_SAMPLES, SHOWN_PROMPT, SHOWN_COMPLETION = 3, 40, 60
"""Pairs, and tokens of their prompts and completions, that are shown in full."""
AXES = {"steps": "steps", "hours": "wall clock", "tokens": "tokens"}
AXIS_TITLES = {"steps": "optimizer steps", "hours": "hours since the first start", "tokens": "tokens"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are shown; where `numeric`, all columns but the first are numbers."""

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    numeric: bool = False


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run (default: RUN/report.html) or of several over each other (report.html here).

    Raises UserError for a folder that holds no run, and for a file that cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    target = out or (folders[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    page = render(runs)
    try:
        write_whole(target, page)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; name another file with --out") from error
    return target


def render(runs: Sequence[RunRecords]) -> str:
    """The page of one run, or of several."""
    runs = told_apart(runs)
    positions = [x_values(run) for run in runs]
    trained = [place["training"] for run, place in zip(runs, positions, strict=True) if run.training]
    figures = [drawn for figure in FIGURES if (drawn := figure_json(figure, runs)) is not None]
    axes = [axis for axis in AXES if all(axis in place for place in trained)] if trained else ["steps"]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html.jinja"
    )
    lengths = lengths_json(runs[0].data) if len(runs) == 1 else None
    page = _page_of_one(runs[0]) if len(runs) == 1 else _page_of_several(runs)
    return template.render(
        figures=figures,
        drawn=[*figures, lengths] if lengths else figures,
        positions=positions,
        axes=[(axis, AXES[axis]) for axis in axes],
        axis_titles=AXIS_TITLES,
        first_axis="steps",
        legend=_legend(runs),
        footer=f"dpo_scale {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        plotly_js=Markup(get_plotlyjs()),
        **page,
    )


def _legend(runs: Sequence[RunRecords]) -> str:
    """What the lines across the figures mean; empty where there are none."""
    if not any(len(run.attempts) > 1 or run.skips for run in runs):
        return ""
    resumes = "Grey dashes are resumes" if len(runs) == 1 else "Upright dashes in a run's colour are its resumes"
    return f"{resumes}, red dashes skipped steps."


# --- one run


def _page_of_one(run: RunRecords) -> dict[str, Any]:
    model = run.recipe.get("model", {}).get("path", "")
    return {
        "title": run.name,
        "subtitle": f"{model}, {run.folder.resolve()}" if model else str(run.folder.resolve()),
        "outcome": run.outcome,
        "runs": [],
        "tiles": list(_tiles(run)),
        "remarks": [{"severity": severity, "text": text} for severity, text in _remarks(run)],
        "sections": [section for section in _sections(run) if section["blocks"]],
    }


def _tiles(run: RunRecords) -> Iterator[dict[str, str]]:
    last = run.training[-1] if run.training else {}
    if run.training:
        epoch = last.get("epoch")
        yield _tile("steps", f"{run.last_step:,}", f"{epoch:.2f} epochs" if isinstance(epoch, float) else "")
    for key, name in (("loss", "held-out loss"), ("rewards/accuracy", "held-out accuracy")):
        values = run.held_out_change(key)
        if values:
            yield _tile(name, f"{values[-1]:.4g}", f"from {values[0]:.4g}" if len(values) > 1 else "")
    if "rewards/margin" in last:
        yield _tile("margin", _number(last["rewards/margin"]), "training, last interval")
    for key, name in (("pairs", "pairs"), ("tokens", "tokens")):
        if key in last:
            yield _tile(name, _number(last[key]), "all epochs")
    rates = column(run.training, "tokens_per_second")
    if len(rates):
        yield _tile("tokens/s", _number(float(_median(rates))), "median, all ranks")
    if run.attempts:
        spent = sum(attempt.ended - attempt.began for attempt in run.attempts if math.isfinite(attempt.began))
        ranks = run.attempts[-1].world_size
        yield _tile("time in the loop", duration(spent), f"{len(run.attempts)} starts" if len(run.attempts) > 1 else "")
        yield _tile("ranks", _number(ranks), str(run.environment.get("device", "")))


def _tile(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _remarks(run: RunRecords) -> Iterator[tuple[str, str]]:
    """(severity, text) of what a reader should know before believing the figures."""
    if run.status.get("state") == "failed":
        yield "error", f"Failed: {run.status.get('reason') or 'no reason was noted'}"
    elif run.outcome == "unfinished" and (run.attempts or run.status):
        yield "warning", f"No end was noted after step {run.last_step:,}: the run was killed, failed, or still goes on."
    for line in run.unreadable:
        yield "warning", line
    losses = column(run.training, "loss")
    if len(losses) and not all(map(math.isfinite, losses)):
        count = sum(not math.isfinite(loss) for loss in losses)
        yield "error", f"{count} of {len(losses)} logged losses are no finite numbers; curves have gaps there."
    if run.skips:
        yield "warning", f"{sum(count for _, count in run.skips)} steps overflowed float16 and were tried again."
    if run.training and not run.held_out:
        yield "warning", "Nothing was held out: rewards on training pairs do not show whether the model generalizes."
    if run.about_other_passes:
        yield "warning", run.about_other_passes
    shared = run.data.get("overlap", {}).get("pairs", 0)
    if shared:
        yield "warning", f"{shared:,} held-out pairs are also trained on: held-out figures flatter the model."
    train = run.data.get("train", {})
    if train.get("contradictions"):
        yield "warning", f"{train['contradictions']:,} training pairs are contradicted by another pair."


def _sections(run: RunRecords) -> Iterator[dict[str, Any]]:
    yield {"title": "Data", "blocks": list(_data_blocks(run))}
    yield {"title": "The run", "blocks": list(_run_blocks(run))}
    blocks = []
    if run.environment:
        blocks.append({"title": "Environment", "table": Table(list(_flat(run.environment)))})
    if run.recipe:
        text = yaml.safe_dump(dict(run.recipe), sort_keys=False)
        blocks.insert(0, {"title": "Recipe", "note": "With every default spelled out.", "text": text})
    yield {"title": "How it was made", "blocks": blocks}


def _data_blocks(run: RunRecords) -> Iterator[dict[str, Any]]:
    if lengths_json(run.data):
        yield {"title": "Lengths", "note": "Training pairs, in tokens.", "figure": "lengths"}
    sets = [name for name in ("train", "evaluate") if name in run.data]
    if not sets:
        return
    heads = {"train": "training", "evaluate": "held out"}
    rows = [[name, *cells] for name, cells in _hygiene(run.data, sets)]
    yield {"title": "Hygiene", "table": Table(rows, ["", *(heads[name] for name in sets)], numeric=True)}
    sources = [source for name in sets for source in run.data[name].get("sources", [])]
    first = [[place] for source in sources for place in source.get("first_places", {}).values()]
    if first:
        yield {"title": "Rows set aside", "note": "The first for each reason.", "table": Table(first)}
    samples = [
        (pair.get("row", ""), [(side, *_sample(pair.get(side, {}))) for side in ("chosen", "rejected")])
        for pair in run.data.get("train", {}).get("samples", [])[:SHOWN_SAMPLES]
    ]
    if samples:
        note = "As the model reads them: the end of the prompt, and marked what is scored."
        yield {"title": "Training pairs", "note": note, "samples": samples}


def _sample(sequence: Mapping[str, Any]) -> tuple[str, str]:
    """The end of a prompt and the beginning of its completion as text, from tokens and which of them are scored."""
    tokens = [str(token) for token in sequence.get("tokens", ())]
    boundary = len(tokens) - sum(sequence.get("scored", ()))
    prompt, completion = tokens[:boundary], tokens[boundary:]
    more = "..." if len(completion) > SHOWN_COMPLETION else ""
    return "".join(prompt[-SHOWN_PROMPT:]), "".join(completion[:SHOWN_COMPLETION]) + more


def _hygiene(data: Mapping[str, Any], sets: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    def row(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
        return name, [_number(value) if value is not None else "" for value in values]

    parts = [data[name] for name in sets]
    yield row("rows read", [part.get("rows_read") for part in parts])
    for name, key in (("dropped", "dropped"), ("cut", "truncated")):
        for reason in dict.fromkeys(reason for part in parts for reason in part.get(key, {})):
            yield row(f"{name}: {reason}", [part.get(key, {}).get(reason, 0) for part in parts])
    yield row("pairs kept", [part.get("pairs_kept") for part in parts])
    yield row("duplicates", [part.get("duplicates") for part in parts])
    yield row("contradictions", [part.get("contradictions") for part in parts])
    for name in ("chosen", "rejected"):
        shares = [part.get(f"{name}_longer") for part in parts]
        yield f"{name} is the longer", ["" if share is None else f"{share:.1%}" for share in shares]
    for name in ("prompt", "chosen", "rejected"):
        cells = []
        for part in parts:
            spread = part.get(f"{name}_tokens", {})
            cells.append(" / ".join(_number(spread.get(key, math.nan)) for key in ("p50", "p95", "max")))
        yield f"{name} tokens: median / p95 / longest", cells
    yield row("tokens", [part.get("tokens") for part in parts])
    both = data.get("overlap", {})
    if both:
        yield "also in training: pairs / prompts", _last_of(sets, f"{both['pairs']:,} / {both['prompts']:,}")


def _last_of(sets: Sequence[str], cell: str) -> list[str]:
    return [""] * (len(sets) - 1) + [cell]


def _run_blocks(run: RunRecords) -> Iterator[dict[str, Any]]:
    if run.attempts:
        rows = [
            [
                f"{number}",
                f"{datetime.fromtimestamp(attempt.began):%Y-%m-%d %H:%M:%S}" if math.isfinite(attempt.began) else "",
                f"{attempt.step:,} to {attempt.last_step:,}",
                duration(attempt.ended - attempt.began) if math.isfinite(attempt.ended - attempt.began) else "",
                f"{attempt.world_size or '?'} on {attempt.host or '?'}",
                attempt.outcome or "no end noted",
            ]
            for number, attempt in enumerate(run.attempts, 1)
        ]
        head = ["", "began", "steps", "time", "ranks", "ended"]
        note = "Steps that a killed attempt did after its last checkpoint were done again, and are not shown."
        yield {"title": "Attempts", "note": note if len(rows) > 1 else "", "table": Table(rows, head)}
    stages = _stage_seconds(run)
    if stages:
        total = sum(stages.values())
        shown = {name: seconds for name, seconds in stages.items() if seconds > 0.002 * total}
        if len(shown) < len(stages):
            shown["shorter ones"] = total - sum(shown.values())
        shares = [(name, duration(seconds), f"{100 * seconds / total:.1f}") for name, seconds in shown.items()]
        known = sum(bool(attempt.stage_seconds) for attempt in run.attempts)
        note = f"Of the {known} attempts whose end was noted." if known < len(run.attempts) else ""
        yield {"title": f"Time by stage, {duration(total)} in all", "note": note, "shares": shares}
    cached, computed = (column(run.training[-1:], f"reference_rows_{name}") for name in ("cached", "computed"))
    if len(cached) and math.isfinite(cached[0] + computed[0]):
        asked = cached[0] + computed[0]
        rows = [
            ["rows asked for", _number(asked)],
            ["found in the cache", f"{_number(cached[0])} ({cached[0] / max(1, asked):.1%})"],
            ["scored", _number(computed[0])],
        ]
        note = "A row is a prompt with one of its answers; over all attempts."
        yield {"title": "Reference log-probs", "note": note, "table": Table(rows, numeric=True)}


def _stage_seconds(run: RunRecords) -> dict[str, float]:
    """Seconds by stage over all attempts, the longest first."""
    seconds: dict[str, float] = {}
    for attempt in run.attempts:
        for name, value in attempt.stage_seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


# --- several runs


def _page_of_several(runs: Sequence[RunRecords]) -> dict[str, Any]:
    remarks = [
        {"severity": severity, "text": f"{run.name}: {text}"} for run in runs for severity, text in _remarks(run)
    ]
    pairs = {run.name: run.held_out_pairs for run in runs if run.held_out_pairs}
    if len(set(pairs.values())) > 1:
        each = "; ".join(f"{name}: {held_out}" for name, held_out in pairs.items())
        text = f"Held-out figures are not of the same pairs in the same tokens, and do not compare. {each}."
        remarks.insert(0, {"severity": "warning", "text": text})
    return {
        "title": f"{len(runs)} runs",
        "subtitle": ", ".join(run.name for run in runs),
        "outcome": "",
        "runs": [
            {
                "name": run.name,
                "color": RUNS[number % len(RUNS)],
                "style": "solid" if DASHES[number // len(RUNS) % len(DASHES)] == "solid" else "dashed",
            }
            for number, run in enumerate(runs)
        ],
        "tiles": [],
        "remarks": remarks,
        "comparison": _comparison(runs),
        "differences": _differences(runs),
        "sections": [],
    }


def _comparison(runs: Sequence[RunRecords]) -> Table:
    """A row a run: where it stands and its last numbers."""
    keys = ("loss", "rewards/margin", "rewards/accuracy")
    held_out = any(run.held_out for run in runs)
    prefix, kind = ("eval/", "held-out") if held_out else ("", "training")
    rows = []
    for run in runs:
        lines = run.held_out if held_out else run.training
        last = [_number(column(lines[-1:], key)[0]) if lines else "" for key in ("step", *(prefix + k for k in keys))]
        rates = column(run.training, "tokens_per_second")
        speed = _number(float(_median(rates))) if len(rates) else ""
        rows.append([run.name, run.outcome, f"{run.last_step:,}", *last, speed])
    values = ("held out at step" if held_out else "logged at step", *(f"{kind} {k.split('/')[-1]}" for k in keys))
    return Table(rows, ["", "", "steps", *values, "tokens/s"], numeric=True)


def _differences(runs: Sequence[RunRecords]) -> Table | None:
    """The settings in which the recipes differ, a row each; None where they are alike."""
    flat = [{name: value for name, value in _flat(run.recipe) if name != "run.output_dir"} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [[name, *(settings.get(name, "") for settings in flat)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(rows, ["", *(run.name for run in runs)]) if rows else None


# --- cells


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(`section.field`, value) of nested mappings, as text."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", text) for inner, text in _flat(value))
        else:
            yield str(name), "" if value is None else str(value)


def _median(values: Any) -> float:
    finite = sorted(value for value in values.tolist() if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


def _number(value: Any) -> str:
    """A number as people read it: 1,234,567 or 0.0123."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "?"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"
