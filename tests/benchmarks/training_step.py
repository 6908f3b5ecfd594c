"""One optimizer step, ours against TRL's DPOTrainer: same model, pairs, order, threads, precision, AdamW and ZeRO-3.

    python tests/benchmarks/training_step.py --pairs FILE.jsonl.gz [--vocabulary 8000 32000 128256] [--processes 1 2]

Reference log-probs are computed before, on both sides, and read from each side's cache. Every step takes the same pairs
on all sides, and the sides take their steps in turns, so that a busy machine slows all alike; losses are compared too.

On a GPU, MFU is 6 x multiply-accumulates of the forward / (seconds x dense bf16 peak), where the multiply-accumulates
are those of the plain form: two whole sequences a pair, no padding, the head on completion tokens, attention causal.
It is the same number on all sides, so a side that computes less for the same result shows more. Planned is the peak
that `dpo-scale plan` would say for these pairs. Scored pairs/s are those of the reference pass apart, from its first
micro-batch on, with all that is compiled and loaded then.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from comparison import (
    TURN_STEPS,
    Block,
    Machine,
    Side,
    StepTimes,
    add_common_arguments,
    console,
    largest_loss_gap,
    profile,
    score,
    show,
    train_in_turns,
    work_folder,
    write_json,
)
from measuring import MIB, PROFILED_STEPS
from transformers import AutoConfig, PreTrainedTokenizerFast
from workload import (
    DEEPSPEED,
    Row,
    Settings,
    make_job,
    make_model,
    pairs_to_measure,
)

from dpo_scale.data.layouts import Layout
from dpo_scale.data.planning import layout_costs, plan_step
from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.model.loading import cost_model
from dpo_scale.operations.memory import peak, training_moments
from dpo_scale.operations.memory_trace import build_meta_model, micro_batch_shape
from dpo_scale.operations.zero_memory import ZeroSettings
from dpo_scale.training.metrics import peak_flops

OURS = ("shared", "packed", "padded")
COLUMNS = (
    "side",
    "pairs/s",
    "tokens/s",
    "slowest",
    "fastest",
    "step s",
    "shared is faster",
    "by CPU time",
    "peak MiB",
    "above start",
    "peak of TRL",
    "loss gap",
)
ON_GPUS = {"planned MiB": "planned_mib", "MFU": "mfu", "scored pairs/s": "scored_pairs_per_second"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--steps", type=int, default=12, help="measured steps in a repeat")
    parser.add_argument("--warm-up", type=int, default=1 + TURN_STEPS, help="steps before those")
    parser.add_argument("--step-pairs", type=int, default=4)
    parser.add_argument("--sides", nargs="+", choices=[*OURS, "trl"], default=[*OURS, "trl"])
    parser.add_argument("--apart", action="store_true", help="one side after the other, where memory holds only one")
    parser.add_argument("--rank-tokens", type=int, default=16384)
    parser.add_argument("--trl-micro-batch", type=int, help="pairs; without it, all that a rank has of a step")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--profile", type=Path, help="folder for torch's profile of our first side")
    options = parser.parse_args()
    if options.profile is not None and options.warm_up + options.steps < PROFILED_STEPS[1]:
        parser.error(f"--profile needs {PROFILED_STEPS[1]} steps, --warm-up and --steps together")
    if options.profile is not None and options.sides[0] == "trl":
        parser.error("--profile is of the first of --sides, which must be ours")
    return options


def main() -> None:
    options = arguments()
    results = []
    with work_folder(options.work) as folder:
        count = options.step_pairs * (options.warm_up + options.steps)
        tokenizer, rows = pairs_to_measure(options.pairs, count)
        for vocabulary in options.vocabulary:
            for processes in options.processes:
                machine = Machine(processes, options.device, options.threads)
                for entries in compare(options, folder, tokenizer, rows, vocabulary, machine):
                    write_json(options.json, results + entries, options)
                results += entries
                _show(entries, f"vocabulary {vocabulary:,}, {machine}, {options.dtype}")


def compare(
    options: argparse.Namespace,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    vocabulary: int,
    machine: Machine,
) -> Iterator[list[dict[str, Any]]]:
    """Measure all sides at one vocabulary.

    Gives an entry a side, again after each run, of those that have run: what is cut off has lost its last run alone.
    """
    settings = Settings(
        step_pairs=options.step_pairs,
        steps=options.warm_up + options.steps,
        dtype=options.dtype,
        rank_tokens=options.rank_tokens,
        activation_checkpointing=options.activation_checkpointing,
        micro_batch_pairs=options.trl_micro_batch,
    )
    name = f"{options.shape}-{vocabulary}"
    model = make_model(folder / name, tokenizer, vocabulary, options.shape, options.dtype)
    sides = []
    for side in options.sides:
        layout = "shared" if side == "trl" else side
        caches = folder / f"{name}-{machine.processes}-ours"
        job = make_job(folder / f"{name}-{machine.processes}-{side}", model, rows, settings, layout, caches)
        sides.append(Side(side, script_of(side), job))
    scoring_seconds = {}
    for side in {side.script: side for side in reversed(sides)}.values():  # one of ours scores for all of ours
        with console.status(f"reference log-probs: {side.name}"):
            scoring_seconds[side.script] = score(side, machine).scoring_seconds
    if options.profile is not None:
        with console.status("profile"):
            profile(sides[0], machine, options.profile / f"{name}-{machine.processes}")
    groups = [[side] for side in sides] if options.apart else [sides]
    blocks: dict[str, list[Block]] = {}
    for repeat in range(options.repeats):
        with console.status(f"repeat {repeat + 1} of {options.repeats}"):
            for group in groups:
                for name_of_side, block in train_in_turns(group, machine).items():
                    blocks.setdefault(name_of_side, []).append(block)
                yield _entries(options, blocks, scoring_seconds, model, settings, machine, _lengths(tokenizer, rows))


def _entries(
    options: argparse.Namespace,
    blocks: dict[str, list[Block]],
    scoring_seconds: dict[str, float],
    model: Path,
    settings: Settings,
    machine: Machine,
    all_lengths: np.ndarray,
) -> list[dict[str, Any]]:
    times = {side: StepTimes.of(blocks[side], options.warm_up, options.step_pairs) for side in blocks}
    lengths = all_lengths[options.step_pairs * options.warm_up :]
    config = AutoConfig.from_pretrained(model)
    work = float(layout_costs(lengths, "packed", cost_model(config)).work.sum())
    entries = []
    for side, time in times.items():
        seconds_of_scoring = scoring_seconds[script_of(side)]
        entry = {
            "vocabulary": config.vocab_size,
            "processes": machine.processes,
            "threads": machine.threads,
            "side": side,
            "pairs_per_second": time.pairs_per_second,
            "tokens_per_second": float(lengths.sum()) / sum(time.seconds),
            "slowest": time.slowest,
            "fastest": time.fastest,
            "step_seconds": median(time.seconds),
            "shared_is_faster": times["shared"].speed_up_over(time) if "shared" in times else None,
            "by_cpu_time": times["shared"].cpu_saving_over(time) if "shared" in times else None,
            "cpu_seconds_of_each_step": time.cpu_seconds,
            "peak_mib": median(block.peak_mib for block in blocks[side]),
            "above_baseline_mib": median(block.above_baseline_mib for block in blocks[side]),
            "losses": blocks[side][0].losses,
            "seconds_of_each_step": time.seconds,
            "scored_pairs_per_second": len(all_lengths) / seconds_of_scoring if seconds_of_scoring else None,
            "mfu": _mfu(work, sum(time.seconds), machine.processes),
        }
        if side != "trl" and options.device == "cuda":
            entry["planned_mib"] = _planned_mib(model, side, all_lengths, settings, machine.processes)
        if "trl" in times:
            entry["peak_of_trl"] = entry["peak_mib"] / median(block.peak_mib for block in blocks["trl"])
            entry["loss_gap"] = largest_loss_gap(blocks[side], blocks["trl"])
        entries.append(entry)
    return entries


def script_of(side: str) -> str:
    return "side_trl.py" if side == "trl" else "side_dpo_scale.py"


def _show(entries: list[dict[str, Any]], title: str) -> None:
    keys = (
        "side",
        "pairs_per_second",
        "tokens_per_second",
        "slowest",
        "fastest",
        "step_seconds",
        "shared_is_faster",
        "by_cpu_time",
        "peak_mib",
        "above_baseline_mib",
        "peak_of_trl",
        "loss_gap",
    )
    columns = COLUMNS
    if entries[0]["mfu"] is not None:
        keys, columns = (*keys, *ON_GPUS.values()), (*columns, *ON_GPUS)
    show(title, columns, [[entry.get(key) for key in keys] for entry in entries])


def _lengths(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected with their end tokens, int [pairs, 3]."""
    texts = [[row.prompt, row.chosen, row.rejected] for row in rows]
    return np.array([[len(ids) for ids in tokenizer(three)["input_ids"]] for three in texts]) + [0, 1, 1]


