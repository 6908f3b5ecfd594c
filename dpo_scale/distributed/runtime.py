"""Ranks and the collectives that the rest of the program may use, started by `accelerate launch`."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, ProjectConfiguration

from dpo_scale.distributed import exchange, launch_environment, zero_config
from dpo_scale.distributed.build_locks import own_ninja_first, wait_for_builds
from dpo_scale.distributed.nvme_folders import hold, own_folder
from dpo_scale.distributed.ops import extensions_folder, leave_out_unused_ops, load_muon_uncompiled, needed_ops
from dpo_scale.distributed.patience import work_and_wait
from dpo_scale.errors import RecipeError
from dpo_scale.recipe import Recipe
from dpo_scale.shipped_files import shipped_file

T = TypeVar("T")

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=60)
"""Longest wait in a collective; work that may take longer is waited for outside of them (patience.py)."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and the collectives. Every method that is not a property is called by all ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_local_mains(self, work: Callable[[], None]) -> None:
        """Work that one rank of every machine does while the others wait, however long it takes."""
        flags = self.gather_objects(self.is_local_main)
        workers = [rank for rank, is_local_main in enumerate(flags) if is_local_main]
        store = dist.distributed_c10d._get_default_store()
        work_and_wait(store, self.rank, workers, work)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on this rank's device, written into it."""
        dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The maximum over ranks of a tensor on this rank's device, written into it."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values


@dataclass(frozen=True)
class Runtime:
    """A started process group with both DeepSpeed plugins."""

    accelerator: Accelerator
    ranks: Ranks


def start(recipe: Recipe, say: Callable[[str], None] = logger.warning) -> Runtime:
    """Join the process group and set up Accelerate with one DeepSpeed plugin a role.

    Raises UserError where the launcher or the device cannot do what the recipe asks.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # torch and Accelerate would still put tensors on a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    policy_path = launch_environment.policy_config_path(os.environ)
    launch_environment.check_launcher(os.environ, policy_path)
    policy = zero_config.fit_to_node(
        zero_config.policy_config(zero_config.read_policy_config(policy_path), recipe),
        policy_path,
        own_folder=own_folder(recipe.run.output_dir, "policy"),
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    reference = zero_config.reference_config(
        zero_config.read_config(shipped_file(zero_config.reference_file(recipe.reference.offload))), recipe
    )
    for folder in zero_config.nvme_folders(policy, reference):
        hold(folder.parent)
    if ops := needed_ops(policy, recipe.reference.offload):
        own_ninja_first()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            wait_for_builds(extensions_folder(), ops, say)
    leave_out_unused_ops()
    load_muon_uncompiled()
    # Without a named backend Accelerate believes, on CPUs, that every rank is alone.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        _keep_one_heap()
        _ask_for_huge_pages()
        _keep_few_kernels()
        _compute_in_parallel_only_here()
    launch_environment.forget(os.environ)
    accelerator = Accelerator(
        deepspeed_plugins={
            "policy": DeepSpeedPlugin(hf_ds_config=policy),
            "reference": DeepSpeedPlugin(hf_ds_config=reference),
        },
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)],
        step_scheduler_with_optimizer=False,
        log_with=_trackers(recipe) or None,
        project_config=ProjectConfiguration(
            project_dir=recipe.run.output_dir, logging_dir=str(Path(recipe.run.output_dir) / "trackers")
        ),
    )
    assert accelerator.num_processes == dist.get_world_size(), "Accelerate and torch disagree"
    if backend == "gloo":
        exchange.use_for_zero()
    _check_precision(recipe)
    ranks = Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        device=accelerator.device,
    )
    return Runtime(accelerator, ranks)


_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def _keep_one_heap() -> None:
    """Let all threads of this process share one heap.

    glibc gives threads heaps of their own, and what is freed in one serves no other: of 713 MiB of a rank on CPUs (six
    layers of 256, two ranks) 25 went to those of gloo's and autograd's threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such heaps
        mallopt(_M_ARENA_MAX, 1)


def _ask_for_huge_pages() -> None:
    """Have torch ask for huge pages for its tensors from 2 MiB on, unless the environment says otherwise.

    The buffers of a large vocabulary are taken from the system anew in every step, and it hands them out page by page:
    at 128,256 tokens two ranks on CPUs took 22 to 25% less time a step with pages of 2 MiB, and no more memory. torch
    reads this once, at the first tensor on the CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _keep_few_kernels() -> None:
    """Have oneDNN keep the kernels of a layer or two, unless the environment says otherwise.

    It keeps 1,024 by default, a kernel for each shape, and every micro-batch has another number of tokens: nobody comes
    back to them. In 40 steps (six layers of 256, two ranks) they cost a rank 270 MiB, and no step was quicker.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def _compute_in_parallel_only_here() -> None:
    """Let only operations of this thread use several cores: those of other threads take one, as they copy little.

    OpenMP gives each thread that computes a team of its own. Once a process has more threads in teams than there are
    cores, GNU's lets a team sleep after every operation instead of waiting for the next: gloo's threads and the one
    that reads ahead made a step of one process with two threads take 15 to 17% longer (six layers of 256). A thread
    takes torch's number at its first operation, so set it by a thread that leaves, after this one has taken its own.
    """
    torch.get_num_threads()
    leaving = threading.Thread(target=torch.set_num_threads, args=(1,))
    leaving.start()
    leaving.join()


def default_launch_file() -> str | None:
    """The configuration that `accelerate launch` takes where none is named, if there is one."""
    return str(default_config_file) if Path(default_config_file).is_file() else None


def missing_trackers(names: list[str]) -> list[str]:
    """What is wrong with names in track.to, a line each: trackers that are not installed, or that nobody knows."""
    usable = {"jsonl", *(str(tracker) for tracker in get_available_trackers())}
    lines = []
    for name in names:
        if name in LOGGER_TYPE_TO_CLASS and name not in usable:
            lines.append(f"{name} is not installed here: pip install {name.replace('_', '-')}")
        elif name not in usable:
            known = ", ".join(sorted({"jsonl", *LOGGER_TYPE_TO_CLASS}))
            lines.append(f"{name!r} is no tracker; there are {known}")
    return lines


def _trackers(recipe: Recipe) -> list[str]:
    """Names of the trackers beside metrics.jsonl. Raises RecipeError for one that cannot be used here."""
    missing = missing_trackers(recipe.track.to)
    if missing:
        raise RecipeError("\n".join(f"track.to: {line}" for line in missing))
    return [name for name in recipe.track.to if name != "jsonl"]


def _check_precision(recipe: Recipe) -> None:
    from deepspeed.accelerator import get_accelerator

    if recipe.model.dtype == "float16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("model.dtype: float16 is not supported by this device; use bfloat16 or float32")
    if recipe.model.dtype == "bfloat16" and not get_accelerator().is_bf16_supported():
        raise RecipeError("model.dtype: bfloat16 is not supported by this device; use float16")
