"""Peak memory that `dpo-scale plan` predicts against what real ZeRO-3 training takes, for a few shapes.

    python tests/benchmarks/plan_error.py [--shapes wide ...] [--device cpu|cuda] [--processes 2] [--json FILE]

The trainer's own `train` stage runs three steps of random pairs on real processes. Measured is the most memory of a
rank above what it held before the policy was loaded: resident (VmHWM) on CPUs, where the allocator is told to give
large tensors back at once, and `torch.cuda.max_memory_allocated` on GPUs. Loading, the start-up check of the layout and
the steps are measured apart. `training_step.py` says on GPUs what is planned and measured for models of 1B and 3B.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import Machine, console, free_port, show, work_folder, write_json
from measuring import MIB, memory_mib, peak_memory_mib, reset_peak_memory
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from workload import Settings, make_job, make_pairs, train_tokenizer_of_words, words

from dpo_scale.data.layouts import Layout
from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.operations.memory import CPU, GPU, training_moments
from dpo_scale.operations.memory_trace import build_meta_model, micro_batch_shape
from dpo_scale.operations.zero_memory import GRADIENT_BYTES, MOMENTS_BYTES, ZeroSettings, parameters_of, shard_elements
from dpo_scale.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS, STEP_PAIRS = 3, 4
PHASES = ("loading", "layout check", "steps")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and the micro-batches it is trained on."""

    hidden: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int
    tied: bool = False
    checkpointing: bool = False
    layout: Layout = "shared"
    deepspeed: str = "zero3.json"


