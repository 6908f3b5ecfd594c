"""The step and the reference pass on one GPU, in bfloat16: Llama shapes of 1B and 3B, two mixes of lengths.

    python tests/benchmarks/gpu_step.py --pairs HH.jsonl.gz --out FOLDER [--shapes 1b 3b] [--repeats 3]

Runs `training_step.py` (shared, packed, padded and TRL, one side after the other, and a profile of shared) and
`reference_pass.py` for each shape and mix: the pairs of the file, and a long-tailed mix like UltraFeedback's (prompts
of about 150 tokens, completions of about 300, at most 2,048 a sequence). Their tables go to the screen, the figures
with pairs and tokens per second, MFU and peak memory to FOLDER.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from comparison import HERE, console

VOCABULARY = 128256
STEP_PAIRS = 32
TRL_MICRO_BATCH = {"1b": 8, "3b": 4}
"""Pairs: TRL pads, and holds the logits of every position."""
RANK_TOKENS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="file of preference pairs for the first mix")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=list(TRL_MICRO_BATCH), default=list(TRL_MICRO_BATCH))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for shape in options.shapes:
        for mix, pairs in (("hh", ["--pairs", str(options.pairs)]), ("long_tail", [])):
            for script, further in _measurements(options, shape, mix):
                command = [sys.executable, str(HERE / script), *_common(options, shape), *pairs, *further]
                console.rule(f"{script}: {shape}, {mix}")
                if subprocess.run(command, check=False).returncode:  # out of memory, say; the others go on
                    failed.append(f"{script}: {shape}, {mix}")
    for line in failed:
        console.print(f"failed: {line}")
    sys.exit(bool(failed))


def _common(options: argparse.Namespace, shape: str) -> list[str]:
    return [
        *("--device", "cuda", "--dtype", "bfloat16", "--shape", shape),
        *("--vocabulary", str(VOCABULARY), "--processes", "1", "--repeats", str(options.repeats)),
        *("--rank-tokens", str(RANK_TOKENS)),
    ]


def _measurements(options: argparse.Namespace, shape: str, mix: str) -> list[tuple[str, list[str]]]:
    """Scripts and what each takes beside the common arguments."""
    micro_batch = str(TRL_MICRO_BATCH[shape])
    step = [
        *("--step-pairs", str(STEP_PAIRS), "--steps", str(options.steps), "--trl-micro-batch", micro_batch),
        *("--apart", "--activation-checkpointing", "--profile", str(options.out / f"profile-{mix}")),
        *("--json", str(options.out / f"step-{shape}-{mix}.json")),
    ]
    scoring = [
        *("--rows", "512", "--trl-batch", micro_batch),
        *("--json", str(options.out / f"reference-{shape}-{mix}.json")),
    ]
    return [("training_step.py", step), ("reference_pass.py", scoring)]


if __name__ == "__main__":
    main()
