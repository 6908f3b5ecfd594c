"""Device memory of a reference pass, with its shards on the device and in host memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("reference_memory_worker.py")
ZERO3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


def make_model(folder: Path) -> None:
    """0.2 billion parameters in 24 equal layers, 0.4 GiB in bf16, of which the embeddings are a tenth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=1792,
        num_hidden_layers=24,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(folder: Path, offload: str) -> dict[str, int]:
    """Bytes on the device around a forward on one rank."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *(str(WORKER), str(folder), offload),
        ],
        env=os.environ
        | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO3), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    measured: dict[str, int] = json.loads((folder / f"{offload}.json").read_text())
    print(offload, measured)
    return measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_shards_leave_the_device_all_but_a_few_layers(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    on_device, on_host = measure(tmp_path, "none"), measure(tmp_path, "cpu")
    model = on_device["model"]
    assert on_device["resting"] > 0.95 * model
    assert on_host["resting"] < 0.05 * model
    assert on_host["peak"] < on_device["peak"] - 0.5 * model
    for measured in (on_device, on_host):
        assert measured["resident_elements"] == 0
        assert measured["released"] < 0.05 * model
