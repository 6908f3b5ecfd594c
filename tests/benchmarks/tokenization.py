"""Tokenizing preference pairs against the bare tokenizer on the same texts: python tokenization.py --pairs 100000

Each repeat measures, one after the other and each in a process of its own: the Rust tokenizer alone, the
tokenizer as a user calls it, and `prepare_pairs` from the JSON Lines file to the stored tokens. The texts are
prompt, prompt + chosen and prompt + rejected of real dialogues where the file is there (DPO_SCALE_HH_PAIRS), else of
made-up words. Prints one JSON object; ratios are medians over repeats.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HH = Path(os.environ.get("DPO_SCALE_HH_PAIRS", "../shared/data/hh_harmless_1500.jsonl.gz"))
SIDES = ("rust", "tokenizer", "prepare_pairs")
BATCH_PAIRS = 512
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(_measure(options.side, options.folder, options.cores[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        _make_inputs(Path(folder), options.pairs)
        results = {f"{cores} cores": _compare(Path(folder), cores, options.repeats) for cores in options.cores}
    print(json.dumps({"pairs": options.pairs, "repeats": options.repeats, "text": _text_name(), **results}, indent=2))


def _compare(folder: Path, cores: int, repeats: int) -> dict[str, object]:
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:  # interleaved, so that a busy minute strikes all of them
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--cores", str(cores)]
            environment = {
                **os.environ,
                "TOKENIZERS_PARALLELISM": str(cores > 1).lower(),
                "RAYON_NUM_THREADS": str(cores),
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            measured[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(cores, side, measured[side][-1], file=sys.stderr)
    figures: dict[str, object] = {
        side: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for side, runs in measured.items()
    }
    for side in SIDES[:2]:
        for key in ("seconds", "cpu_seconds"):
            ratios = [ours[key] / theirs[key] for ours, theirs in zip(measured[SIDES[2]], measured[side], strict=True)]
            figures[f"prepare_pairs / {side}, {key}"] = round(statistics.median(ratios), 3)
    return figures


def _measure(side: str, folder: Path, cores: int) -> dict[str, float]:
    from transformers import AutoTokenizer

    from dpo_scale.data.preparation import prepare_pairs
    from dpo_scale.recipe import DataSection

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    path = folder / "pairs.jsonl"
    texts = [] if side == "prepare_pairs" else list(_texts(path))
    tokenizer("warm")
    cpu, started = cpu_seconds(), time.perf_counter()
    if side == "prepare_pairs":
        with tempfile.TemporaryDirectory() as store:
            data = DataSection(train=[str(path)], cache_dir=store, workers=cores, max_length=10**6)
            prepare_pairs(data.train, data, tokenizer, seed=0)
    else:
        for start in range(0, len(texts), 3 * BATCH_PAIRS * cores):
            batch = texts[start : start + 3 * BATCH_PAIRS * cores]
            if side == "rust":
                tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            else:
                tokenizer(batch, add_special_tokens=False)["input_ids"]
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield from (row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])


def _make_inputs(folder: Path, pairs: int) -> None:
    """The pairs, and a tokenizer trained on them."""
    rows = list(_dialogues() if HH.is_file() else _made_up())
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        for row in itertools.islice(itertools.cycle(rows), pairs):
            stream.write(json.dumps(row) + "\n")
    train_tokenizer(folder, [text for row in rows for text in row.values()])


def train_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE tokenizer in `folder/tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder / "tokenizer")


def _text_name() -> str:
    return HH.name if HH.is_file() else "made-up words"


def _dialogues() -> Iterator[dict[str, str]]:
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            size = next(n for n in range(len(row["chosen"]), -1, -1) if row["rejected"].startswith(row["chosen"][:n]))
            prompt = row["chosen"][:size]
            prompt = prompt[: prompt.rindex("\n\nAssistant:") + len("\n\nAssistant:")]
            yield {"prompt": prompt, **{name: row[name][len(prompt) :] for name in ("chosen", "rejected")}}


def _made_up() -> Iterator[dict[str, str]]:
    draws = random.Random(0)
    words = ["".join(draws.choices("aeioulnrst", k=draws.randint(2, 9))) for _ in range(20_000)]
    for _ in range(1500):
        prompt, chosen, rejected = (" ".join(draws.choices(words, k=size)) for size in (90, 40, 40))
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


if __name__ == "__main__":
    main()
