"""The program as users start it: what its artifacts must show."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import Launched, Launcher
from safetensors.torch import load_file

from dpo_scale.cli import main
from dpo_scale.files import write_json
from dpo_scale.operations.run_records import read_run
from dpo_scale.training.checkpoints import open_checkpoint
from dpo_scale.training.status import FINISHED, UNFINISHED, USER_ERROR, committed_step

pytestmark = pytest.mark.launch

NUM_STEPS = 10  # 45 pairs, 10 a step, 2 epochs


def weights(run: Launched) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def stopped(launcher: Launcher, undisturbed: Launched) -> Launched:
    """The undisturbed run's recipe, stopped by a STOP file after its first step: scoring and held-out passes, which
    would stop too, have nothing to do."""
    folder = launcher.workspace / "stopped"
    folder.mkdir()
    (folder / "STOP").touch()
    return launcher("stopped", ["evaluate.at_start=false"])


@pytest.fixture(scope="module")
def elastic(launcher: Launcher, stopped: Launched) -> list[Launched]:
    """The stopped run, continued on one rank, on three, and on two to its end; each stop commits one more step."""
    shutil.copytree(stopped.folder, launcher.workspace / "elastic")
    launches = []
    for processes in (1, 3, 2):
        if processes != 2:
            (launcher.workspace / "elastic" / "STOP").touch()
        launches.append(launcher("elastic", processes=processes))
    return launches


def test_a_run_ends_well_and_leaves_every_artifact(undisturbed: Launched) -> None:
    assert undisturbed.returncode == 0, undisturbed.output
    for name in (
        "recipe.yaml",
        "environment.json",
        "data_report.json",
        "metrics.jsonl",
        "checkpoints/latest",
        "model_files/tokenizer.json",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/provenance.json",
        "report.html",
    ):
        assert (undisturbed.folder / name).exists(), name
    assert main(["status", str(undisturbed.folder)]) == FINISHED


def test_the_first_loss_is_ln_2_and_training_learns(undisturbed: Launched) -> None:
    lines = undisturbed.training_lines()
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    before, after = undisturbed.held_out_lines()[0], undisturbed.held_out_lines()[-1]
    assert before["eval/rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert after["eval/rewards/accuracy"] == 1.0
    assert after["eval/loss"] < 0.5 * before["eval/loss"]


def test_counters_are_true(undisturbed: Launched) -> None:
    last = undisturbed.training_lines()[-1]
    assert last["pairs"] == 2 * 45
    report = json.loads((undisturbed.folder / "data_report.json").read_text())
    assert report["train"]["sources"][0]["pairs_kept"] == 45
    assert last["reference_rows_computed"] == 2 * (45 + 11)
    assert last["epoch"] == 2.0


def test_the_console_is_quiet(undisturbed: Launched) -> None:
    ours = undisturbed.output.split("Reference, training")[-1]
    assert "Warning" not in ours, undisturbed.output
    assert "WARNING" not in ours, undisturbed.output


def test_a_run_says_what_it_came_to_and_where_it_is(undisturbed: Launched) -> None:
    words = undisturbed.output[undisturbed.output.index("Finished ") :]
    assert words.startswith(f"Finished    {NUM_STEPS} steps, 90 pairs")
    assert f"Model       {undisturbed.folder / 'model'}\n" in words
    assert f"Report      {undisturbed.folder / 'report.html'}\n" in words
    assert "could not be written" not in words


def test_attempts_are_marked_and_their_stages_timed(undisturbed: Launched) -> None:
    start, end = (line for line in undisturbed.metrics() if "event" in line)
    assert (start["event"], start["step"], start["resumes"], start["world_size"]) == ("start", 0, 0, 2)
    assert (end["event"], end["step"], end["outcome"]) == ("end", NUM_STEPS, "finished")
    stages = end["stage_seconds"]
    for name in ("Reference log-probs", "Loading the policy", "Training", "Held-out pairs", "Saving the checkpoint"):
        assert stages[name] > 0, name
    lines = undisturbed.training_lines()
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    # The stage's clock runs through the steps, which time themselves, and stops for held-out passes and checkpoints.
    in_the_loop = end["time"] - start["time"]
    inner = sum(stages[name] for name in ("Training", "Held-out pairs", "Saving the checkpoint", "Exporting the model"))
    assert 0.95 * sum(line["step_seconds"] for line in lines) < stages["Training"] < in_the_loop
    assert inner > 0.9 * in_the_loop
    assert sum(stages.values()) > in_the_loop


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(undisturbed: Launched) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(undisturbed.folder / "trackers" / "dpo_scale"))
    found.Reload()
    for lines, names in (
        (undisturbed.training_lines(), ("loss", "rewards/margin", "grad_norm", "tokens_per_second")),
        (undisturbed.held_out_lines(), ("eval/loss", "eval/rewards/accuracy")),
    ):
        for name in names:
            actual = [(event.step, event.value) for event in found.Scalars(name)]
            assert actual == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


def test_the_exported_model_is_the_policy(undisturbed: Launched, launcher: Launcher) -> None:
    """Plain transformers, loading the exported folder, gives the log-probs of the last evaluation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(undisturbed.folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.folder / "model")
    expected_means = []
    for row in map(json.loads, (launcher.workspace / "held_out.jsonl").read_text().splitlines()):
        prompt = tokenizer(row["prompt"]).input_ids
        chosen = [*tokenizer(row["chosen"], add_special_tokens=False).input_ids, 1]
        logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
        token_logps = logits.log_softmax(-1)[range(len(chosen)), chosen]
        expected_means.append(token_logps.mean().item())
    actual_mean = undisturbed.held_out_lines()[-1]["eval/logps/chosen"]
    assert actual_mean == pytest.approx(sum(expected_means) / len(expected_means), rel=1e-5)


