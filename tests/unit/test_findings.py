"""From made-up facts of machines to what is wrong with them, and whether training would start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from rich.console import Console

from dpo_scale.distributed.ops import ASYNC_IO, CompiledOp, needed_ops
from dpo_scale.operations import doctor
from dpo_scale.operations.cluster import GIB
from dpo_scale.operations.doctor import show
from dpo_scale.operations.findings import (
    Facts,
    Finding,
    Folder,
    Gpu,
    LaunchFile,
    Node,
    compare,
    examine,
    would_start,
)
from dpo_scale.recipe import ModelSection

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, bf16=True)
LAUNCH = LaunchFile("launch/zero3.yaml", {"num_processes": 8, "num_machines": 1}, "ds_configs/zero3.json", ())
CACHE = Folder("reference.cache_dir", "/data/cache", False, "lustre", True, 900 * GIB)

GPU_NODE = Facts(
    host="node-1",
    python=(3, 12),
    packages={"torch": (">=2.11,<2.14", "2.13.0"), "deepspeed": (">=0.19,<0.20", "0.19.8"), "rich": (">=13", "15.0.0")},
    torch_cuda="13.0",
    driver="580.65",
    driver_gpus=8,
    gpus=(H100,) * 8,
    nccl="2.28.3",
    nvcc="",
    compiler="c++ (Debian) 12.2.0",
    python_headers=True,
    ninja=True,
    libaio=False,
    ops=(),
    launch=LAUNCH,
    memlock_bytes=math.inf,
    infiniband=True,
    shared_memory_bytes=500 * GIB,
    links=("NV18",),
    folders=(CACHE,),
    accelerate_variables={},
)
LAPTOP = dataclasses.replace(
    GPU_NODE,
    torch_cuda="",
    driver="",
    driver_gpus=0,
    gpus=(),
    ops=(CompiledOp("cpu_adam", "an optimizer on CPU", True, False),),
    launch=dataclasses.replace(LAUNCH, settings={"num_processes": 2, "num_machines": 1}),
    memlock_bytes=8 * 2**20,
    infiniband=False,
    links=(),
)
NVME_OP = CompiledOp(ASYNC_IO, "offload to NVMe", True, False)


def changed(facts: Facts, **changes: Any) -> list[Finding]:
    return examine(dataclasses.replace(facts, **changes))


def worst(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.severity, finding.topic) for finding in findings if finding.severity != "ok"]


def test_a_good_node_has_nothing_wrong() -> None:
    findings = examine(GPU_NODE)
    assert worst(findings) == []
    assert would_start(findings)
    assert any("8 x NVIDIA H100 80GB HBM3, 80 GiB" in finding.found for finding in findings)


def test_a_laptop_would_start_and_is_told_that_it_has_no_gpu() -> None:
    findings = examine(LAPTOP)
    assert worst(findings) == [("warning", "GPUs")]
    assert would_start(findings)


@pytest.mark.parametrize(
    ("node", "changes", "topic", "said"),
    [
        (GPU_NODE, {"python": (3, 9)}, "Python", "3.9"),
        (GPU_NODE, {"packages": {"deepspeed": (">=0.19,<0.20", "0.18.2")}}, "packages", "deepspeed 0.18.2"),
        (GPU_NODE, {"packages": {"rich": (">=13", "")}}, "packages", "rich is not installed"),
        (GPU_NODE, {"gpus": (), "torch_cuda": ""}, "GPUs", "built for CPUs"),
        (GPU_NODE, {"gpus": ()}, "GPUs", "sees none"),
        (GPU_NODE, {"gpus": (dataclasses.replace(H100, bf16=False),), "dtype": "bfloat16"}, "model.dtype", "bfloat16"),
        (LAPTOP, {"dtype": "float16"}, "model.dtype", "float16"),
        (LAPTOP, {"compiler": ""}, "compiled ops", "no C++ compiler"),
        (LAPTOP, {"python_headers": False}, "compiled ops", "no headers"),
        (LAPTOP, {"ninja": False}, "compiled ops", "ninja"),
        (LAPTOP, {"ops": (NVME_OP,)}, "compiled ops", "libaio"),
        (
            GPU_NODE,
            {"ops": (NVME_OP,), "libaio": True, "nvcc": "12.4"},
            "compiled ops",
            "CUDA 13.0, and nvcc is 12.4",
        ),
        (GPU_NODE, {"launch": dataclasses.replace(LAUNCH, problems=("zero.json: stage 2",))}, "accelerate", "stage 2"),
        (GPU_NODE, {"accelerate_variables": {"ACCELERATE_USE_CPU": "true"}}, "accelerate", "drops DeepSpeed"),
        (GPU_NODE, {"accelerate_variables": {"ACCELERATE_USE_FSDP": "true"}}, "accelerate", "another sharding"),
        (GPU_NODE, {"memlock_bytes": 2**23, "nodes": 2}, "locked memory", "8 MiB"),
        (
            GPU_NODE,
            {"folders": (dataclasses.replace(CACHE, problem="/data may not be written to"),)},
            "reference.cache_dir",
            "may not be written to",
        ),
        (GPU_NODE, {"folders": (dataclasses.replace(CACHE, free_bytes=10**8),)}, "reference.cache_dir", "full"),
        (GPU_NODE, {"missing_trackers": ("wandb is not installed here: pip install wandb",)}, "track.to", "wandb"),
    ],
)
def test_what_keeps_training_from_starting_is_an_error_with_a_remedy(
    node: Facts, changes: dict[str, Any], topic: str, said: str
) -> None:
    findings = changed(node, **changes)
    errors = [finding for finding in findings if finding.severity == "error"]
    assert [error.topic for error in errors] == [topic]
    assert said in errors[0].found
    assert errors[0].remedy
    assert not would_start(findings)


@pytest.mark.parametrize(
    ("changes", "topic", "said"),
    [
        ({"packages": {"torch": (">=2.11,<2.14", "2.15.0")}}, "packages", "torch 2.15.0; verified is"),
        ({"gpus": (H100, dataclasses.replace(H100, name="A100"))}, "GPUs", "several kinds"),
        ({"compiler": ""}, "Triton", "no C compiler"),
        ({"python_headers": False}, "Triton", "no headers"),
        ({"memlock_bytes": 2**23}, "locked memory", "InfiniBand"),
        ({"shared_memory_bytes": 64 * 2**20}, "shared memory", "0.1 GiB"),
        ({"links": ("NV18", "SYS")}, "topology", "no NVLink"),
        ({"folders": (dataclasses.replace(CACHE, should_be_local=True),)}, "reference.cache_dir", "locks"),
        ({"folders": (dataclasses.replace(CACHE, free_bytes=5 * GIB),)}, "reference.cache_dir", "little"),
        ({"gpus": (H100,) * 4}, "accelerate", "this node has 4 GPUs"),
    ],
)
def test_what_only_costs_is_a_warning(changes: dict[str, Any], topic: str, said: str) -> None:
    findings = changed(GPU_NODE, **changes)
    warnings = [finding for finding in findings if finding.severity == "warning" and finding.topic == topic]
    assert len(warnings) == 1
    assert said in warnings[0].found
    assert would_start(findings)


def test_idle_gpus_are_told() -> None:
    launch = dataclasses.replace(LAUNCH, settings={"num_processes": 8, "num_machines": 2})
    found = next(f for f in changed(GPU_NODE, launch=launch) if f.topic == "accelerate")
    assert "4 GPUs of this node stay idle" in found.found
    assert found.remedy == "--num_processes 16"


def test_an_op_that_is_compiled_already_needs_no_compiler() -> None:
    built = tuple(dataclasses.replace(op, built=True) for op in LAPTOP.ops)
    assert would_start(changed(LAPTOP, ops=built, compiler="", python_headers=False, ninja=False))


@pytest.mark.parametrize(
    ("policy", "reference_offload", "expected"),
    [
        ({}, "cpu", set()),
        ({}, "nvme", {ASYNC_IO}),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "none", {ASYNC_IO}),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "none", {ASYNC_IO}),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "none", set()),
    ],
)
def test_only_what_a_run_uses_is_compiled(policy: dict[str, Any], reference_offload: str, expected: set[str]) -> None:
    assert set(needed_ops(policy, reference_offload)) == expected


# --- several nodes


def node(host: str, facts: Facts = GPU_NODE, **changes: Any) -> Node:
    found = Node(host, {"torch": "2.13.0"}, tuple(examine(facts)), 0.0, 0.001, sees_output_dir=True)
    return dataclasses.replace(found, **changes)


def test_what_all_nodes_share_is_said_once_and_the_rest_with_its_host() -> None:
    few = dataclasses.replace(GPU_NODE, shared_memory_bytes=1)
    findings = compare([node("a"), node("b", few), node("c", few)])
    assert sum(finding.topic == "GPUs" for finding in findings) == 1
    shared_memory = [finding.found for finding in findings if finding.topic == "shared memory"]
    assert [text.split(":")[0] for text in shared_memory] == ["a", "b, c"]


@pytest.mark.parametrize(
    ("changes", "severity", "said"),
    [
        ({"versions": {"torch": "2.12.0"}}, "error", "torch differs: 2.13.0 on a, 2.12.0 on b"),
        ({"sees_output_dir": False}, "error", "b do not see what a writes there"),
        ({"clock_offset": -3.25}, "warning", "b is -3.2 s off a"),
    ],
)
def test_what_differs_between_nodes_is_found(changes: dict[str, Any], severity: str, said: str) -> None:
    findings = compare([node("a"), node("b", **changes)])
    found = next(finding for finding in findings if said in finding.found)
    assert found.severity == severity
    assert would_start(findings) == (severity != "error")


def test_a_clock_is_blamed_only_beyond_what_the_network_hides() -> None:
    findings = compare([node("a"), node("b", clock_offset=1.5, clock_uncertainty=0.8)])
    clocks = next(finding for finding in findings if finding.topic == "clocks")
    assert (clocks.severity, clocks.found) == ("ok", "2 nodes within 1500 ms, known to 800 ms")


def test_a_machine_with_nothing_wrong_is_ready_and_no_more_is_promised() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        show(examine(GPU_NODE), [], console)
    last = capture.get().splitlines()[-1]
    assert last == "This machine is ready; dpo-scale check RECIPE looks at model and data."


@pytest.mark.parametrize(
    ("kernel", "severity"), [("flex", "error"), ("varlen", "error"), ("auto", "ok"), ("sdpa", "ok")]
)
def test_a_kernel_of_attention_is_judged_as_a_run_judges_it(kernel: Any, severity: str) -> None:
    settings = ModelSection(path="base", attention=kernel, dtype="float32")
    (finding,) = doctor._attention(settings, on_gpu=False)
    assert (finding.severity, finding.topic) == (severity, "model.attention")
    if severity == "error":
        assert finding.found == f"{kernel} does not run on cpu in torch.float32"
        assert finding.remedy == "use auto or sdpa"


def test_the_table_shows_what_is_wrong_and_what_mends_it() -> None:
    wrong = node("b", dataclasses.replace(GPU_NODE, python=(3, 9)))
    nodes = [node("a"), wrong]
    console = Console(width=200, force_terminal=True, no_color=True)
    with console.capture() as capture:
        show(compare(nodes), nodes, console)
    text = capture.get()
    assert "b: 3.9; 3.10 to 3.13 are supported" in text
    assert "python3.12 -m venv .venv" in text
    assert "Training would not start: 1 thing is wrong." in text
    assert text.index("│ a ") < text.index("│ b ") < text.index("what mends it")


@pytest.mark.parametrize("terminal", [True, False])
def test_no_path_is_cut_off(terminal: bool) -> None:
    path = "/scratch/" + "long/" * 40 + "end"
    findings = [Finding("error", "run.output_dir", f"{path}: is no folder", f"another folder than {path}")]
    console = Console(width=80, force_terminal=terminal, no_color=True)
    with console.capture() as capture:
        show(findings, [], console)
    if terminal:
        assert "…" not in capture.get()
        assert "Training would not start" in capture.get()
    else:
        line = capture.get().splitlines()[0]
        assert line == f"wrong: run.output_dir: {path}: is no folder; mended by: another folder than {path}"
