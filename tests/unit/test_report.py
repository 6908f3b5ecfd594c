"""The page of a run: what it shows, what it escapes, where its curves lie."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import SECONDS_A_STEP, event, held_out_line, lines_of_a_run, make_run, training_line

from dpo_scale.cli import main
from dpo_scale.console import Console
from dpo_scale.operations import conclusion
from dpo_scale.operations import figures as module
from dpo_scale.operations.conclusion import conclude, summary, time_by_stage
from dpo_scale.operations.figures import FIGURES, MARKS, RUNS, figure_json, lengths_json, x_values
from dpo_scale.operations.report import render
from dpo_scale.operations.run_records import RunRecords, read_run

LOSS = FIGURES[0]


@pytest.fixture
def run(tmp_path: Path) -> RunRecords:
    return read_run(make_run(tmp_path / "run_of_one", lines_of_a_run(200)))


def without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_marks_stand_where_attempts_began_and_steps_were_skipped(run: RunRecords) -> None:
    places = x_values(run)
    assert places["resumes"]["steps"] == [100, 100, None, 150, 150, None]
    assert places["skips"]["steps"] == [67, 67, None]
    assert places["skips"]["tokens"] == [67 * 60_000] * 2 + [None]
    assert places["resumes"]["hours"][:2] == pytest.approx([100 * SECONDS_A_STEP / 3600] * 2, rel=1e-5)
    assert places["held_out"]["hours"] == pytest.approx(
        [s * SECONDS_A_STEP / 3600 for s in (0, 50, 100, 150, 200)], rel=1e-5
    )


def test_a_pause_between_attempts_shows_on_the_clock_alone(tmp_path: Path) -> None:
    lines = lines_of_a_run(40)
    resumed = next(i for i, line in enumerate(lines) if line.get("resumes") == 1)
    for line in lines[resumed:]:
        line["time"] += 7200
    places = x_values(read_run(make_run(tmp_path / "run", lines)))
    hours, steps = (np.array(places["training"][axis]) for axis in ("hours", "steps"))
    assert np.diff(steps).max() == 1
    assert np.diff(hours).max() == pytest.approx(2 + SECONDS_A_STEP / 3600, rel=1e-4)


def test_runs_without_times_have_no_clock(tmp_path: Path) -> None:
    lines = [{key: value for key, value in line.items() if key != "time"} for line in lines_of_a_run(20)]
    run = read_run(make_run(tmp_path / "run", lines))
    assert set(x_values(run)["training"]) == {"steps", "tokens"}
    assert "wall clock" not in without_scripts(render([run]))


def test_curves_have_the_logged_values_and_gaps_where_there_are_none(tmp_path: Path) -> None:
    values = [0.7, math.nan, None, "x", 0.5]
    lines = [training_line(step, random.Random(0), loss=value) for step, value in enumerate(values, 1)]
    found = figure_json(LOSS, [read_run(make_run(tmp_path / "run", lines))])
    assert found is not None
    assert found["traces"][0]["y"] == [0.7, None, None, None, 0.5]


def test_a_long_curve_is_drawn_as_means_of_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_POINTS", 3)
    actual = module._thinned(np.array([1, 3, 5, 7, math.nan, 9]))
    assert actual.tolist() == [2, 6, 9]


def test_smoothing_keeps_a_line_straight_and_gaps_open() -> None:
    line = np.arange(200.0)
    line[90] = math.nan
    actual = module._smoothed(line)
    assert math.isnan(actual[90])
    np.testing.assert_allclose(actual[10:80], line[10:80])


def test_length_bins_of_different_width_compare_by_density() -> None:
    part = {"bins": [10, 30], "bin_tokens": 5}
    data = {
        "train": {"prompt_tokens": part, "chosen_tokens": {"bins": [20, 60], "bin_tokens": 10}, "rejected_tokens": {}}
    }
    found = lengths_json(data)
    assert found is not None
    prompt, chosen = found["traces"]
    assert prompt["x"] == [0, 5, 10]
    assert prompt["y"] == chosen["y"] == [2, 6, 0]


def test_a_page_shows_the_run(run: RunRecords) -> None:
    text = without_scripts(render([run]))
    for expected in (
        "run_of_one",
        "finished",
        "2 steps overflowed",
        "2 held-out pairs are also trained on",
        "longer than data.max_length",
        "train.jsonl:17",
        "13,600",  # rows scored
        "node-2",
        "beta: 5.0",
        "2.13.0",
        "chosen:  may I?<mark> certainly&lt;/s&gt;</mark>",
        "rejected:  may I? certainly<mark>&lt;/s&gt;</mark>",
    ):
        assert expected in text, expected
    assert "<span>from 0.5</span>" not in text  # of accuracy before the first step, which is rounding


def test_the_legend_names_the_colours_that_are_drawn(run: RunRecords) -> None:
    """Of one run resumes are grey; of several they are in the run's colour."""
    alone, beside = (figure_json(LOSS, runs)["traces"] for runs in ([run], [run, run]))  # type: ignore[index]
    colours = [{trace["line"]["color"] for trace in traces if trace["name"] == "resumes"} for traces in (alone, beside)]
    assert colours == [{MARKS["resumes"]}, set(RUNS[:2])]
    assert "Grey dashes are resumes, red dashes skipped" in render([run])
    assert "Upright dashes in a run&#39;s colour are its resumes, red dashes skipped" in render([run, run])


