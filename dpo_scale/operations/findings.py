"""Facts of a machine -> findings: what was found and, where it is wrong, what mends it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from dpo_scale.console import counted
from dpo_scale.distributed.launch_environment import out_of_place
from dpo_scale.distributed.ops import ASYNC_IO, CompiledOp
from dpo_scale.operations.cluster import GIB

Severity = Literal["ok", "warning", "error"]

PYTHONS = ((3, 10), (3, 13))
SMALLEST_SHARED_MEMORY = 1 * GIB
"""NCCL and DeepSpeed's CPU collectives exchange data through /dev/shm; containers often give it 64 MiB."""
LEAST_FREE_BYTES, FEW_FREE_BYTES = 1 * GIB, 20 * GIB
MOST_CLOCK_SKEW = 1.0
"""Seconds between clocks from which on logs of several nodes mislead, and make and lock files misbehave."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of the doctor's table. An error keeps training from starting."""

    severity: Severity
    topic: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as PyTorch sees it."""

    name: str
    memory_bytes: int
    bf16: bool


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that a run writes to."""

    purpose: str
    path: str
    should_be_local: bool
    filesystem: str
    network: bool
    free_bytes: int
    problem: str = ""
    """Why nothing can be written there."""


@dataclass(frozen=True, slots=True)
class LaunchFile:
    """The accelerate configuration in force, and the DeepSpeed file that it names."""

    path: str
    settings: Mapping[str, Any]
    deepspeed_path: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was gathered on one node."""

    host: str
    python: tuple[int, int]
    packages: Mapping[str, tuple[str, str]]
    """Name -> (required versions, installed version or nothing)."""
    torch_cuda: str
    """CUDA version that PyTorch was built for; empty for a CPU build."""
    driver: str
    """The GPU driver as nvidia-smi tells it; empty without one."""
    driver_gpus: int
    """GPUs that the driver lists, whether PyTorch sees them or not."""
    gpus: tuple[Gpu, ...]
    nccl: str
    nvcc: str
    """CUDA version of the compiler in the path; empty without one."""
    compiler: str
    """First line of `c++ --version`; empty without one."""
    python_headers: bool
    ninja: bool
    libaio: bool
    ops: tuple[CompiledOp, ...]
    launch: LaunchFile
    memlock_bytes: float
    """What may be locked in memory; infinite where unlimited."""
    infiniband: bool
    shared_memory_bytes: int
    links: tuple[str, ...]
    """How pairs of GPUs are connected, each kind once, as in `nvidia-smi topo -m`."""
    folders: tuple[Folder, ...]
    accelerate_variables: Mapping[str, str]
    dtype: str = ""
    """model.dtype of the recipe, if one was given."""
    missing_trackers: tuple[str, ...] = ()
    """What is wrong with track.to, a line each."""
    nodes: int = 1


def examine(facts: Facts) -> list[Finding]:
    """All findings on one node, in the order of the table."""
    return [
        *_python(facts),
        *_gpus(facts),
        *_precision(facts),
        *_ops(facts),
        *_launch(facts),
        *_memory(facts),
        *map(_folder, facts.folders),
        *_topology(facts),
        *_trackers(facts),
    ]


def would_start(findings: Sequence[Finding]) -> bool:
    """Whether training would start, as far as that is up to the machine."""
    return all(finding.severity != "error" for finding in findings)


def _python(facts: Facts) -> Iterator[Finding]:
    lowest, highest = PYTHONS
    text = ".".join(map(str, facts.python))
    if lowest <= facts.python <= highest:
        yield Finding("ok", "Python", text)
    else:
        yield Finding("error", "Python", f"{text}; 3.10 to 3.13 are supported", "python3.12 -m venv .venv")
    fine = []
    for name, (wanted, installed) in facts.packages.items():
        mend = f"pip install '{name}{wanted}'"
        if not installed:
            yield Finding("error", "packages", f"{name} is not installed", mend)
        elif not SpecifierSet(wanted).contains(installed, prereleases=True):
            # Checkpoints read DeepSpeed's private state, and refuse versions that they were not verified with.
            severity: Severity = "error" if name == "deepspeed" else "warning"
            yield Finding(severity, "packages", f"{name} {installed}; verified is {wanted}", mend)
        elif name in ("torch", "transformers", "deepspeed", "accelerate"):
            fine.append(f"{name} {installed}")
    if fine:
        yield Finding("ok", "packages", ", ".join(fine))


def _gpus(facts: Facts) -> Iterator[Finding]:
    if facts.gpus:
        names = {gpu.name for gpu in facts.gpus}
        memory = min(gpu.memory_bytes for gpu in facts.gpus) / GIB
        yield Finding("ok", "GPUs", f"{len(facts.gpus)} x {' and '.join(sorted(names))}, {memory:.0f} GiB")
        yield Finding("ok", "CUDA", f"{facts.torch_cuda}, driver {facts.driver or '?'}, NCCL {facts.nccl or '?'}")
        if len(names) > 1:
            yield Finding("warning", "GPUs", "of several kinds: the slowest sets the pace, the smallest the batch")
        if not (facts.compiler and facts.python_headers):
            lacking = "headers of this Python" if facts.compiler else "C compiler"
            found = (
                f"no {lacking}: a step takes longer without Triton's kernels, and FlexAttention (float32) does not run"
            )
            yield Finding("warning", "Triton", found, "apt-get install g++ python3-dev")
    elif facts.driver_gpus and not facts.torch_cuda:
        found = f"{facts.driver_gpus} here, and this PyTorch is built for CPUs alone"
        yield Finding("error", "GPUs", found, "pip install --force-reinstall torch")
    elif facts.driver_gpus:
        found = f"{facts.driver_gpus} here, and PyTorch for CUDA {facts.torch_cuda} sees none (driver {facts.driver})"
        yield Finding("error", "GPUs", found, "unset CUDA_VISIBLE_DEVICES, or install a driver for that CUDA version")
    else:
        found = "none: training runs on CPU processes, for trying things out"
        yield Finding("warning", "GPUs", found, "accelerate launch --config_file launch/zero3_cpu.yaml ...")


def _precision(facts: Facts) -> Iterator[Finding]:
    if facts.dtype == "float16" and not facts.gpus:
        yield Finding("error", "model.dtype", "float16 does not run on CPUs", "model.dtype=float32")
    elif facts.dtype == "bfloat16" and facts.gpus and not all(gpu.bf16 for gpu in facts.gpus):
        yield Finding("error", "model.dtype", "bfloat16 does not run on these GPUs", "model.dtype=float16")
    elif facts.dtype == "bfloat16" and not facts.gpus:
        yield Finding("warning", "model.dtype", "bfloat16 is slow on most CPUs", "model.dtype=float32")
    elif facts.dtype:
        yield Finding("ok", "model.dtype", facts.dtype)


def _ops(facts: Facts) -> Iterator[Finding]:
    if not facts.ops:
        yield Finding("ok", "compiled ops", "none needed")
    if all(op.built for op in facts.ops):
        tools = []
    else:
        tools = [
            (bool(facts.compiler), "no C++ compiler", "apt-get install g++"),
            (facts.python_headers, "no headers of this Python", "apt-get install python3-dev"),
            (facts.ninja, "ninja is missing", "pip install ninja"),
        ]
    lacking = [(what, mend) for there, what, mend in tools if not there]
    for what, mend in lacking:
        names = ", ".join(op.name for op in facts.ops if not op.built)
        yield Finding("error", "compiled ops", f"{what}, and DeepSpeed compiles {names} at the first start", mend)
    for op in facts.ops:
        if op.built:
            yield Finding("ok", "compiled ops", f"{op.name} ({op.purpose}): compiled already")
        elif op.name == ASYNC_IO and not (op.compatible and facts.libaio):
            found = f"{op.name} ({op.purpose}) needs libaio and its headers"
            yield Finding("error", "compiled ops", found, "apt-get install libaio-dev")
        elif op.name == ASYNC_IO and facts.gpus and _major(facts.nvcc) != _major(facts.torch_cuda):
            found = f"{op.name} links with CUDA {facts.torch_cuda}, and nvcc is {facts.nvcc or 'missing'}"
            yield Finding("error", "compiled ops", found, f"install the CUDA {facts.torch_cuda} toolkit, set CUDA_HOME")
        elif not op.compatible:
            yield Finding("error", "compiled ops", f"{op.name} ({op.purpose}) cannot be compiled here", "ds_report")
        elif not lacking:
            found = f"{op.name} ({op.purpose}): will be compiled, a minute or two"
            yield Finding("ok", "compiled ops", f"{found}; {facts.compiler}")


def _major(version: str) -> str:
    return version.partition(".")[0]


def _launch(facts: Facts) -> Iterator[Finding]:
    launch, settings = facts.launch, facts.launch.settings
    for problem in launch.problems:
        yield Finding("error", "accelerate", problem, "accelerate launch --config_file launch/zero3.yaml ...")
    for line in out_of_place(facts.accelerate_variables):
        found, _, mend = line.partition("; ")
        yield Finding("error", "accelerate", found, mend)
    if launch.problems:
        return
    processes, machines = settings.get("num_processes") or 1, settings.get("num_machines") or 1
    here = processes // max(1, machines)
    text = f"{launch.path}: {counted(processes, 'process', 'processes')} on {counted(machines, 'machine')}"
    if facts.gpus and here > len(facts.gpus):
        mend = f"--num_processes {len(facts.gpus) * machines}"
        yield Finding("warning", "accelerate", f"{text}, and this node has {counted(len(facts.gpus), 'GPU')}", mend)
    elif facts.gpus and here < len(facts.gpus):
        mend = f"--num_processes {len(facts.gpus) * machines}"
        yield Finding("warning", "accelerate", f"{text}: {len(facts.gpus) - here} GPUs of this node stay idle", mend)
    else:
        yield Finding("ok", "accelerate", f"{text}, {launch.deepspeed_path}")


def _memory(facts: Facts) -> Iterator[Finding]:
    unlimited = math.isinf(facts.memlock_bytes)
    limit = "unlimited" if unlimited else f"{facts.memlock_bytes / 2**20:,.0f} MiB"
    if facts.infiniband and not unlimited:
        found = f"{limit}, and InfiniBand registers the buffers of NCCL in locked memory"
        mend = "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK in slurm.conf)"
        yield Finding("error" if facts.nodes > 1 else "warning", "locked memory", found, mend)
    else:
        yield Finding("ok", "locked memory", limit)
    size = f"{facts.shared_memory_bytes / GIB:.1f} GiB free in /dev/shm"
    if facts.shared_memory_bytes < SMALLEST_SHARED_MEMORY:
        mend = "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm"
        yield Finding("warning", "shared memory", f"{size}; ranks exchange data there", mend)
    else:
        yield Finding("ok", "shared memory", size)


def _folder(folder: Folder) -> Finding:
    kind = f"{folder.filesystem}, {'network' if folder.network else 'local'}"
    text = f"{folder.path} ({kind}, {folder.free_bytes / GIB:,.0f} GiB free)"
    topic = folder.purpose
    if folder.problem:
        return Finding("error", topic, f"{folder.path}: {folder.problem}", f"another folder for {topic}")
    if folder.free_bytes < LEAST_FREE_BYTES:
        return Finding("error", topic, f"{text}: full", f"free space, or another folder for {topic}")
    if folder.should_be_local and folder.network:
        mend = f"a folder on a local disk for {topic}"
        return Finding("warning", topic, f"{text}: nodes wait for each other's locks there", mend)
    if folder.free_bytes < FEW_FREE_BYTES:
        return Finding("warning", topic, f"{text}: little", f"free space, or another folder for {topic}")
    return Finding("ok", topic, text)


def _topology(facts: Facts) -> Iterator[Finding]:
    if len(facts.gpus) < 2 or not facts.links:
        return
    slow = [link for link in facts.links if not link.startswith("NV")]
    text = f"links between GPUs: {', '.join(facts.links)}"
    if slow and len(slow) < len(facts.links):
        yield Finding("warning", "topology", f"{text}: some pairs have no NVLink", "nvidia-smi topo -m")
    else:
        yield Finding("ok", "topology", text)


def _trackers(facts: Facts) -> Iterator[Finding]:
    for line in facts.missing_trackers:
        found, _, mend = line.partition(": ")
        yield Finding("error", "track.to", found, mend)


# --- several nodes


@dataclass(frozen=True, slots=True)
class Node:
    """What a node tells the first one."""

    host: str
    versions: Mapping[str, str]
    """What must be equal on all nodes."""
    findings: tuple[Finding, ...]
    clock_offset: float
    """Seconds ahead of the first node's clock."""
    clock_uncertainty: float
    sees_output_dir: bool
    """Whether it sees what the first node put into run.output_dir."""


