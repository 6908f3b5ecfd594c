"""A run that goes on does so in the tracker runs that it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_scale.recipe import Recipe
from dpo_scale.training.evaluation import best_of
from dpo_scale.training.trackers import new_run_ids, start_trackers


class FakeAccelerator:
    def __init__(self) -> None:
        self.started: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def init_trackers(self, project_name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.started.append((project_name, config, init_kwargs))


def recipe(*trackers: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "base"},
            "data": {"train": "pairs.jsonl"},
            "batch": {"global_pairs": 8},
            "loss": {"beta": 0.1},
            "track": {"to": ["jsonl", *trackers]},
            "run": {"output_dir": "run"},
        }
    )


def test_wandb_goes_on_with_the_id_that_it_began_with() -> None:
    accelerator, wanted = FakeAccelerator(), recipe("wandb")
    ids = new_run_ids(wanted)
    start_trackers(accelerator, wanted, ids, step=0)
    start_trackers(accelerator, wanted, ids, step=7)
    first, second = (options["wandb"] for _, _, options in accelerator.started)
    assert first == second == {"id": ids["wandb"], "resume": "allow", "dir": "run", "name": "run"}
    assert new_run_ids(wanted) != ids  # another run has another
    assert accelerator.started[0][1]["loss.beta"] == "0.1"


def test_no_id_is_made_up_for_a_tracker_that_is_not_wanted() -> None:
    assert new_run_ids(recipe("tensorboard")) == {}


def test_trackers_that_cannot_go_on_are_named_at_a_resume_only() -> None:
    wanted = recipe("tensorboard", "mlflow")
    assert start_trackers(FakeAccelerator(), wanted, {}, step=0) == []
    assert start_trackers(FakeAccelerator(), wanted, {}, step=3) == ["mlflow"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """Steps 3 and 4 were logged and lost, and are logged again from the checkpoint of step 2."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    def log(start: int, steps: list[int]) -> None:
        accelerator = FakeAccelerator()
        start_trackers(accelerator, recipe("tensorboard"), {}, start)
        writer = SummaryWriter(str(tmp_path), **accelerator.started[0][2]["tensorboard"])
        for step in steps:
            writer.add_scalar("loss", 10 * step, step)
        writer.close()

    log(0, [1, 2, 3, 4])
    log(2, [3, 4, 5])
    found = event_accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_the_best_values_are_the_lowest_loss_and_the_highest_accuracy() -> None:
    passes = [(0.7, 0.5), (0.4, 0.9), (0.5, 0.8)]
    best: dict[str, float] = {}
    for loss, accuracy in passes:
        best = best_of(best, {"eval/loss": loss, "eval/rewards/accuracy": accuracy, "eval/logps/chosen": -1.0})
    assert best == {"eval/loss": 0.4, "eval/rewards/accuracy": 0.9}