SHAPES = {
    "deep": Shape(512, 8, 8000, 8, 8),
    "deep, checkpointed": Shape(512, 8, 8000, 8, 8, checkpointing=True),
    "wide head": Shape(512, 2, 32000, 8, 8),
    "wide head, tied": Shape(512, 2, 48000, 8, 8, tied=True),
    "grouped queries, packed": Shape(640, 4, 8000, 10, 2, layout="packed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPE_BYTES), help="default: float32 on CPUs, bfloat16 on GPUs")
    parser.add_argument("--json", type=Path, help="write the figures with versions and machine")
    parser.add_argument("--work", type=Path, help="folder for models and caches; without it, a temporary one")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    results: list[dict[str, Any]] = []
    with work_folder(options.work) as folder:
        for name in options.shapes:
            with console.status(name):
                results.append(compare(name, SHAPES[name], folder / name.replace(" ", "-"), options))
            write_json(options.json, results, options)
            last = results[-1]
            console.print(f"{name}: predicted {last['predicted_mib']:,.0f}, measured {last['measured_mib']:,.0f} MiB")
    columns = ("shape", "M parameters", "tokens", "predicted MiB", "measured MiB", "predicted / measured", "moment")
    keys = ("shape", "parameters", "tokens", "predicted_mib", "measured_mib", "ratio", "moment")
    machine = f"{options.processes} {options.device} processes, {options.dtype}"
    show(f"Peak of a rank, {machine}", columns, [[entry[key] for key in keys] for entry in results])
    columns = ("shape", *(f"{phase}: {what}" for phase in PHASES for what in ("predicted", "measured")))
    rows = [[r["shape"], *(r[what][p] for p in PHASES for what in ("predicted", "measured"))] for r in results]
    show("By phase, MiB", columns, rows)


def compare(name: str, shape: Shape, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predict, train and measure one shape."""
    recipe = prepare(shape, folder, options.dtype)
    measured = measure(recipe, ROOT / "ds_configs" / shape.deepspeed, options.processes, options.device, folder)
    tokens = np.array(measured[0]["micro_batch"])
    predicted, moment, parameters = predict(recipe, shape, tokens, options)
    worst = {phase: max(rank["peaks"][phase] - rank["baseline"] for rank in measured) for phase in PHASES}
    top, seen = max(predicted.values()), max(worst.values())
    return {
        "shape": name,
        "parameters": parameters / 1e6,
        "tokens": int(tokens[1:].sum()),
        "predicted_mib": top,
        "measured_mib": seen,
        "ratio": top / seen,
        "moment": moment,
        "predicted": predicted,
        "measured": worst,
    }


def prepare(shape: Shape, folder: Path, dtype: str) -> Path:
    """A random model with a tokenizer, random pairs and a recipe; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer_of_words()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lengths = np.random.default_rng(0).integers([40, 60, 60], [120, 200, 200], (STEP_PAIRS * STEPS, 3))
    settings = Settings(
        step_pairs=STEP_PAIRS,
        steps=STEPS,
        dtype=dtype,
        rank_tokens=2000,
        activation_checkpointing=shape.checkpointing,
    )
    pairs = list(make_pairs(words(tokenizer), lengths))
    return Path(make_job(folder, folder / "model", pairs, settings, shape.layout).recipe)


def predict(
    recipe_path: Path, shape: Shape, lengths: np.ndarray, options: argparse.Namespace
) -> tuple[dict[str, float], str, int]:
    """MiB of each phase, the moment of the peak, and the number of parameters."""
    recipe = load_recipe(recipe_path)
    on_cpu = options.device == "cpu"
    config = AutoConfig.from_pretrained(recipe.model.path)
    meta = build_meta_model(config, getattr(torch, options.dtype), "sdpa" if on_cpu else "varlen")
    checked_tokens = int(lengths[0, 1:].max())
    micro_batch = micro_batch_shape(
        meta, lengths[1:], shape.layout, checked_tokens, checkpointing=shape.checkpointing, training=True
    )
    moments = training_moments(
        meta.units,
        micro_batch,
        ZeroSettings.of_config(read_policy_config(ROOT / "ds_configs" / shape.deepspeed)),
        ranks=options.processes,
        dtype_bytes=DTYPE_BYTES[options.dtype],
        checkpointing=shape.checkpointing,
        device=CPU if on_cpu else GPU,
    )
    check, *steps = moments
    # AdamW's moments are made by the first step, and DeepSpeed's first buffer for gradients goes with it
    moments_of_adam = shard_elements(parameters_of(meta.units), options.processes) * (MOMENTS_BYTES - GRADIENT_BYTES)
    worst = max(steps, key=lambda moment: moment.total)
    loading = sum(p.numel() for p in meta.model.parameters()) * DTYPE_BYTES[options.dtype]
    return (
        {"loading": loading / MIB, "layout check": (check.total - moments_of_adam) / MIB, "steps": worst.total / MIB},
        worst.name,
        meta.num_parameters,
    )


def measure(recipe: Path, deepspeed: Path, processes: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Train on real processes; what each rank saw."""
    machine = Machine(processes, device)
    port = free_port()
    running = []
    for rank in range(processes):
        environment = machine.environment(rank, port, folder) | {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed),
            "MALLOC_MMAP_THRESHOLD_": str(2**17),  # else glibc keeps what was freed, and the peak says little
            "MALLOC_TRIM_THRESHOLD_": str(2**17),
        }
        command = [sys.executable, __file__, "--worker", str(recipe), str(folder / f"rank-{rank}.json")]
        with open(folder / f"rank-{rank}.log", "w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(processes))
        raise RuntimeError(f"ended with {codes}\n{logs}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def worker(recipe_path: str, results: Path) -> None:
    """One rank: the trainer's own stage, with notes of its memory between phases."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from dpo_scale import stages
    from dpo_scale.console import Console
    from dpo_scale.distributed.engines import PolicyEngine
    from dpo_scale.training import loop, policy
    from dpo_scale.watch import Watch

    noted: dict[str, Any] = {"peaks": dict.fromkeys(PHASES, 0.0)}
    plain_load, plain_check, plain_step = policy.load_model, policy.check_layout, loop.run_step

    def note(phase: str) -> None:
        noted["peaks"][phase] = max(noted["peaks"][phase], peak_memory_mib())
        reset_peak_memory()

    def load(*args: Any, **kwargs: Any) -> Any:
        reset_peak_memory()
        noted["baseline"] = memory_mib()
        return plain_load(*args, **kwargs)

    plain_build = PolicyEngine.__init__

    def build(*args: Any) -> None:
        plain_build(*args)
        note("loading")

    def check(*args: Any, **kwargs: Any) -> Any:
        lengths = args[1].lengths
        noted["longest"] = lengths[np.argmax(lengths[:, 0] + lengths[:, 1:].max(axis=1))].tolist()
        choice = plain_check(*args, **kwargs)
        note("layout check")
        return choice

    def step(engine: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain_step(engine, batches, *args, **kwargs)
        note("steps")
        for item in batches:
            if item.batch.input_ids.numel() > noted.get("tokens", 0):
                noted["tokens"] = item.batch.input_ids.numel()
                noted["pairs"] = item.pairs.tolist()
        return output

    plain_fetch = PartitionedParameterCoordinator.fetch_sub_module
    counter = "_PartitionedParameterCoordinator__n_available_params"

    def fetch(coordinator: Any, *args: Any, **kwargs: Any) -> None:
        plain_fetch(coordinator, *args, **kwargs)
        noted["gathered"] = max(noted.get("gathered", 0), getattr(coordinator, counter))

    PartitionedParameterCoordinator.fetch_sub_module = fetch
    policy.load_model, policy.check_layout, loop.run_step = load, check, step
    PolicyEngine.__init__ = build  # type: ignore[method-assign]
    loop.Run.commit = lambda run, status: None  # type: ignore[method-assign]

    def lengths_of(run: Any) -> None:
        lengths = run.data.train.lengths[noted["pairs"]].tolist()
        noted["micro_batch"] = [noted["longest"], *lengths]
        results.write_text(json.dumps(noted))

    loop.Run.export = lengths_of  # type: ignore[method-assign]
    watch = Watch(None, int(os.environ["RANK"]), lambda message, *, cause: print(message))
    stages.train(load_recipe(recipe_path), Console(is_main=False), watch)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
