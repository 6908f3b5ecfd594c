"""Facts of a machine from what its commands and files say, and nodes that meet before any process group."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from dpo_scale.cli import main
from dpo_scale.distributed import launch_environment
from dpo_scale.distributed import nodes as nodes_module
from dpo_scale.distributed.nodes import Nodes
from dpo_scale.errors import UserError
from dpo_scale.operations import machine

TOPOLOGY = """\
        GPU0    GPU1    GPU2    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV18    SYS     PIX     0-55            0
GPU1    NV18     X      SYS     PIX     0-55            0
GPU2    SYS     SYS      X      SYS     56-111          1
NIC0    PIX     PIX     SYS      X
Legend:
  X    = Self
"""

MOUNTS = r"""
overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/nvme0n1 /home/me/scratch\040disk xfs rw 0 0
tmpfs /home/me tmpfs rw 0 0
"""


def test_links_are_those_between_gpus() -> None:
    assert machine._links(TOPOLOGY.splitlines()) == ("NV18", "SYS")
    assert machine._links([]) == ()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/opt", "overlay"),
        ("/home/other", "nfs4"),
        ("/home/me/x", "tmpfs"),
        ("/home/me/scratch disk/x", "xfs"),
        ("/homework", "overlay"),
    ],
)
def test_a_path_lies_on_the_nearest_mount(path: str, expected: str) -> None:
    assert machine._filesystem(Path(path), MOUNTS.strip()) == expected


def test_a_folder_that_is_not_there_yet_has_its_parents_facts(tmp_path: Path) -> None:
    found = machine._folder("run.output_dir", tmp_path / "new" / "run")
    assert found.path == str(tmp_path / "new" / "run")
    assert found.problem == ""
    (tmp_path / "file").touch()
    assert "is no folder" in machine._folder("run.output_dir", tmp_path / "file" / "run").problem


def test_a_folder_is_writable_where_it_could_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.why_not_writable(tmp_path / "new" / "run") == ""
    monkeypatch.setattr(machine.os, "access", lambda path, _: Path(path) != tmp_path)
    assert machine.why_not_writable(tmp_path / "new" / "run") == f"{tmp_path} may not be written to"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"distributed_type": "FSDP"}, "not a configuration for DeepSpeed"),
        ({"distributed_type": "DEEPSPEED"}, "deepspeed_config_file is missing"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "nowhere.json"}},
            "nowhere.json",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "mixed_precision": "bf16",
                "deepspeed_config": {"deepspeed_config_file": "ds_configs/zero3.json"},
            },
            "accelerate.yaml: mixed_precision: bf16 in the configuration or the options of accelerate launch belongs",
        ),
    ],
)
def test_a_launch_file_that_starts_no_zero3_run_says_why(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert said in machine.launch_file(str(path), on_gpu=False).problems[0]


def test_doctor_refuses_a_stage_that_is_not_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on this machine, with a launch file that has one mistake."""
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    settings = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "zero2.json")},
    }
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    assert main(["doctor", "--config_file", str(tmp_path / "accelerate.yaml")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Training would not start" in said


def test_doctor_looks_at_all_that_a_start_refuses_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch_environment.OUT_OF_PLACE:
        monkeypatch.setenv(name, "2")
    seen = machine.gather_facts(None, None, nodes=1).accelerate_variables
    assert len(launch_environment.out_of_place(seen)) == len(launch_environment.OUT_OF_PLACE)


def test_doctor_looks_at_the_recipes_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: base, dtype: float32, attention: flash_attn}}\ndata: {{train: [pairs.jsonl]}}\n"
        f"batch: {{global_pairs: 8}}\nloss: {{beta: 2.0}}\nrun: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    assert main(["doctor", str(tmp_path / "r.yaml")]) == 1
    assert "wrong: model.attention: flash_attn does not run on" in capsys.readouterr().out


# --- nodes


def on_two_nodes(work: Callable[[Nodes], Any]) -> list[Any]:
    """The results of two nodes, threads here, that meet as two machines would."""
    master = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)

    def run(rank: int) -> Any:
        threading.current_thread().name = f"node-{rank}"
        store = master if rank == 0 else dist.TCPStore("127.0.0.1", master.port, 2, is_master=False)
        return work(Nodes(rank, 2, store))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_the_first_node_leaves_last() -> None:
    left: list[int] = []

    def work(nodes: Nodes) -> None:
        if nodes.rank == 1:
            time.sleep(0.5)
            left.append(1)
        nodes.part()
        if nodes.rank == 0:
            left.append(0)

    on_two_nodes(work)
    assert left == [1, 0]


def test_nodes_gather_what_each_knows() -> None:
    assert on_two_nodes(lambda nodes: nodes.gather("host", {"rank": nodes.rank})) == [[{"rank": 0}, {"rank": 1}]] * 2


def test_a_clock_that_is_ahead_is_found_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    true_time = time.time
    ahead = {"node-1": 42.0}
    shifted = lambda: true_time() + ahead.get(threading.current_thread().name, 0.0)  # noqa: E731
    monkeypatch.setattr(nodes_module.time, "time", shifted)
    (first, _), (offset, uncertainty) = on_two_nodes(Nodes.clock_offset)
    assert first == 0
    assert offset == pytest.approx(42, abs=uncertainty + 0.001)
    assert uncertainty < 5


def test_a_node_that_stays_away_is_a_users_error() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1))
    with pytest.raises(UserError, match="a node stayed away"):
        Nodes(0, 2, store).gather("host", "here")


def test_one_node_needs_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    nodes = Nodes.of_srun()
    assert nodes.gather("host", (1, 2)) == [[1, 2]]
    assert nodes.clock_offset() == (0.0, 0.0)


def test_a_batch_script_outside_srun_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert Nodes.of_srun().count == 1