def _planned_mib(model: Path, layout: Layout, lengths: np.ndarray, settings: Settings, processes: int) -> float:
    """Peak of a rank over these steps by the plan's arithmetic."""
    config = AutoConfig.from_pretrained(model)
    meta = build_meta_model(config, getattr(torch, settings.dtype), "varlen")
    costs = layout_costs(lengths, layout, cost_model(config))
    plans = [
        plan_step(pairs, costs, world_size=processes, rank_tokens=settings.rank_tokens, step=step)
        for step, pairs in enumerate(np.array_split(np.arange(len(lengths)), settings.steps))
    ]
    micro_batches = [indices for plan in plans for round_ in plan.micro_batches for indices in round_]
    largest = max(micro_batches, key=lambda indices: costs.tokens[indices].sum())
    shape = micro_batch_shape(
        meta,
        lengths[largest],
        layout,
        int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max()),
        checkpointing=settings.activation_checkpointing,
        training=True,
    )
    moments = training_moments(
        meta.units,
        shape,
        ZeroSettings.of_config(read_policy_config(DEEPSPEED / "zero3.json")),
        ranks=processes,
        dtype_bytes=getattr(torch, settings.dtype).itemsize,
        checkpointing=settings.activation_checkpointing,
    )
    return peak(moments).total / MIB


def _mfu(work: float, seconds: float, processes: int) -> float | None:
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else 6 * work / (seconds * processes * peak)


if __name__ == "__main__":
    main()
