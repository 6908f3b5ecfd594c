"""Trains tiny Llamas under ZeRO-3 on CPU ranks and writes what happened as JSON; started by torchrun.

Usage: checkpoint_worker.py FOLDER VARIANT [VARIANT ...]

On two ranks each variant is trained to step 6 with a checkpoint at step 3, then restored and trained again; on other
numbers of ranks it is only restored and trained from step 3 on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from plain_async_io import stand_in_where_libaio_is_absent
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dpo_scale.distributed import engine_state, exchange
from dpo_scale.distributed.ops import leave_out_unused_ops
from dpo_scale.distributed.runtime import Ranks
from dpo_scale.errors import UserError
from dpo_scale.training import checkpoints, export
from dpo_scale.training.checkpoints import CheckpointError, RunState, digest_of
from dpo_scale.training.stored_state import StoredState, check_fits

SEQUENCES, LENGTH, VOCABULARY = 6, 11, 67
CHECKPOINT_STEP, LAST_STEP = 3, 6

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "offload": {"offload": True},
    "persistent_tied": {"persistence": 10_000_000, "tied": True, "dtype": "bfloat16"},
    "sub_groups_hpz": {"dtype": "bfloat16", "sub_group_size": 3000, "hpz": True},
    "cpu_adam": {"offload": True, "cpu_adam": True},
    "shards": {"hidden": 510, "intermediate": 1400, "layers": 7},
    "nvme": {"nvme": True, "sub_group_size": 300_000},
}


class NextToken(nn.Module):
    """Sum of the cross-entropies of some sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def make_source(folder: Path, settings: dict[str, Any]) -> None:
    """A random model folder with odd sizes, so that shards are padded."""
    torch.manual_seed(0)
    hidden = 3072 if settings.get("nvme") else settings.get("hidden", 21)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=settings.get("intermediate", 33),
        num_hidden_layers=settings.get("layers", 2),
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=settings.get("tied", False),
    )
    model = LlamaForCausalLM(config).to(getattr(torch, settings.get("dtype", "float32")))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")  # all that an export asks of a tokenizer


def make_engine(folder: Path, settings: dict[str, Any]) -> Any:
    dtype = settings.get("dtype", "float32")
    world_size = dist.get_world_size()
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": settings.get("persistence", 0),
        "reduce_bucket_size": 500,
        "stage3_prefetch_bucket_size": 500,
        "sub_group_size": settings.get("sub_group_size", 1_000_000_000),
    }
    if settings.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if settings.get("nvme"):
        zero["offload_optimizer"] = {
            "device": "nvme",
            "nvme_path": str(folder / f"swap_{world_size}"),
            "buffer_count": 4,
            "pin_memory": False,
        }
    if settings.get("hpz") and world_size % 2 == 0:
        zero["zero_hpz_partition_size"] = 2
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an earlier engine
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained builds sharded models
    model = NextToken(AutoModelForCausalLM.from_pretrained(folder / "source", dtype=getattr(torch, dtype)))
    decayed = [parameter for parameter in model.parameters() if len(parameter.ds_shape) == 2]
    spared = [parameter for parameter in model.parameters() if len(parameter.ds_shape) == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": spared, "weight_decay": 0.0}]
    if settings.get("cpu_adam"):
        optimizer: Any = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    del keep
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Steps [first, last); step n's sequences follow from n and are shared out over the ranks."""
    losses = []
    for step in range(first, last):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
        mine = tokens[dist.get_rank() :: dist.get_world_size()]
        loss = engine(mine)
        engine.backward(loss * dist.get_world_size() / SEQUENCES, scale_wrt_gas=False)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / SEQUENCES)
    return losses


def digest(engine: Any) -> str:
    """Of every fp32 master and moment, through DeepSpeed's own public functions."""
    sha = hashlib.sha256()
    for parameter in engine.module.parameters():
        for read in (
            deepspeed.utils.safe_get_full_fp32_param(parameter),
            deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg"),
            deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        ):
            sha.update(read.contiguous().numpy().tobytes())
    return sha.hexdigest()


def save_masters(engine: Any, path: Path) -> None:
    """Whole masters and moments by name, as DeepSpeed's own functions give them."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix("model.")
        tensors[f"{name}.master"] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            state = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            tensors[f"{name}.{key}"] = state.clone()
    if dist.get_rank() == 0:
        torch.save(tensors, path)
    dist.barrier()


def first_moments(engine: Any) -> list[float]:
    """Norm of each parameter's first moment: tells which state belongs to which parameter."""
    return [
        deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg").norm().item()
        for parameter in engine.module.parameters()
    ]


def uses_secondary_shards(engine: Any) -> bool:
    return any(parameter.ds_secondary_tensor is not None for parameter in engine.module.parameters())


def refusals(engine: Any) -> dict[str, str]:
    """What is said to engines whose state checkpoints cannot hold."""
    messages = {}

    def note(name: str) -> None:
        try:
            list(engine_state.snapshot(engine).read_slices())
        except UserError as error:
            messages[name] = str(error)

    parameter, zero = engine.module.model.model.norm.weight, engine.optimizer
    parameter.requires_grad_(False)
    note("frozen")
    parameter.requires_grad_(True)
    adam, zero.optimizer = zero.optimizer, torch.optim.SGD([torch.zeros(1)])
    note("sgd")
    zero.optimizer = adam
    groups = zero.__dict__.pop("fp16_groups")
    note("private_names")
    zero.fp16_groups = groups
    return messages


