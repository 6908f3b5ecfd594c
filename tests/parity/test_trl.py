"""TRL's DPOTrainer on the same text in the same order: twenty optimizer steps side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_process_policy import OneProcessPolicy, reference_of
from tiny_llamas import our_llama, plain_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.data.preferences import PreferencePair, to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.sources import read_blocks
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.data.tokenization import Kept, PairTokenizer
from dpo_scale.recipe import DataSection, DataSource, LossSection
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.step import PairBatch, run_step

trl = pytest.importorskip("trl", reason="TRL is a test extra")
CPU = torch.device("cpu")
SEED, STEPS, PAIRS_A_STEP, MAX_LENGTH = 3, 20, 4, 256
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
LOSS = LossSection(beta=0.1, reduction="sum")
MICRO_BATCHES = ([0, 1, 2], [3])
"""Ours are uneven where TRL's batch is whole."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def made_pairs() -> Iterator[PreferencePair]:
    """Questions with a long good answer and a short bad one, or the other way round."""
    random = np.random.default_rng(0)
    things, colours = ["river", "old mill", "sky", "fox"], ["blue", "brown", "grey", "green and cold"]
    number = 0
    while True:
        thing, colour, other = random.choice(things), *random.choice(colours, 2, replace=False)
        long, short = f" The {thing} is {colour}, and so it was last year.", f" {other}!"
        chosen, rejected = (long, short) if random.random() < 0.5 else (short, long)
        number += 1
        yield PreferencePair(f"What colour is the {thing}?", chosen, rejected, f"made:{number}", "made")


def real_pairs(path: Path) -> Iterator[PreferencePair]:
    for block in read_blocks(DataSource(path=str(path)), seed=0):
        for row in block.rows():
            if isinstance(row, RawRow):
                yield from to_preferences(row)


@pytest.fixture(params=["made", "hh"])
def data(request: pytest.FixtureRequest) -> tuple[list[PreferencePair], TokenPairs]:
    """Enough pairs for all steps, as text and in our tokens."""
    source = made_pairs() if request.param == "made" else real_pairs(request.getfixturevalue("hh_pairs_path"))
    settings = DataSection(train=[DataSource(path="unused")], max_length=MAX_LENGTH)
    tokenizer = PairTokenizer(byte_tokenizer(), settings)
    outcomes = ((pair, tokenizer.tokenize([pair])[0]) for pair in source)
    kept = [
        (pair, kept.pair)
        for pair, kept in islice(
            ((pair, outcome) for pair, outcome in outcomes if isinstance(outcome, Kept)), STEPS * PAIRS_A_STEP
        )
    ]
    return [pair for pair, _ in kept], TokenPairs.from_pairs(tokens for _, tokens in kept)


@pytest.fixture
def clean_accelerate() -> Iterator[None]:
    """TRL's trainer leaves process-wide state behind that no later test should meet."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def trl_steps(texts: list[PreferencePair], folder: Path) -> tuple[list[float], list[float], Any]:
    """Loss and gradient norm of each step, and the trainer."""
    from datasets import Dataset

    losses: list[float] = []

    class Recording(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    settings = trl.DPOConfig(
        output_dir=str(folder),
        beta=LOSS.beta,
        loss_type=["sigmoid"],
        max_length=None,
        per_device_train_batch_size=PAIRS_A_STEP,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = plain_llama(SEED, dtype=torch.float32, vocabulary=257)
    rows = [{"prompt": text.prompt, "chosen": text.chosen, "rejected": text.rejected} for text in texts]
    trainer = Recording(
        model=model,
        ref_model=copy.deepcopy(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    return losses, norms, trainer


def our_steps(pairs: TokenPairs) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each step."""
    model = our_llama(SEED, dtype=torch.float32, vocabulary=257)
    reference = reference_of(our_llama(SEED, dtype=torch.float32, vocabulary=257), pairs, LOSS.reduction)
    policy = OneProcessPolicy(model, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    losses, norms = [], []
    for step in range(STEPS):
        batches = []
        for members in MICRO_BATCHES:
            indices = step * PAIRS_A_STEP + np.array(members)
            groups = [PromptCompletions.of_pair(pairs[int(index)]) for index in indices]
            batches.append(PairBatch(collate(groups, "shared"), indices, 1.0))
        output = run_step(policy, batches, reference, MetricSums(CPU), LOSS, global_pairs=PAIRS_A_STEP, device=CPU)
        losses.append(float(torch.stack(output.micro_losses).sum()) / PAIRS_A_STEP)
        norms.append(output.grad_norm)
    return losses, norms


def test_twenty_steps_are_those_of_trl(
    data: tuple[list[PreferencePair], TokenPairs], tmp_path: Path, clean_accelerate: None
) -> None:
    texts, pairs = data
    expected_losses, expected_norms, trainer = trl_steps(texts, tmp_path)
    actual_losses, actual_norms = our_steps(pairs)

    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        assert pair.prompt.tolist() == row["prompt_ids"]
        assert pair.chosen.tolist() == row["chosen_ids"]
        assert pair.rejected.tolist() == row["rejected_ids"]
    assert len(expected_losses) == len(expected_norms) == STEPS
    assert max(expected_norms) > MAX_GRAD_NORM, "clipping is at work"
    assert max(expected_losses) - min(expected_losses) > 0.1, "the model moves"
    assert actual_losses == pytest.approx(expected_losses, rel=1e-4)
    assert actual_norms == pytest.approx(expected_norms, rel=1e-3)
