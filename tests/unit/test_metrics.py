"""Metrics are sums and counts over true pairs, and the file goes on where the checkpoint stands."""

from __future__ import annotations

import io
import json
import math
import random
import tracemalloc
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from disks import note_order
from torch import Tensor

from dpo_scale.console import Console
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.objectives import PairLogProbs
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.metrics import MetricsFile, MetricSums, model_flops_utilization, peak_flops, peak_memory_gib
from dpo_scale.training.records import Records

CPU = torch.device("cpu")


class ThreeAlikeRanks:
    def sum(self, values: Tensor) -> Tensor:
        return 3 * values


BETA = 0.5
# policy chosen, policy rejected, reference chosen, reference rejected, loss
PAIRS = [(-1.0, -2.0, -1.5, -1.0, 0.3), (-4.0, -3.0, -3.0, -3.0, 0.9), (-2.0, -2.0, -2.0, -2.0, 0.7)]
EXPECTED = {
    "loss": (0.3 + 0.9 + 0.7) / 3,
    "rewards/chosen": 0.5 * (0.5 - 1.0 + 0.0) / 3,
    "rewards/rejected": 0.5 * (-1.0 + 0.0 + 0.0) / 3,
    "rewards/margin": 0.5 * (0.5 - 1.0 + 1.0) / 3,
    "rewards/accuracy": (1 + 0 + 0.5) / 3,
    "logps/chosen": -7 / 3,
    "logps/rejected": -7 / 3,
    "logps/accuracy": (1 + 0 + 0.5) / 3,
}


def _add(sums: MetricSums, pairs: list[tuple[float, ...]], weight: float = 1.0) -> None:
    columns = [torch.tensor(column) for column in zip(*pairs, strict=True)]
    sums.add(columns[4], PairLogProbs(*columns[:4]), beta=BETA, weight=weight)


def test_means_are_over_pairs_however_they_fell_into_micro_batches() -> None:
    for parts in ([PAIRS], [PAIRS[:1], PAIRS[1:]], [[pair] for pair in PAIRS]):
        sums = MetricSums(CPU)
        for part in parts:
            _add(sums, part)
        assert sums.reduce(OneProcess()) == pytest.approx(EXPECTED)


def test_fillers_weigh_nothing() -> None:
    sums = MetricSums(CPU)
    _add(sums, PAIRS)
    _add(sums, [(-9.0, -1.0, -5.0, -5.0, 77.0)], weight=0.0)
    assert sums.reduce(ThreeAlikeRanks()) == pytest.approx(EXPECTED)


def test_reducing_starts_anew_and_names_get_their_prefix() -> None:
    sums = MetricSums(CPU)
    _add(sums, PAIRS)
    assert sums.reduce(OneProcess(), "eval/").keys() == {f"eval/{name}" for name in EXPECTED}
    _add(sums, PAIRS[:1])
    assert sums.reduce(OneProcess())["loss"] == pytest.approx(0.3)
    assert sums.reduce(OneProcess())["loss"] == 0.0


def test_sums_add_up() -> None:
    total, part = MetricSums(CPU), MetricSums(CPU)
    _add(total, PAIRS[:1])
    _add(part, PAIRS[1:])
    total += part
    assert total.reduce(OneProcess()) == pytest.approx(EXPECTED)


@dataclass
class OneOfSeveral:
    """The collective as one rank sees it, whose other ranks are at hand."""

    others: list[MetricSums]

    def sum(self, values: Tensor) -> Tensor:
        for other in self.others:
            values += other._sums
        return values


def test_an_interval_that_a_restart_cut_gives_the_same_means_to_the_last_bit() -> None:
    """Two ranks; the restart comes after 4 of 10 steps, and the main rank goes on with the sums of both."""
    rng = random.Random(1)
    pairs = [[tuple(rng.uniform(-90, 90) for _ in range(5)) for _ in range(6)] for _ in range(10)]

    def after(steps: range, into: tuple[MetricSums, MetricSums]) -> tuple[MetricSums, OneOfSeveral]:
        for step in steps:
            _add(into[0], pairs[step][:2])
            _add(into[1], pairs[step][2:])
        return into[0], OneOfSeveral([into[1]])

    whole, ranks = after(range(10), (MetricSums(CPU), MetricSums(CPU)))
    expected = whole.reduce(ranks)
    stopped, ranks = after(range(4), (MetricSums(CPU), MetricSums(CPU)))
    total = json.loads(json.dumps(stopped.total(ranks)))  # by way of a checkpoint
    resumed = MetricSums(CPU), MetricSums(CPU)
    resumed[0].start_from(total)
    main, ranks = after(range(4, 10), resumed)
    assert main.reduce(ranks) == expected
    assert expected["loss"] != 0


