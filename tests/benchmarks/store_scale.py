"""A store of many rows: time and memory to write, open and look up. One table and one JSON line a number of rows.

    python tests/benchmarks/store_scale.py [--rows 100000 10000000]

Rows are short and made up; what a start costs depends on their number, not on their length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import memory_mib

from dpo_scale.reference.cache import ReferenceStore, part_paths
from dpo_scale.reference.fingerprint import ReferenceFingerprint

REFERENCE = ReferenceFingerprint(1, "bfloat16", {"model.safetensors": "0" * 64}, {}, {}, "made/up")
ROWS_A_PART, TOKENS_A_ROW, STEP_ROWS, STEPS = 50_000, 3, 512, 20


def fill(folder: Path, rows: int, random: np.random.Generator) -> np.ndarray:
    """Keys of the rows that were written, uint8 [rows, 16]."""
    keys = random.integers(0, 256, (rows, 16), dtype=np.uint8)
    values = np.full(TOKENS_A_ROW, -1.5, np.float32)
    for start in range(0, rows, ROWS_A_PART):
        part = keys[start : start + ROWS_A_PART]
        ReferenceStore(folder, REFERENCE).append(part, [values] * len(part))
    return keys


def measure(rows: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        keys = fill(Path(folder), rows, random)
        size = sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file())
        before, started = memory_mib(), time.perf_counter()
        store = ReferenceStore(Path(folder), REFERENCE)
        store.refresh()
        opened = time.perf_counter()
        assert store.contains(keys).all()
        checked = time.perf_counter()
        for _ in range(STEPS):
            store.sums_and_counts(keys[random.integers(0, rows, STEP_ROWS)])
        return {
            "rows": rows,
            "parts": len(part_paths(store.folder)),
            "MB on disk": size / 1e6,
            "seconds to open": opened - started,
            "seconds to find and checksum all": checked - opened,
            f"seconds to look up {STEP_ROWS}": (time.perf_counter() - checked) / STEPS,
            "MiB above start": memory_mib() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 10_000_000])
    for rows in parser.parse_args().rows:
        print(json.dumps(measure(rows)), flush=True)


if __name__ == "__main__":
    main()