def test_a_checkpoint_exports_the_same_bytes_offline(undisturbed: Launched, tmp_path: Path) -> None:
    checkpoint = undisturbed.folder / "checkpoints" / f"step-{NUM_STEPS:08}"
    assert main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    for path in (undisturbed.folder / "model").iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoint_is_exported_by_its_run_alone(undisturbed: Launched, tmp_path: Path) -> None:
    """Whatever became of the model that it started from."""
    shutil.copytree(undisturbed.folder, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{NUM_STEPS:08}"
    moved = replace(open_checkpoint(checkpoint).commit, source_model=str(tmp_path / "gone"))
    write_json(checkpoint / "commit.json", moved.to_json())
    assert main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    for path in (undisturbed.folder / "model").iterdir():
        if path.name != "provenance.json":
            assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_evaluate_repeats_the_last_evaluation(launcher: Launcher, undisturbed: Launched) -> None:
    shutil.copytree(undisturbed.folder, launcher.workspace / "evaluated")
    run = launcher("evaluated", stage="evaluate")
    assert run.returncode == 0, run.output
    before, again = run.held_out_lines()[-2:]
    assert again.pop("eval/data") == before.pop("eval/data")
    assert again == pytest.approx(before, rel=1e-6)
    lines, recipe = run.metrics(), (run.folder / "recipe.yaml").read_bytes()
    other_pairs = f"data.evaluate={launcher.base['data']['train']}"
    start = launcher("evaluated", ["run.resume=never", other_pairs], stage="evaluate")
    assert start.returncode == 0, start.output
    assert f"Of no checkpoint of this run, but of {launcher.base['model']['path']}:" in start.output
    assert start.metrics()[:-1] == lines  # it adds a line, and drops none
    assert start.metrics()[-1]["step"] == 0
    records = read_run(start.folder)
    assert (records.other_passes, records.held_out[0]["eval/loss"]) == (1, lines[0]["eval/loss"])
    assert (start.folder / "recipe.yaml").read_bytes() == recipe


def test_a_held_out_pair_over_the_budget_ends_a_run_before_anything_is_scored(launcher: Launcher) -> None:
    """It would end it in the last held-out pass, before the last commit."""
    row = {"prompt": "x" * 190, "chosen": "y" * 100, "rejected": "z" * 50}
    (launcher.workspace / "long.jsonl").write_text(json.dumps(row) + "\n")
    run = launcher("over_budget", [f"data.evaluate={launcher.workspace / 'long.jsonl'}", "data.max_length=400"])
    assert run.returncode != 0
    assert "long.jsonl:1: this pair takes" in run.output
    assert "Reference, training" not in run.output


def test_weights_that_are_not_finite_are_not_committed(launcher: Launcher) -> None:
    """The loss of a step is that of the weights before it: it shows nothing of the last one."""
    huge = ["optim.learning_rate=1e39", "optim.warmup_ratio=0", "optim.schedule=constant"]
    run = launcher("diverged", [*huge, "run.max_steps=1", "data.evaluate=[]"])
    assert run.returncode != 0
    assert "step 1: the weights are not finite any more" in run.output
    assert committed_step(run.folder) is None


def test_a_stop_request_commits_and_says_how_to_go_on(stopped: Launched) -> None:
    assert stopped.returncode != 0
    assert "Stopped by the STOP file after step 1, which is committed; the same command goes on" in stopped.output
    assert "could not be written" not in stopped.output
    assert (stopped.folder / "report.html").is_file()
    assert [line["step"] for line in stopped.training_lines()] == [1]
    assert not (stopped.folder / "STOP").exists()
    assert not (stopped.folder / "model").exists()
    assert main(["status", str(stopped.folder)]) == UNFINISHED
    assert committed_step(stopped.folder) == 1


def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    launcher: Launcher, stopped: Launched, undisturbed: Launched
) -> None:
    shutil.copytree(stopped.folder, launcher.workspace / "resumed")
    run = launcher("resumed")
    assert run.returncode == 0, run.output
    for name in ("loss", "grad_norm", "rewards/margin", "logps/chosen", "learning_rate", "tokens"):
        expected = [line[name] for line in undisturbed.training_lines()]
        assert [line[name] for line in run.training_lines()] == expected, name
    expected_weights = weights(undisturbed)
    for name, actual in weights(run).items():
        assert torch.equal(actual, expected_weights[name]), name


