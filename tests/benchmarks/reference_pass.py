"""The reference pass, ours against TRL's precompute: same model, pairs, threads, precision and ZeRO-3 inference.

    python tests/benchmarks/reference_pass.py --pairs FILE.jsonl.gz [--rows N] [--vocabulary 8000 128256]

Timed is the pass alone on both sides, from its first micro-batch to the stored values: no loading, no tokenizing, no
set-up of the engine.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from comparison import (
    Block,
    Machine,
    Side,
    add_common_arguments,
    console,
    remove_caches,
    score,
    show,
    work_folder,
    write_json,
)
from workload import Settings, make_job, make_model, pairs_to_measure

COLUMNS = ("side", "pairs/s", "slowest", "fastest", "ours is faster", "by CPU time", "peak MiB", "above start")
KEYS = (
    "side",
    "pairs_per_second",
    "slowest",
    "fastest",
    "ours_is_faster",
    "by_cpu_time",
    "peak_mib",
    "above_baseline_mib",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--rows", type=int, help="pairs, drawn evenly by length; without it, all of the file")
    parser.add_argument("--rank-tokens", type=int, default=16384, help="tokens in one of our micro-batches")
    parser.add_argument("--trl-batch", type=int, default=4, help="pairs in one of TRL's micro-batches on one rank")
    options = parser.parse_args()
    results = []
    with work_folder(options.work) as folder:
        tokenizer, rows = pairs_to_measure(options.pairs, options.rows)
        for vocabulary in options.vocabulary:
            name = f"{options.shape}-{vocabulary}"
            model = make_model(folder / name, tokenizer, vocabulary, options.shape, options.dtype)
            for processes in options.processes:
                machine = Machine(processes, options.device, options.threads)
                step_pairs = options.trl_batch * processes
                settings = Settings(
                    step_pairs=step_pairs,
                    steps=-(-len(rows) // step_pairs),  # all: our pass leaves out pairs that no step takes
                    dtype=options.dtype,
                    rank_tokens=options.rank_tokens,
                    scoring_rank_tokens=options.rank_tokens,
                )
                sides = [
                    Side(side, script, make_job(folder / f"score-{name}-{processes}-{side}", model, rows, settings))
                    for side, script in (("ours", "side_dpo_scale.py"), ("trl", "side_trl.py"))
                ]
                blocks: dict[str, list[Block]] = {side.name: [] for side in sides}
                for repeat in range(options.repeats):
                    for side in sides:
                        remove_caches(side.job)
                        with console.status(f"{side.name}, repeat {repeat + 1} of {options.repeats}"):
                            blocks[side.name].append(score(side, machine))
                results += _entries(blocks, len(rows), vocabulary, machine)
                title = f"vocabulary {vocabulary:,}, {len(rows):,} pairs, {machine}, {options.dtype}"
                show(title, COLUMNS, [[entry[key] for key in KEYS] for entry in results[-2:]])
                write_json(options.json, results, options)


def _entries(blocks: dict[str, list[Block]], pairs: int, vocabulary: int, machine: Machine) -> list[dict[str, Any]]:
    """One entry a side."""
    seconds = {side: median(block.scoring_seconds for block in blocks[side]) for side in blocks}
    cpu_seconds = {side: median(block.scoring_cpu_seconds for block in blocks[side]) for side in blocks}
    return [
        {
            "vocabulary": vocabulary,
            "processes": machine.processes,
            "threads": machine.threads,
            "side": side,
            "pairs": pairs,
            "pairs_per_second": pairs / seconds[side],
            "slowest": min(pairs / block.scoring_seconds for block in blocks[side]),
            "fastest": max(pairs / block.scoring_seconds for block in blocks[side]),
            "ours_is_faster": seconds[side] / seconds["ours"],
            "by_cpu_time": cpu_seconds[side] / cpu_seconds["ours"],
            "cpu_seconds": cpu_seconds[side],
            "peak_mib": median(block.peak_mib for block in blocks[side]),
            "above_baseline_mib": median(block.above_baseline_mib for block in blocks[side]),
        }
        for side in blocks
    ]


if __name__ == "__main__":
    main()
