"""Cost of our step against sequence length, prompt share, vocabulary and number of pairs; balance over ranks.

    python tests/benchmarks/scaling.py --pairs FILE.jsonl.gz [--only length share vocabulary balance pairs]

Pairs are random words of a tokenizer trained on the file, of exactly the lengths that are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from comparison import (
    HERE,
    Block,
    Machine,
    Side,
    StepTimes,
    add_common_arguments,
    console,
    score,
    show,
    train_in_turns,
    work_folder,
    write_json,
)
from transformers import PreTrainedTokenizerFast
from workload import Settings, make_job, make_model, make_pairs, pairs_to_measure, words

STEP_PAIRS, WARM_UP = 4, 3
LENGTHS = (128, 256, 512, 1024, 2048)
SHARES = (0.1, 0.5, 0.9)
SHARE_LENGTH = 512
NUMBERS_OF_PAIRS = (1_000, 10_000, 100_000, 1_000_000)
BALANCE_PAIRS = 32
MEDIAN_LENGTHS = (90, 40, 40)
KEYS = ("case", "layout", "pairs_per_second", "tokens_per_second", "step_seconds", "peak_mib", "above_baseline_mib")
COLUMNS = ("case", "layout", "pairs/s", "tokens/s", "step s", "peak MiB", "above start")


class Bench:
    """Measures pairs of given lengths; cases that are measured together take their steps in turns."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.tokenizer: PreTrainedTokenizerFast = pairs_to_measure(options.pairs, 1)[0]
        self.words = words(self.tokenizer)
        self.machine = Machine(options.processes[0], options.device, options.threads)

    def measure(
        self,
        cases: Mapping[str, np.ndarray],
        *,
        layouts: tuple[str, ...] = ("shared",),
        vocabulary: int | None = None,
        step_pairs: int = STEP_PAIRS,
        machine: Machine | None = None,
    ) -> list[dict[str, Any]]:
        """One entry a case and layout. Each case has lengths, int [pairs, 3], of equally many pairs for all steps."""
        machine = machine or self.machine
        vocabulary = vocabulary or self.options.vocabulary[0]
        name = f"{self.options.shape}-{vocabulary}"
        model = make_model(self.folder / name, self.tokenizer, vocabulary, self.options.shape, self.options.dtype)
        sides: dict[tuple[str, str], Side] = {}
        for case, lengths in cases.items():
            rows = list(make_pairs(self.words, lengths - [0, 1, 1]))  # the end token comes on top
            settings = Settings(step_pairs, len(rows) // step_pairs, self.options.dtype, rank_tokens=32768)
            for layout in layouts:
                side = f"{case}-{layout}"
                job = make_job(self.folder / side, model, rows, settings, layout)
                sides[case, layout] = Side(side, "side_dpo_scale.py", job)
        blocks: dict[str, list[Block]] = {side.name: [] for side in sides.values()}
        with console.status(", ".join(cases)):
            for side in sides.values():
                score(side, machine)
            for _ in range(self.options.repeats):
                for name, block in train_in_turns(list(sides.values()), machine).items():
                    blocks[name].append(block)
        return [
            _entry(case, layout, blocks[side.name], step_pairs, float(cases[case][WARM_UP * step_pairs :].sum()))
            for (case, layout), side in sides.items()
        ]

    @property
    def num_pairs(self) -> int:
        return STEP_PAIRS * (WARM_UP + int(self.options.steps))

    def lengths(self, total: int, share: float) -> np.ndarray:
        """Every pair alike: prompt + completion is `total`, and the prompt is that share of it."""
        prompt = int(total * share)
        return np.tile([prompt, total - prompt, total - prompt], (self.num_pairs, 1))


def _entry(case: str, layout: str, blocks: list[Block], pairs: int, tokens: float) -> dict[str, Any]:
    times = StepTimes.of(blocks, WARM_UP, pairs)
    return {
        "case": case,
        "layout": layout,
        "pairs_per_second": times.pairs_per_second,
        "slowest": times.slowest,
        "fastest": times.fastest,
        "tokens_per_second": tokens / sum(times.seconds),
        "tokens_per_cpu_second": tokens / sum(times.cpu_seconds),
        "step_seconds": sum(times.seconds) / len(times.seconds),
        "peak_mib": max(block.peak_mib for block in blocks),
        "above_baseline_mib": max(block.above_baseline_mib for block in blocks),
    }


def by_length(bench: Bench) -> list[dict[str, Any]]:
    return [e for total in LENGTHS for e in bench.measure({f"{total} tokens a sequence": bench.lengths(total, 0.5)})]


def by_prompt_share(bench: Bench) -> list[dict[str, Any]]:
    layouts = ("shared", "packed", "padded")
    return [
        entry
        for share in SHARES
        for entry in bench.measure({f"prompt {share:.0%}": bench.lengths(SHARE_LENGTH, share)}, layouts=layouts)
    ]


def by_vocabulary(bench: Bench) -> list[dict[str, Any]]:
    return [
        entry
        for vocabulary in (8_000, 32_000, 128_256)
        for entry in bench.measure({f"vocabulary {vocabulary:,}": bench.lengths(256, 0.6)}, vocabulary=vocabulary)
    ]


def balance(bench: Bench) -> list[dict[str, Any]]:
    """Two ranks, steps of 32 pairs near the median length; one pair of ten times that in a single step, and in each.

    What is lost by CPU time is work, the long pair's attention; what more is lost by the clock is imbalance.
    """
    random = np.random.default_rng(0)
    steps = WARM_UP + bench.options.steps
    even = np.array(MEDIAN_LENGTHS) * random.uniform(0.7, 1.3, (steps * BALANCE_PAIRS, 1))
    once, often = even.copy(), even.copy()
    once[(WARM_UP + bench.options.steps // 2) * BALANCE_PAIRS] = 10 * np.array(MEDIAN_LENGTHS)
    often[::BALANCE_PAIRS] = 10 * np.array(MEDIAN_LENGTHS)
    cases = {
        "even lengths": even.astype(int),
        "one pair of ten times the median": once.astype(int),
        "one such pair in each step": often.astype(int),
    }
    machine = Machine(2, bench.options.device, bench.options.threads)
    entries = bench.measure(cases, step_pairs=BALANCE_PAIRS, machine=machine)
    for entry in entries:
        entry["throughput_kept"] = entry["tokens_per_second"] / entries[0]["tokens_per_second"]
        entry["kept_by_cpu_time"] = entry["tokens_per_cpu_second"] / entries[0]["tokens_per_cpu_second"]
    return entries


def by_number_of_pairs(bench: Bench) -> list[dict[str, Any]]:
    """What grows with the data set, without a model: keys of the reference rows, the order of an epoch, the plans."""
    entries = []
    for count in NUMBERS_OF_PAIRS:
        with console.status(f"{count:,} pairs"):
            command = [sys.executable, str(HERE / "planning_cost.py"), str(count)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        entries.append(json.loads(output.splitlines()[-1]))
    return entries


CASES: dict[str, tuple[str, Callable[[Bench], list[dict[str, Any]]]]] = {
    "length": ("cost against sequence length, half of it prompt", by_length),
    "share": (f"cost against the prompt's share of {SHARE_LENGTH} tokens", by_prompt_share),
    "vocabulary": ("cost against vocabulary, 256 tokens a sequence", by_vocabulary),
    "balance": (f"two ranks, {BALANCE_PAIRS} pairs a step: what long pairs cost", balance),
    "pairs": ("cost of the number of pairs, seconds and MiB", by_number_of_pairs),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(repeats=1)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with work_folder(options.work) as folder:
        bench = Bench(options, folder)
        for name in options.only:
            title, measure = CASES[name]
            entries = measure(bench)
            keys, columns = (tuple(entries[0]),) * 2 if name == "pairs" else (KEYS, COLUMNS)
            if name == "balance":
                keys = (*KEYS, "throughput_kept", "kept_by_cpu_time")
                columns = (*COLUMNS, "tokens/s kept", "by CPU time")
            where = title if name == "balance" else f"{title}; {bench.machine}"
            show(where, columns, [[entry[key] for key in keys] for entry in entries])
            results += [{"table": name, **entry} for entry in entries]
            write_json(options.json, results, options)


if __name__ == "__main__":
    main()
