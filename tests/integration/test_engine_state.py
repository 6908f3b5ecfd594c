"""Real ZeRO-3 runs on CPU ranks: what two ranks stored goes on, on one, two and three ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ON_CPUS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.launch

WORKER = Path(__file__).with_name("checkpoint_worker.py")
ON_TWO = ("fp32", "bf16", "offload", "persistent_tied", "sub_groups_hpz")
ON_OTHERS = ("fp32", "bf16", "persistent_tied")
RELATIVE = {"fp32": 1e-6, "bf16": 2e-4, "persistent_tied": 2e-4, "cpu_adam": 1e-6}
"""Loss differences from another order of sums, in rounding errors of the variant's precision."""


def launch(folder: Path, ranks: int, *variants: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(WORKER), str(folder), *variants]
    environment = os.environ | ON_CPUS
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]


def report(folder: Path, variant: str, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{variant}_{ranks}.json").read_text())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, 2, *ON_TWO, "shards")
    launch(folder, 3, *ON_OTHERS)
    launch(folder, 4, *ON_OTHERS)
    launch(folder, 1, *ON_OTHERS)
    return folder


@pytest.mark.parametrize("variant", ON_TWO)
def test_as_many_ranks_go_on_bitwise(runs: Path, variant: str) -> None:
    actual = report(runs, variant, 2)
    assert actual["restored_losses"] == actual["losses"]
    assert actual["restored_digest"] == actual["digest"]
    assert actual["counters"] == [3, 0]


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("variant", ON_OTHERS)
def test_other_numbers_of_ranks_go_on_with_the_same_losses(runs: Path, variant: str, ranks: int) -> None:
    expected, actual = report(runs, variant, 2), report(runs, variant, ranks)
    assert actual["restored_logits"] == expected["logits"]
    assert actual["restored_losses"] == pytest.approx(expected["losses"], rel=RELATIVE[variant])
    assert actual["first_moments"] == pytest.approx(expected["first_moments"], rel=2e-2)


@pytest.mark.parametrize("variant", ON_TWO)
def test_slices_hold_what_deepspeed_itself_gathers(runs: Path, variant: str) -> None:
    path = runs / variant / "checkpoints/step-00000003"
    shards = [load_file(path / f"rank-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    gathered = torch.load(runs / variant / "masters.pt")
    assert gathered.keys() == {name for name in shards[0] if not name.startswith("random_state")}
    for name, expected in gathered.items():
        actual = torch.cat([shard[name] for shard in shards])
        assert torch.equal(actual, expected.flatten()), name


def test_an_export_of_several_shards_adds_far_less_than_one_to_any_ranks_memory(runs: Path) -> None:
    found = report(runs, "shards", 2)
    assert found["shards"] >= 4
    assert max(found["peak_in_shards"]) < 1.0, found


@pytest.mark.parametrize("variant", [*ON_TWO, "shards"])
def test_live_and_offline_exports_are_the_same_bytes(runs: Path, variant: str) -> None:
    live, offline = runs / variant / "live", runs / variant / "offline"
    assert sorted(path.name for path in live.iterdir()) == sorted(path.name for path in offline.iterdir())
    assert len(list(live.glob("*.safetensors"))) > 1
    for path in live.iterdir():
        assert path.read_bytes() == (offline / path.name).read_bytes(), path.name


@pytest.mark.parametrize("variant", ON_TWO)
def test_exported_logits_equal_those_of_the_engine(runs: Path, variant: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs / variant / "live").eval()
    tokens = torch.randint(67, (2, 11), generator=torch.Generator().manual_seed(99))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker: the order of sums follows from it
    try:
        with torch.no_grad():
            actual = model(input_ids=tokens).logits[:, -1].tolist()
    finally:
        torch.set_num_threads(threads)
    assert actual == report(runs, variant, 2)["logits"]


def test_a_secondary_partition_was_in_use(runs: Path) -> None:
    assert report(runs, "sub_groups_hpz", 2)["secondary_after_forward"]
    assert not report(runs, "bf16", 2)["secondary_after_forward"]


@pytest.mark.parametrize("variant", ON_TWO)
def test_a_rank_whose_disk_is_full_fails_the_save_on_all_and_harms_nothing(runs: Path, variant: str) -> None:
    failure = report(runs, variant, 2)["failing_write"]
    assert len(set(failure["messages"])) == 1
    assert "rank 1: [Errno 28] No space left on device" in failure["messages"][0]
    assert failure["after"] == failure["before"] == ["latest", "step-00000003"]


def test_what_checkpoints_cannot_hold_is_refused(runs: Path) -> None:
    refusals = report(runs, "fp32", 2)["refusals"]
    assert "1 parameters are frozen (first model.norm.weight)" in refusals["frozen"]
    assert "SGD: checkpoints know the state of Adam and AdamW only" in refusals["sgd"]
    assert "lacks ['fp16_groups']" in refusals["private_names"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeedCPUAdam is compiled on first use")
def test_deepspeed_s_cpu_adam_goes_on_too(tmp_path: Path) -> None:
    launch(tmp_path, 2, "cpu_adam")
    launch(tmp_path, 3, "cpu_adam")
    two, three = report(tmp_path, "cpu_adam", 2), report(tmp_path, "cpu_adam", 3)
    assert two["restored_losses"] == two["losses"]
    assert two["restored_digest"] == two["digest"]
    assert three["restored_losses"] == pytest.approx(two["losses"], rel=RELATIVE["cpu_adam"])


def test_an_optimizer_on_nvme_goes_on_too(tmp_path: Path) -> None:
    launch(tmp_path, 2, "nvme")
    actual = report(tmp_path, "nvme", 2)
    assert actual["restored_losses"] == actual["losses"]
    assert actual["restored_digest"] == actual["digest"]