def test_a_run_goes_on_with_other_numbers_of_ranks_and_back(elastic: list[Launched], undisturbed: Launched) -> None:
    said = "\n".join(run.output for run in elastic)
    assert all(run.returncode != 0 for run in elastic[:-1]), said
    assert elastic[-1].returncode == 0, said
    sizes = [json.loads((path / "commit.json").read_text())["world_size"] for path in checkpoints(elastic[-1])]
    assert sizes == [2, 1, 3, 2], said
    expected, actual = undisturbed.training_lines(), elastic[-1].training_lines()
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    for name in ("step", "epoch", "pairs", "tokens", "completion_tokens", "learning_rate"):
        assert [line[name] for line in actual] == [line[name] for line in expected], name


def test_weight_decay_spares_the_norms_on_any_number_of_ranks(elastic: list[Launched], undisturbed: Launched) -> None:
    """Decay that reached the norms, or that missed the matrices, would move weights by far more than rounding does."""
    expected, actual = weights(undisturbed), weights(elastic[-1])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def checkpoints(run: Launched) -> list[Path]:
    return sorted((run.folder / "checkpoints").glob("step-*"))


def test_half_precision_with_cached_references_starts_at_ln_2(launcher: Launcher) -> None:
    """bf16 policy, learning rate 0, per_batch schedule: what another trainer's rounded cache gets wrong."""
    overrides = ["model.dtype=bfloat16", "optim.learning_rate=0.0", "run.max_steps=2"]
    run = launcher("bf16", [*overrides, "reference.schedule=per_batch"])
    assert run.returncode == 0, run.output
    for line in run.training_lines():
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert line["rewards/chosen"] == pytest.approx(0, abs=1e-3)


def test_another_recipe_may_not_take_a_runs_folder(launcher: Launcher, undisturbed: Launched) -> None:
    before = (undisturbed.folder / "metrics.jsonl").read_bytes()
    run = launcher("undisturbed", ["loss.beta=0.5"])
    assert run.returncode != 0
    assert "loss.beta: was 2.0, is 0.5" in run.output
    assert run.output.count("loss.beta is 0.5: 0.1 is usual for sums, 2 to 10 for means") == 1
    assert (undisturbed.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("loss.betta=1", "did you mean 'beta'"),
        ("model.path=/no/such/model", "/no/such/model"),
    ],
)
def test_mistakes_end_a_launch_with_their_message_and_no_model(launcher: Launcher, override: str, message: str) -> None:
    (launcher.workspace / "mistaken" / "status.json").unlink(missing_ok=True)
    run = launcher("mistaken", [override])
    assert run.returncode != 0
    assert main(["status", str(launcher.workspace / "mistaken.yaml"), override]) == USER_ERROR
    assert message in run.output
    assert "Loading" not in run.output
    assert list(run.folder.glob("checkpoints/*")) == []