def logits(engine: Any) -> list[list[float]]:
    generator = torch.Generator().manual_seed(99)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    with torch.no_grad():
        values: list[list[float]] = engine.module.model(input_ids=tokens).logits[:, -1].tolist()
    return values


def save(engine: Any, folder: Path, step: int, ranks: Ranks, **changes: Any) -> Path:
    state = replace(engine_state.snapshot(engine), **changes)
    return checkpoints.save(
        folder / "checkpoints",
        state,
        RunState(step=step, pairs=step * SEQUENCES),
        ranks,
        trajectory={"of": "the worker"},
        source_model=str(folder / "source"),
    )


def restored(folder: Path, settings: dict[str, Any], ranks: Ranks) -> Any:
    engine = make_engine(folder, settings)
    found, passed_over = checkpoints.find_checkpoint(folder / "checkpoints", "auto", ranks)
    assert found is not None, passed_over
    assert found.step == CHECKPOINT_STEP
    train(engine, 0, 1)  # nothing of this step may survive what follows: gathered parameters,
    if settings.get("hpz"):  # optimizer state, and the secondary shards that a forward leaves
        logits(engine)
    check_fits(found, engine_state.snapshot(engine).parameters)
    with StoredState(found) as stored:
        stored.restore_random_state(ranks)
        engine_state.restore(engine, stored.read, stored.buffers(), found.commit.counters)
    return engine


def failing_write(engine: Any, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The last rank's disk fills up in the middle of its slices."""
    healthy = engine_state.snapshot(engine).read_slices

    def read_slices() -> Any:
        for number, piece in enumerate(healthy()):
            if number == 4 and ranks.rank == ranks.world_size - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield piece

    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    message = ""
    try:
        save(engine, folder, LAST_STEP, ranks, read_slices=read_slices)
    except CheckpointError as error:
        message = str(error)
    dist.barrier()
    after = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"messages": ranks.gather_objects(message), "before": before, "after": after}


SHARD_BYTES = 16_000_000


def export_memory(folder: Path, settings: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What exporting a model of several shards adds to the memory of each rank, at its peak, in shards."""
    if ranks.is_main:
        make_source(folder / "source", settings)
    dist.barrier()
    engine = make_engine(folder, settings)
    train(engine, 0, 1)
    model_folder = export.ModelFolder(folder / "source", digest_of({"of": "the worker"}))

    def to(name: str) -> None:
        export.export_engine(engine, folder / name, model_folder, ranks, step=1, max_shard_bytes=SHARD_BYTES)

    to("warm_up")
    peaks = []
    for name in ("live", "again"):
        Path("/proc/self/clear_refs").write_text("5")  # begins another peak
        before = memory("VmRSS")
        to(name)
        peaks.append((memory("VmHWM") - before) / SHARD_BYTES)
    live = ranks.gather_objects(min(peaks))  # what else a process takes meanwhile comes on top, not every time
    path = save(engine, folder, 1, ranks)
    if ranks.is_main:
        export.export_checkpoint(path, folder / "offline", model_folder, max_shard_bytes=SHARD_BYTES)
    dist.barrier()
    engine.destroy()
    return {"peak_in_shards": live, "shards": len(list((folder / "live").glob("*.safetensors")))}


def memory(field: str) -> int:
    """Bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def run(variant: str, root: Path, ranks: Ranks) -> dict[str, Any]:
    settings, folder = VARIANTS[variant], root / variant
    report: dict[str, Any] = {}
    if variant == "shards":
        return export_memory(folder, settings, ranks)
    if ranks.world_size == 2:
        if ranks.is_main:
            make_source(folder / "source", settings)
        dist.barrier()
        engine = make_engine(folder, settings)
        train(engine, 0, CHECKPOINT_STEP)
        path = save(engine, folder, CHECKPOINT_STEP, ranks)
        save_masters(engine, folder / "masters.pt")
        report["logits"] = logits(engine)
        report["secondary_after_forward"] = uses_secondary_shards(engine)
        model_folder = export.ModelFolder(folder / "source", digest_of({"of": "the worker"}))
        export.export_engine(
            engine,
            folder / "live",
            model_folder,
            ranks,
            step=CHECKPOINT_STEP,
            max_shard_bytes=8_000,
        )
        if ranks.is_main:
            export.export_checkpoint(path, folder / "offline", model_folder, max_shard_bytes=8_000)
        dist.barrier()
        report["losses"] = train(engine, CHECKPOINT_STEP, LAST_STEP)
        report["digest"] = digest(engine)
        report["first_moments"] = first_moments(engine)
        report["failing_write"] = failing_write(engine, folder, ranks)
        report["refusals"] = refusals(engine)
        engine.destroy()
    engine = restored(folder, settings, ranks)
    report["restored_logits"] = logits(engine)
    report["counters"] = [engine.global_steps, engine.skipped_steps]
    report["restored_losses"] = train(engine, CHECKPOINT_STEP, LAST_STEP)
    report["restored_digest"] = digest(engine)
    if ranks.world_size != 2:
        report["first_moments"] = first_moments(engine)
    engine.destroy()
    return report


def main() -> None:
    root, variants = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    leave_out_unused_ops()
    stand_in_where_libaio_is_absent()
    deepspeed.init_distributed("gloo")
    exchange.use_for_zero()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    for variant in variants:
        report = run(variant, root, ranks)
        if ranks.is_main:
            (root / f"{variant}_{ranks.world_size}.json").write_text(json.dumps(report, indent=1))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the program's ranks: threads of libraries that outlive the interpreter may abort it


if __name__ == "__main__":
    main()
