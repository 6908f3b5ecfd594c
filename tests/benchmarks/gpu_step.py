"""The step and the reference pass on one GPU, in bfloat16: Llama shapes of 1B and 3B, two mixes of lengths.

    python tests/benchmarks/gpu_step.py --pairs HH.jsonl.gz --out FOLDER [--shapes 1b 3b] [--repeats 3]

Runs `training_step.py` (shared, packed, padded and TRL, one side after the other, and a profile of shared) for each
shape and mix: the pairs of the file, and a long-tailed mix like UltraFeedback's (prompts of about 150 tokens,
completions of about 300, at most 2,048 a sequence). Its tables go to the screen, the figures with pairs and tokens per
second, MFU, peak memory and the reference pass to FOLDER. An H200 takes some 5 minutes for a shape, a mix, a repeat.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from comparison import HERE, console

VOCABULARY = 128256
RANK_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Load:
    """What is taken of a shape: pairs of a step, pairs of a micro-batch of TRL's, which pads and holds the logits of
    every position, and whether activations are recomputed on all sides.
    """

    step_pairs: int
    trl_micro_batch: int
    checkpointing: bool


LOADS = {"1b": Load(64, 8, False), "3b": Load(16, 2, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="file of preference pairs for the first mix")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for shape in options.shapes:
        for mix, pairs in (("hh", ["--pairs", str(options.pairs)]), ("long_tail", [])):
            console.rule(f"{shape}, {mix}")
            command = [sys.executable, str(HERE / "training_step.py"), *_arguments(options, shape, mix), *pairs]
            if subprocess.run(command, check=False).returncode:  # out of memory, say; the others go on
                failed.append(f"{shape}, {mix}")
    for line in failed:
        console.print(f"failed: {line}")
    sys.exit(bool(failed))


def _arguments(options: argparse.Namespace, shape: str, mix: str) -> list[str]:
    load = LOADS[shape]
    return [
        *("--device", "cuda", "--dtype", "bfloat16", "--shape", shape, "--vocabulary", str(VOCABULARY)),
        *("--repeats", str(options.repeats), "--steps", str(options.steps), "--rank-tokens", str(RANK_TOKENS)),
        *("--step-pairs", str(load.step_pairs), "--trl-micro-batch", str(load.trl_micro_batch), "--apart"),
        *(["--activation-checkpointing"] if load.checkpointing else []),
        *("--profile", str(options.out / f"profile-{mix}"), "--json", str(options.out / f"step-{shape}-{mix}.json")),
    ]


if __name__ == "__main__":
    main()