def test_sums_of_many_pairs_keep_small_losses() -> None:
    """fp32 sums would stop growing at 2 ** 24 pairs of loss 1."""
    sums = MetricSums(CPU)
    _add(sums, [(-1.0, -1.0, -1.0, -1.0, 1e9)])
    _add(sums, [(-1.0, -1.0, -1.0, -1.0, 1.0)])
    assert sums.reduce(OneProcess())["loss"] == pytest.approx((1e9 + 1) / 2, abs=1e-3)


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 0.5})
    resumed = MetricsFile(path)
    assert _steps(path) == [1, 2, 3]  # as it is for who only evaluates
    resumed.go_back_to(2)
    assert _steps(path) == [1, 2]
    resumed.go_back_to(1)
    assert _steps(path) == [1]
    resumed.write({"step": 2, "loss": 0.4})
    assert _steps(path) == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '"step"', "[10]", "7", '{"loss": 1}', '{"step": null}', "\0\0"])
def test_lines_that_a_kill_tore_are_dropped(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 10, "loss": 0.5})
    with path.open("a") as file:
        file.write(torn)
    MetricsFile(path).write({"step": 30})
    assert _steps(path) == [10, 30]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 20, "lo\xff',
        b'{"step": 20, "lo{"step": 30, "loss": 1}',
        b'{"step\xff": 20}',
        b'{"step": "x"}',
        b'{"step": NaN}',
    ],
)
def test_a_damaged_line_costs_that_line_and_is_counted(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n' + damage + b'\n{"step": 30, "host": "n\xff"}\n')
    assert MetricsFile(path).unreadable == 1
    assert _steps(path) == [10, 30]
    assert MetricsFile(path).unreadable == 0


def test_a_file_of_which_nothing_goes_is_not_written_again(tmp_path: Path) -> None:
    """Of a run of weeks it is large."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 1, "event": "end", "stage_seconds": {"Training": 1.5}}\n')
    before = path.stat()
    MetricsFile(path).go_back_to(1)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_what_goes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 100_001)))
    tracemalloc.start()
    MetricsFile(path).go_back_to(99_999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert _steps(path) == list(range(1, 100_000))
    assert peak < path.stat().st_size / 4


def test_damaged_lines_are_told(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    for text in ("", '{"step": 10}\n{"st\n\n'):
        path.write_text(text)
        Records(OneProcess(), Console(stream), MetricsFile(path), lambda values, step: None)  # type: ignore[arg-type]
    assert stream.getvalue() == "metrics.jsonl: lines that could not be read and are left out: 2\n"


def test_lines_reach_the_disk_before_a_checkpoint_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    events = note_order(monkeypatch)
    file.settle()
    assert events == ["sync metrics.jsonl"]


def test_the_start_of_an_attempt_notes_the_versions_that_compute_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(OneProcess(), Console(io.StringIO()), MetricsFile(path), lambda values, step: None)  # type: ignore[arg-type]
    records.begin(RunState(step=16, resumes=2))
    (start,) = map(json.loads, path.read_text().splitlines())
    assert (start["event"], start["step"], start["resumes"]) == ("start", 16, 2)
    assert start["packages"]["torch"] == metadata.version("torch")


def test_the_end_of_an_attempt_notes_the_counters_of_its_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(OneProcess(), Console(io.StringIO()), MetricsFile(path), lambda values, step: None)  # type: ignore[arg-type]
    state = RunState(step=16, pairs=248, tokens=9000, completion_tokens=5000, reference_rows_computed=3)
    records.end(state, "stopped", {"Training": 1.25})
    (end,) = map(json.loads, path.read_text().splitlines())
    assert (end["step"], end["outcome"], end["stage_seconds"]) == (16, "stopped", {"Training": 1.25})
    assert (end["pairs"], end["tokens"], end["completion_tokens"]) == (248, 9000, 5000)
    assert (end["reference_rows_cached"], end["reference_rows_computed"], end["skipped_steps"]) == (0, 3, 0)


def test_a_run_from_the_start_has_no_lines_of_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    MetricsFile(path).go_back_to(0)
    assert path.read_text() == ""
    (before,) = tmp_path.glob("metrics.jsonl.before-*")
    assert _steps(before) == [0, 1]
    MetricsFile(path).write({"step": 0})
    MetricsFile(path).go_back_to(0)
    assert path.read_text() == ""
    assert _steps(before) == [0, 1]  # and no other beside it: no step was logged
    assert len(list(tmp_path.iterdir())) == 2


def test_utilization_counts_six_flops_a_multiply_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    actual = model_flops_utilization(macs=989e12, seconds=3.0, world_size=4, device=torch.device("cuda"))
    assert actual == pytest.approx(6 / 12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard Of")
    assert model_flops_utilization(1e12, 1.0, 1, torch.device("cuda")) is None
    assert model_flops_utilization(1e12, 1.0, 1, CPU) is None


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_peak_goes_by_whole_words_of_a_gpus_name(gpu: str, expected: float | None) -> None:
    assert peak_flops(gpu) == expected


def test_peak_memory_is_that_of_the_process() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) / 2**20
    assert math.isclose(peak_memory_gib(CPU), expected, rel_tol=0.05)
