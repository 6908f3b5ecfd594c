"""What tests of every kind share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from launching import ZERO3, Launched, Launcher, make_model, make_pairs


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums of floats depend on how many threads share them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hh_pairs_path() -> Path:
    """Real dialogues as JSONL.gz: `chosen` and `rejected`, the prompt inside both."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
    path = Path(os.environ.get("DPO_SCALE_HH_PAIRS") or beside)
    if not path.is_file():
        pytest.skip(f"no preference data at {path}; name a file in DPO_SCALE_HH_PAIRS")
    return path


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    workspace = tmp_path_factory.mktemp("launches")
    (workspace / "zero3.json").write_text(json.dumps(ZERO3))
    (workspace / "accelerate.yaml").write_text(
        yaml.safe_dump(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "deepspeed_config_file": str(workspace / "zero3.json"),
                    "zero3_init_flag": True,
                },
                "num_machines": 1,
                "num_processes": 2,
                "machine_rank": 0,
            }
        )
    )
    base = {
        "model": {"path": str(make_model(workspace / "model")), "dtype": "float32"},
        "reference": {"cache_dir": str(workspace / "cache")},
        "data": {
            "train": str(make_pairs(workspace / "train.jsonl", 45, seed=1)),
            "evaluate": str(make_pairs(workspace / "held_out.jsonl", 11, seed=2)),
            "max_length": 256,
            "cache_dir": str(workspace / "tokens"),
        },
        "batch": {"global_pairs": 10, "rank_tokens": 300},
        "loss": {"beta": 2.0},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "track": {"every_steps": 1},
        "checkpoint": {"keep_last": 9},
        "run": {"epochs": 2, "seed": 5},
    }
    return Launcher(workspace, base)


@pytest.fixture(scope="session")
def undisturbed(launcher: Launcher) -> Launched:
    """Two epochs on two ranks, ten steps, from nothing to an exported model, tracked by TensorBoard too."""
    return launcher("undisturbed", ["track.to=[tensorboard]"])
