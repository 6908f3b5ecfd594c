"""The facts of this machine: everything the doctor asks of files, commands and PyTorch. No judgement here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from packaging.requirements import Requirement

from dpo_scale.distributed.launch_environment import OUT_OF_PLACE, check_launcher, environment_of
from dpo_scale.distributed.ops import extensions_folder, needed_ops, probe_ops
from dpo_scale.distributed.runtime import default_launch_file, missing_trackers
from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.errors import UserError
from dpo_scale.operations.findings import Facts, Folder, Gpu, LaunchFile
from dpo_scale.recipe import Recipe, reference_cache_dir, tokens_cache_dir
from dpo_scale.shipped_files import shipped_file

NETWORK_FILESYSTEMS = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "pvfs2", "orangefs"),
    *("wekafs", "panfs", "glusterfs", "fuse.sshfs", "fuse.juicefs", "fuse.glusterfs"),
)
COMMAND_SECONDS = 20


def gather_facts(recipe: Recipe | None, config_file: str | None, nodes: int) -> Facts:
    """Look at this machine, as a run of the recipe would find it; with no recipe, as a run of the defaults would."""
    gpus = tuple(_gpus())
    launch = launch_file(config_file, on_gpu=bool(gpus))
    policy: dict[str, Any] = {}
    try:
        policy = read_policy_config(Path(launch.deepspeed_path)) if launch.deepspeed_path else {}
    except UserError as error:
        launch = LaunchFile(launch.path, launch.settings, launch.deepspeed_path, (*launch.problems, str(error)))
    offload = recipe.reference.offload if recipe else "cpu"
    driver = _lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Facts(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        python=sys.version_info[:2],
        packages=dict(_packages()),
        torch_cuda=torch.version.cuda or "",
        driver=driver[0] if driver else "",
        driver_gpus=len(driver),
        gpus=gpus,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus and torch.distributed.is_nccl_available() else "",
        nvcc=_found(r"release (\d+\.\d+)", "\n".join(_lines("nvcc", "--version"))),
        compiler=next(iter(_lines(os.environ.get("CXX", "c++"), "--version")), ""),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        ninja=shutil.which("ninja") is not None or _is_installed("ninja"),
        libaio=_has_header("libaio.h"),
        ops=probe_ops(needed_ops(policy, offload)),
        launch=launch,
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK),
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        links=_links(_lines("nvidia-smi", "topo", "-m")),
        folders=tuple(_folders(recipe)),
        accelerate_variables={name: os.environ[name] for name in OUT_OF_PLACE if name in os.environ},
        dtype=recipe.model.dtype if recipe else "",
        missing_trackers=tuple(missing_trackers(recipe.track.to)) if recipe else (),
        nodes=nodes,
    )


def versions(facts: Facts) -> dict[str, str]:
    """What must be equal on all nodes of a job."""
    installed = {name: version for name, (_, version) in facts.packages.items()}
    kinds = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
    gpus = f"{len(facts.gpus)} x {kinds}" if facts.gpus else "none"
    return {**installed, "Python": ".".join(map(str, facts.python)), "CUDA driver": facts.driver, "GPUs": gpus}


# --- software


def _packages() -> Iterator[tuple[str, tuple[str, str]]]:
    """This package's requirements without extras, and what is installed of them."""
    for text in importlib.metadata.requires("dpo_scale") or ():
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            try:
                installed = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                installed = ""
            yield wanted.name, (str(wanted.specifier), installed)


def _is_installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def _gpus() -> Iterator[Gpu]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Gpu(found.name, found.total_memory, bf16=found.major >= 8)


def _lines(*command: str) -> list[str]:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _has_header(name: str) -> bool:
    """Whether the C++ compiler finds a header."""
    command = [os.environ.get("CXX", "c++"), "-E", "-x", "c++", "-include", name, "/dev/null"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def launch_file(named: str | None, *, on_gpu: bool) -> LaunchFile:
    """The accelerate configuration that was named, else the user's default, else the shipped one for this machine."""
    path = named or default_launch_file() or str(shipped_file(f"launch/zero3{'' if on_gpu else '_cpu'}.yaml"))
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return LaunchFile(path, {}, "", (f"{path}: cannot be read: {error}",))
    if not isinstance(settings, dict) or settings.get("distributed_type") != "DEEPSPEED":
        return LaunchFile(path, {}, "", (f"{path}: not a configuration for DeepSpeed",))
    deepspeed = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if not deepspeed:
        return LaunchFile(path, settings, "", (f"{path}: deepspeed_config.deepspeed_config_file is missing",))
    if not Path(deepspeed).exists():
        try:
            deepspeed = str(shipped_file(deepspeed))
        except UserError as error:
            return LaunchFile(path, settings, "", (f"{path}: {error}",))
    try:
        check_launcher(environment_of(settings), Path(deepspeed))
    except UserError as error:
        return LaunchFile(path, settings, deepspeed, tuple(f"{path}: {line}" for line in str(error).splitlines()))
    return LaunchFile(path, settings, deepspeed, ())


# --- hardware


def _limit(which: int) -> float:
    soft, _ = resource.getrlimit(which)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def _links(topology: list[str]) -> tuple[str, ...]:
    """Kinds of connection between two GPUs, from the matrix of `nvidia-smi topo -m`: NV18, NODE, SYS, ..."""
    rows = [line.split() for line in topology if re.match(r"GPU\d+\s", line)]
    gpus = [row for row in rows if "X" in row]  # the header repeats the names and has no X
    cells = {cell for row in gpus for cell in row[1 : 1 + len(gpus)]} - {"X"}
    return tuple(sorted(cells))


def _folders(recipe: Recipe | None) -> Iterator[Folder]:
    if recipe is not None:
        yield _folder("run.output_dir", Path(recipe.run.output_dir))
        if recipe.reference.nvme_path:
            yield _folder("reference.nvme_path", Path(recipe.reference.nvme_path), should_be_local=True)
    yield _folder("reference.cache_dir", reference_cache_dir(recipe))
    yield _folder("data.cache_dir", tokens_cache_dir(recipe.data if recipe else None))
    yield _folder("TORCH_EXTENSIONS_DIR", extensions_folder(), should_be_local=True)


def _folder(purpose: str, path: Path, *, should_be_local: bool = False) -> Folder:
    """Facts of a folder that may not be there yet: those of its nearest parent that is."""
    path = path.absolute()
    existing = nearest_existing(path)
    filesystem = _filesystem(existing, Path("/proc/self/mounts").read_text(encoding="utf-8"))
    network = filesystem in NETWORK_FILESYSTEMS
    free_bytes = shutil.disk_usage(existing).free
    return Folder(purpose, str(path), should_be_local, filesystem, network, free_bytes, why_not_writable(path))


def why_not_writable(path: Path) -> str:
    """What keeps a run from making a folder or writing into it; empty if nothing does."""
    existing = nearest_existing(path.absolute())
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} may not be written to"
    return ""


def nearest_existing(path: Path) -> Path:
    """An absolute path, or the nearest of its parents that is there."""
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


def _filesystem(path: Path, mounts: str) -> str:
    """Type of the file system under a path, from the lines of /proc/self/mounts; the last mount of a place wins."""
    path, best, kind = path.resolve(), -1, "unknown"
    for line in mounts.splitlines():
        _, place, name, *_ = line.split(" ")
        mounted = Path(place.replace("\\040", " "))
        if path.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), name
    return kind