def test_a_learning_rate_that_was_logged_once_is_drawn_from_zero(tmp_path: Path) -> None:
    """Around a single value plotly.js would draw from one below it to one above."""
    rate = next(figure for figure in FIGURES if figure.name == "learning_rate")
    found = figure_json(rate, [read_run(make_run(tmp_path / "run", [training_line(1, random.Random(0))]))])
    assert found is not None
    assert found["layout"]["yaxis"]["rangemode"] == "tozero"


def test_a_run_that_logged_no_step_takes_no_axis_from_the_others(run: RunRecords, tmp_path: Path) -> None:
    begun = read_run(make_run(tmp_path / "begun", [held_out_line(0), event("start", 0)]))
    text = without_scripts(render([run, begun]))
    assert re.findall(r'data-axis="(\w+)"', text) == ["steps", "hours", "tokens"]
    assert re.findall(r'data-axis="(\w+)"', without_scripts(render([begun, begun]))) == ["steps"]


def test_runs_of_one_name_are_told_apart_on_a_page(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / "seed0", lines_of_a_run(8)) for name in ("beta1", "beta2")]
    assert "beta1/seed0, beta2/seed0" in without_scripts(render([read_run(folder) for folder in folders]))


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
    recipe: dict[str, Any] = {"model": {"path": evil}, "loss": {"beta": 1.0}}
    lines = [event("start", 0, resumes=0, world_size=1, host=evil), *lines_of_a_run(8)]
    folder = make_run(tmp_path / "<b>run", lines, recipe=recipe, environment={"device": evil})
    (folder / "metrics.jsonl").open("a").write(json.dumps({"step": 9, "loss": evil}) + "\n")
    other = make_run(tmp_path / "other", lines_of_a_run(8))
    for page in (render([read_run(folder)]), render([read_run(folder), read_run(other)])):
        assert page.count("<script>") == page.count("</script>") == 2
        assert "<img" not in without_scripts(page)
        assert "<b>run" not in without_scripts(page)


@pytest.mark.parametrize("lines", [[], [event("start", 0, resumes=0, world_size=1, host="n")]])
def test_a_run_that_never_trained_has_a_page(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    status = {"state": "failed", "reason": "no space left on the disk"}
    run = read_run(make_run(tmp_path / "run", lines, data_report={}, environment={}, recipe={}, status=status))
    text = without_scripts(render([run]))
    assert "No training step was logged" in text
    assert "no space left on the disk" in text


def test_a_run_that_was_killed_before_its_first_step_is_told(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [], status={"state": "running", "stage": "scoring"}))
    text = without_scripts(render([run]))
    assert 'class="badge unfinished"' in text
    assert "No end was noted after step 0: the run was killed, failed, or still goes on." in text


def test_losses_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    lines = lines_of_a_run(12)
    lines[3]["loss"] = math.nan
    text = without_scripts(render([read_run(make_run(tmp_path / "run", lines))]))
    assert "1 of 12 logged losses are no finite numbers" in text


def test_a_sweep_shows_what_differs_and_nothing_else(tmp_path: Path) -> None:
    recipes = [{"model": {"path": "m"}, "loss": {"beta": beta}} for beta in (0.1, 0.2)]
    runs = [
        read_run(make_run(tmp_path / f"beta{n}", lines_of_a_run(40, seed=n), recipe=recipe))
        for n, recipe in enumerate(recipes)
    ]
    text = without_scripts(render(runs))
    differences = text[text.index('id="differences"') : text.index("<h2>Training")]
    assert "loss.beta" in differences
    assert "model.path" not in differences
    assert "beta0" in differences
    assert "beta1" in differences


def test_a_sweep_says_at_which_step_its_held_out_figures_were_taken(tmp_path: Path) -> None:
    stopped = [held_out_line(0), *(training_line(step, random.Random(0)) for step in (1, 2, 3))]
    one, two = (make_run(tmp_path / name, lines) for name, lines in (("a", lines_of_a_run(8)), ("b", stopped)))
    text = without_scripts(render([read_run(one), read_run(two)]))
    table = text[text.index('id="comparison"') :]
    assert re.findall(r">([^<>\n]+)</th>", table)[:3] == ["steps", "held out at step", "held-out loss"]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[:5] for row in table.split("<tr>")[2:4]]
    assert rows == [["a", "finished", "8", "8", "0.6112"], ["b", "unfinished", "3", "0", "0.6931"]]