def compare(nodes: Sequence[Node]) -> list[Finding]:
    """Findings on the nodes together: those that all share once, others with their host, and what differs."""
    hosts: dict[Finding, list[str]] = {}
    for node in nodes:
        for finding in node.findings:
            hosts.setdefault(finding, []).append(node.host)
    found = [
        finding
        if len(where) == len(nodes)
        else Finding(finding.severity, finding.topic, f"{', '.join(where)}: {finding.found}", finding.remedy)
        for finding, where in hosts.items()
    ]
    return [*found, *_across(nodes)] if len(nodes) > 1 else found


def _across(nodes: Sequence[Node]) -> Iterator[Finding]:
    first = nodes[0]
    for name, value in first.versions.items():
        others = [f"{node.versions.get(name)} on {node.host}" for node in nodes if node.versions.get(name) != value]
        if others:
            found = f"{name} differs: {value} on {first.host}, {', '.join(others)}"
            yield Finding("error", "nodes", found, "the same environment on every node")
    blind = [node.host for node in nodes if not node.sees_output_dir]
    if blind:
        found = f"{', '.join(blind)} do not see what {first.host} writes there"
        yield Finding("error", "run.output_dir", found, "a folder on a file system that all nodes share")
    skewed = [node for node in nodes if abs(node.clock_offset) - node.clock_uncertainty > MOST_CLOCK_SKEW]
    for node in skewed:
        found = f"{node.host} is {node.clock_offset:+.1f} s off {first.host}"
        yield Finding("warning", "clocks", found, "systemctl restart chronyd (or ntpd) on that node")
    if not skewed:
        largest = max(abs(node.clock_offset) for node in nodes)
        known_to = max(node.clock_uncertainty for node in nodes)
        found = f"{len(nodes)} nodes within {1000 * largest:.0f} ms, known to {1000 * known_to:.0f} ms"
        yield Finding("ok", "clocks", found)
