"""TRL's side of a comparison: its DPOTrainer with precomputed reference log-probs under the same DeepSpeed engine.

    python side_trl.py train|score JOB RESULTS

`score` leaves the reference log-probs in the cache of the datasets library, where `train` finds them: the trainer that
has scored in the same process runs every ZeRO-3 hook twice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from measuring import Job, Measured, memory_mib, peak_memory_mib
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from dpo_scale.distributed import exchange


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.measured.end_step()


class Timed(DPOTrainer):  # type: ignore[misc]
    """Notes how long the reference pass takes, from its first micro-batch to the stored values."""

    measured: Measured

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        if self.first_scored is None:
            self.first_scored = time.perf_counter(), time.process_time()
        return super().compute_ref_log_probs(*args, **kwargs)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self.first_scored: tuple[float, float] | None = None
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        if self.first_scored is not None:
            started, cpu_started = self.first_scored
            self.measured.scoring_seconds = time.perf_counter() - started
            self.measured.scoring_cpu_seconds = time.process_time() - cpu_started
            self.measured.peak_mib = peak_memory_mib()
        return dataset


def main(stage: str, job: Job, results: Path) -> None:
    measured = Measured(baseline_mib=memory_mib())
    Timed.measured = measured
    if not torch.cuda.is_available():
        # Without a named backend every CPU rank takes itself for the only one.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo", timeout=timedelta(minutes=60))
        assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])
        exchange.use_for_zero()  # the same engine on both sides, down to its collectives
    trainer = Timed(
        model=job.model,
        args=_settings(job),
        train_dataset=load_dataset("json", data_files=job.pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock(measured)],
    )
    if stage == "train":
        assert not measured.scoring_seconds, "the reference log-probs are not in the cache"
        trainer.train()
        engine = trainer.model_wrapped
        assert engine.zero_optimization_stage() == 3
        assert engine.dp_world_size == int(os.environ["WORLD_SIZE"])
        measured.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        measured.tokens = sum(len(row[name]) for row in trainer.train_dataset for name in columns)
    measured.save(results / f"rank-{os.environ['RANK']}.json")
    os._exit(0)


def _settings(job: Job) -> Any:
    """What our recipe says, in TRL's words. Everything not named stays at TRL's default."""
    deepspeed = json.loads(Path(job.deepspeed).read_text()) | {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    rank_pairs = job.step_pairs // int(os.environ["WORLD_SIZE"])
    micro_batch = job.micro_batch_pairs or rank_pairs
    return DPOConfig(
        output_dir=str(Path(job.recipe).parent / "trl"),
        model_init_kwargs={"dtype": job.dtype},
        precompute_ref_log_probs=True,
        beta=job.beta,
        max_length=None,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rank_pairs // micro_batch,
        max_steps=job.steps,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=job.dtype == "bfloat16",
        gradient_checkpointing=job.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": not torch.cuda.is_available()},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )


if __name__ == "__main__":
    main(sys.argv[1], Job.load(sys.argv[2]), Path(sys.argv[3]))