@pytest.mark.parametrize(("others", "told"), [("b" * 12, True), ("a" * 12, False), (None, False)])
def test_runs_with_other_held_out_pairs_are_told_apart(tmp_path: Path, others: str | None, told: bool) -> None:
    folders = [
        make_run(
            tmp_path / name,
            [training_line(1, random.Random(0)), held_out_line(1, **(of_pairs(pairs) if pairs else {}))],
        )
        for name, pairs in (("one", "a" * 12), ("two", others))
    ]
    text = without_scripts(render([read_run(folder) for folder in folders]))
    assert ("do not compare. one: 8 pairs (aaaaaaaaaaaa); two: 8 pairs (bbbbbbbbbbbb)." in text) == told
    assert ("do not compare" in text) == told


def test_a_run_with_passes_over_other_pairs_says_so_on_its_page_and_in_its_last_words(tmp_path: Path) -> None:
    lines = [training_line(1, random.Random(0))]
    lines += [held_out_line(step, **of_pairs(pairs)) for step, pairs in ((0, "a" * 12), (1, "b" * 12))]
    run = read_run(make_run(tmp_path / "run", lines))
    words = "Held-out passes over other pairs are left out (1); those shown are of 8 pairs (bbbbbbbbbbbb)."
    assert words in without_scripts(render([run]))
    assert f"            {words}" in summary(run, {})
    assert re.match(r"Held out    loss 0\.\d+, ", summary(run, {})[1])


def of_pairs(digest: str) -> dict[str, Any]:
    return {"eval/data": digest, "eval/pairs": 8}


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(make_run(tmp_path / name, lines_of_a_run(8))) for name in ("a", "b")]
    assert main(["report", folders[0]]) == 0
    assert (tmp_path / "a" / "report.html").stat().st_size > 1_000_000  # it carries what draws it
    assert main(["report", *folders, "--out", str(tmp_path / "new" / "both.html")]) == 0
    assert (tmp_path / "new" / "both.html").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err


def test_last_words_name_what_was_done_and_where_it_is(run: RunRecords) -> None:
    (run.folder / "model").mkdir()
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "latest").write_text("step-00000200\n")
    lines = summary(run, {"Training": 3600.0, "Saving the checkpoint": 30.0})
    assert lines[0] == "Finished    200 steps, 25,600 pairs, 12,000,000 tokens in 3 starts"
    assert "Held out    loss 0.693 to 0.17" in lines[1]
    assert re.search(r", accuracy 0\.\d{3}$", lines[1])  # that at the start is rounding
    assert lines[3] == "Time        1 h: training 1 h, saving the checkpoint 30 s"
    assert lines[-1] == f"Checkpoint  {run.folder / 'checkpoints' / 'step-00000200'}"


def test_last_words_count_what_was_done_since_the_last_logged_line(tmp_path: Path) -> None:
    counters = {"pairs": 248, "tokens": 9000, "reference_rows_cached": 1, "reference_rows_computed": 2}
    lines = [*lines_of_a_run(8)[:12], event("end", 16, outcome="stopped", stage_seconds={}, **counters)]
    words = summary(read_run(make_run(tmp_path / "run", lines)), {})
    assert words[0].startswith("Stopped     16 steps, 248 pairs, 9,000 tokens")
    assert words[2] == "Reference   1 row found in the cache, 2 scored"


def test_one_step_is_no_steps(tmp_path: Path) -> None:
    end = event("end", 1, outcome="stopped", stage_seconds={}, pairs=1, tokens=1)
    run = read_run(make_run(tmp_path / "run", [event("start", 0), end]))
    assert summary(run, {})[0] == "Stopped     1 step, 1 pair, 1 token"


def test_a_report_that_cannot_be_written_is_told_and_fails_no_run(run: RunRecords) -> None:
    (run.folder / "report.html").mkdir()
    stream = io.StringIO()
    conclude(run.folder, Console(stream))
    said = stream.getvalue()
    assert said.startswith("Finished    200 steps")
    assert "The report could not be written: error: " in said
    assert "Is a directory" in said


def test_what_cannot_be_read_at_the_end_fails_no_run(run: RunRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conclusion, "_write_report", lambda folder: "")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "latest").write_bytes(b"step-000\xff\n")
    stream = io.StringIO()
    conclude(run.folder, Console(stream))
    assert stream.getvalue().startswith("Finished    200 steps")
    conclude(run.folder / "nowhere", Console(stream))
    assert "What the run came to could not be read: UserError(" in stream.getvalue()


def test_only_the_longest_stages_are_named() -> None:
    seconds = {f"Stage {n}": float(n) for n in range(1, 10)}
    text = time_by_stage(seconds)
    assert text.startswith("45 s: stage 9 9.0 s")
    assert "stage 4" not in text
