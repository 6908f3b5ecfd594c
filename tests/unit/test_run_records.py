"""Any folder that a run left can be read, and what cannot is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import BEGAN, SECONDS_A_STEP, event, held_out_line, lines_of_a_run, make_run

from dpo_scale.errors import UserError
from dpo_scale.operations.run_records import column, read_run, told_apart
from dpo_scale.training.run_folder import take_lock
from dpo_scale.training.status import StatusFile


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", lines_of_a_run(200)))
    assert run.unreadable == ()
    assert len(run.training) == 200
    assert [line["step"] for line in run.held_out] == [0, 50, 100, 150, 200]
    assert run.outcome == "finished"
    assert [(attempt.step, attempt.last_step, attempt.outcome) for attempt in run.attempts] == [
        (0, 100, "stopped"),
        (100, 150, "stopped"),
        (150, 200, "finished"),
    ]
    assert run.attempts[1].ended - run.attempts[1].began == 50 * SECONDS_A_STEP
    assert run.skips == [(67, 2)]


def test_a_torn_last_line_costs_that_line_and_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", lines_of_a_run(20)[:-1])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "loss": 0.6')
    run = read_run(folder)
    assert run.last_step == 20
    assert "1 of" in run.unreadable[0]
    assert "cut off" in run.unreadable[0]
    assert run.outcome == "unfinished"


@pytest.mark.parametrize("line", ["", "[1, 2]", '"text"', "{}", '{"step": "7"}', '{"step": NaN}', "\x00\x00"])
def test_lines_of_another_form_are_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "run", [])
    text = json.dumps(lines_of_a_run(8)[2])
    (folder / "metrics.jsonl").write_text(f"{text}\n{line}\n{text}\n")
    run = read_run(folder)
    assert len(run.training) == 2
    assert run.unreadable == ("metrics.jsonl: 1 of 3 lines cannot be read",)


def test_missing_keys_and_values_that_are_no_numbers_are_nan() -> None:
    lines: list[dict[str, Any]] = [{"loss": 1}, {}, {"loss": None}, {"loss": "x"}, {"loss": True}, {"loss": math.inf}]
    actual = column(lines, "loss")
    assert actual[0] == 1
    assert all(map(math.isnan, actual[1:5]))
    assert actual[5] == math.inf


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["a/seed0", "a/seed1"], ["seed0", "seed1"]),
        (["beta1/seed0", "beta2/seed0", "beta2/seed1"], ["beta1/seed0", "beta2/seed0", "seed1"]),
        (["x/b/c", "y/b/c", "y/c"], ["x/b/c", "y/b/c", "y/c"]),
        (["a/run", "b/run", "c/a/run"], ["sweep/a/run", "b/run", "c/a/run"]),
    ],
)
def test_runs_of_one_name_get_as_much_of_their_path_as_tells_them_apart(
    tmp_path: Path, folders: list[str], expected: list[str]
) -> None:
    runs = [read_run(make_run(tmp_path / "sweep" / folder, [])) for folder in folders]
    assert [run.name for run in told_apart(runs)] == expected


def test_a_run_that_is_given_twice_has_its_name_twice(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", []))
    assert len({twin.name for twin in told_apart([run, run])}) == 1


@pytest.mark.parametrize(("reference", "expected"), [(None, [0.8]), ("another", [0.5156, 0.8])])
def test_an_accuracy_before_the_first_step_is_rounding_where_policy_and_reference_are_equal(
    tmp_path: Path, reference: str | None, expected: list[float]
) -> None:
    key = "eval/rewards/accuracy"
    lines = [held_out_line(step, **{key: value}) for step, value in ((0, 0.5156), (2, 0.6), (3, math.nan), (4, 0.8))]
    folder = make_run(tmp_path / "run", lines, recipe={"reference": {"path": reference}})
    assert read_run(folder).held_out_change("rewards/accuracy") == expected
    assert len(read_run(folder).held_out_change("loss")) == 2
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]))
    assert read_run(folder).held_out_change("rewards/accuracy") == [0.5156]


def test_an_empty_run_is_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [])
    for name in ("environment.json", "data_report.json"):
        (folder / name).unlink()
    (folder / "recipe.yaml").write_text("model: [")
    run = read_run(folder)
    assert (run.last_step, run.outcome, run.attempts, run.recipe) == (0, "unfinished", (), {})
    assert run.unreadable == (
        "metrics.jsonl: empty",
        "recipe.yaml: damaged",
        "environment.json: No such file or directory",
        "data_report.json: No such file or directory",
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        read_run(tmp_path)


BEGUN = [event("start", 0, resumes=0, world_size=2, host="n"), *lines_of_a_run(8)[2:4]]


def test_a_run_without_an_end_has_the_failure_that_it_noted(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", BEGUN, status={"state": "failed", "reason": "disk full"}))
    assert run.outcome == "failed"


def test_a_run_is_running_as_long_as_its_process_holds_the_lock(tmp_path: Path) -> None:
    """One that is killed leaves the status that it had."""
    folder = make_run(tmp_path / "run", BEGUN)
    StatusFile(folder, "train")
    lock = take_lock(folder / ".lock")
    assert read_run(folder).outcome == "running"
    lock.close()
    assert read_run(folder).outcome == "unfinished"


def test_a_status_of_another_form_is_no_sign_of_life(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", BEGUN, status={"state": "running", "stages": []}))
    assert run.outcome == "unfinished"


def test_a_stop_between_two_logged_lines_counts_the_steps_that_were_made(tmp_path: Path) -> None:
    stop = event("end", 7, outcome="stopped", stage_seconds={})
    lines = [event("start", 0, resumes=0, world_size=2, host="n"), *lines_of_a_run(8)[2:4], stop]
    assert read_run(make_run(tmp_path / "run", lines)).last_step == 7


def test_what_evaluate_adds_after_the_end_belongs_to_no_attempt(tmp_path: Path) -> None:
    lines = [*lines_of_a_run(40), held_out_line(40, time=BEGAN + 1e6, **{"eval/loss": 0.123})]
    run = read_run(make_run(tmp_path / "run", lines))
    assert run.attempts[-1].ended == BEGAN + 40 * SECONDS_A_STEP
    assert run.held_out[-1]["eval/loss"] != 0.123  # the run's own pass of that step stays


def test_what_evaluate_adds_after_a_kill_belongs_to_no_attempt(tmp_path: Path) -> None:
    """It is of the checkpoint, hours later."""
    run = read_run(make_run(tmp_path / "run", [*BEGUN, held_out_line(1, time=BEGAN + 1e6)]))
    (attempt,) = run.attempts
    assert (attempt.last_step, attempt.ended) == (2, BEGAN + 2 * SECONDS_A_STEP)


@pytest.mark.parametrize(
    ("passes", "trained_beside", "expected"),
    [
        (["a", "a", "b"], "a", [0, 1]),  # `evaluate` was given others
        (["a", "a", "b"], "b", [2]),  # resumed with others
        (["a", "a", "b"], "c", [2]),  # resumed with others, and no pass made yet
        ([None, None, "a"], None, [0, 1]),  # `evaluate` of this version in the folder of an older one
        ([None, None, "a"], "a", [0, 1, 2]),  # a run of an older version, resumed
        ([None, "b", "a"], "a", [0, 2]),
        ([None, None], None, [0, 1]),
    ],
)
def test_held_out_lines_are_of_one_set_of_pairs(
    tmp_path: Path, passes: list[str | None], trained_beside: str | None, expected: list[int]
) -> None:
    noted = [{} if pairs is None else {"eval/data": pairs, "eval/pairs": 8} for pairs in passes]
    lines = [held_out_line(step, **pairs) for step, pairs in enumerate(noted)]
    data = {"evaluate": {} if trained_beside is None else {"digest": trained_beside}}
    run = read_run(make_run(tmp_path / "run", lines, data_report=data))
    assert [line["step"] for line in run.held_out] == expected
    assert run.other_passes == len(passes) - len(expected)
    told = f"Held-out passes over other pairs are left out ({run.other_passes})"
    assert run.about_other_passes.startswith(told) == bool(run.other_passes)
