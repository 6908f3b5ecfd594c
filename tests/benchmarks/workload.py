"""Models, tokenizers and pairs to measure on, all made here from a file of pairs and a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measuring import Job
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_scale.data.planning import epoch_order
from dpo_scale.data.preferences import to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.sources import read_blocks
from dpo_scale.recipe import DataSource

TOKENIZER_TOKENS = 8000
END = "<end>"
SEED = 0
DEEPSPEED = Path(__file__).resolve().parents[2] / "ds_configs"

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
"""Llama shapes; 1b and 3b are those of Llama 3.2."""


@dataclass(frozen=True, slots=True)
class Row:
    """A pair in text."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def size(self) -> int:
        """Characters, each prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def read_pairs(path: Path) -> list[Row]:
    """All pairs of a file in any format that the trainer reads as plain text."""
    rows = []
    for raw in (row for block in read_blocks(DataSource(path=str(path)), SEED) for row in block.rows()):
        assert isinstance(raw, RawRow), f"{path}: a row that cannot be read"
        for pair in to_preferences(raw):
            if pair.chosen != pair.rejected and pair.chosen and pair.rejected:
                rows.append(Row(str(pair.prompt), str(pair.chosen), str(pair.rejected)))
    return rows


def sample(rows: Sequence[Row], count: int | None) -> list[Row]:
    """`count` pairs with the lengths of all of them: evenly spaced in the order of length, in the file's order."""
    if count is None or count >= len(rows):
        return list(rows)
    by_size = sorted(range(len(rows)), key=lambda n: rows[n].size)
    spaced = ((np.arange(count) + 0.5) * len(rows) / count).astype(int)
    return [rows[n] for n in sorted(by_size[position] for position in spaced)]


def write_pairs(rows: Sequence[Row], path: Path) -> Path:
    lines = ({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (text for row in rows for text in (row.prompt, row.chosen, row.rejected))
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_TOKENS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def train_tokenizer_of_words() -> PreTrainedTokenizerFast:
    """A tokenizer with thousands of invented words that are one token each."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    text = "".join(f" {a}{b}" for a in syllables for b in syllables)
    return train_tokenizer([Row(text, text, text)])


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int, shape: str, dtype: str) -> Path:
    """A random Llama; a vocabulary beyond the tokenizer's only makes the embedding and the head larger."""
    if not (folder / "config.json").exists():
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPES[shape],
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the sides need the memory
    return folder


def words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words that are one token each, with their leading space."""
    pieces = (piece for piece in tokenizer.get_vocab() if piece.startswith("Ġ") and piece[1:].isalpha())
    return sorted(" " + piece[1:] for piece in pieces if piece[1:].isascii())


def make_pairs(vocabulary: Sequence[str], lengths: np.ndarray) -> Iterator[Row]:
    """Pairs of random words.

    Args:
        lengths: int [pairs, 3], tokens of prompt, chosen and rejected; the end token comes on top.
    """
    random = np.random.default_rng(SEED)
    for row in lengths:
        texts = ["".join(random.choice(vocabulary, size)) for size in row]
        yield Row(*texts)


def long_tailed_lengths(count: int) -> np.ndarray:
    """Lengths like UltraFeedback's: prompts of about 150 tokens, completions of about 300, both log-normal with a long
    tail, 2,048 a sequence at most. int [count, 3].
    """
    random = np.random.default_rng(SEED)
    prompt = np.minimum(random.lognormal(np.log(150) - 0.5 * 0.8**2, 0.8, count), 1000)
    completions = np.minimum(random.lognormal(np.log(300) - 0.5 * 0.7**2, 0.7, (count, 2)), 1040)
    return np.column_stack([prompt, completions]).astype(int).clip(min=4)


def pairs_to_measure(path: Path | None, count: int | None) -> tuple[PreTrainedTokenizerFast, list[Row]]:
    """A tokenizer trained on the file's pairs, and some of them; without a file, a long-tailed mix of random words."""
    if path is not None:
        rows = read_pairs(path)
        return train_tokenizer(rows), sample(rows, count)
    tokenizer = train_tokenizer_of_words()
    return tokenizer, list(make_pairs(words(tokenizer), long_tailed_lengths(count or 1000)))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a measurement fixes for all sides."""

    step_pairs: int
    steps: int
    dtype: str
    learning_rate: float = 1e-5
    beta: float = 0.1
    rank_tokens: int = 16384
    scoring_rank_tokens: int | None = None
    activation_checkpointing: bool = False
    micro_batch_pairs: int | None = None
    max_length: int = 8192


def make_job(
    folder: Path,
    model: Path,
    rows: Sequence[Row],
    settings: Settings,
    layout: str = "shared",
    caches: Path | None = None,
) -> Job:
    """A job on these pairs, in this order on every side; writes its files into the folder.

    Args:
        caches: where jobs share what we prepare; without it, the job's own folder.
    """
    caches = caches or folder
    folder.mkdir(parents=True, exist_ok=True)
    in_our_file: list[Row | None] = [None] * len(rows)
    for row, place in zip(rows, epoch_order(len(rows), SEED, 0), strict=True):
        in_our_file[place] = row
    ours = write_pairs([row for row in in_our_file if row is not None], folder / "our_order.jsonl")
    recipe = {
        "model": {
            "path": str(model),
            "dtype": settings.dtype,
            "activation_checkpointing": settings.activation_checkpointing,
        },
        "reference": {"cache_dir": str(caches / "reference"), "rank_tokens": settings.scoring_rank_tokens},
        "data": {
            "train": str(ours),
            "max_length": settings.max_length,
            "cache_dir": str(caches / "tokens"),
            "workers": 1,
        },
        "batch": {"global_pairs": settings.step_pairs, "rank_tokens": settings.rank_tokens, "layout": layout},
        "loss": {"beta": settings.beta, "reduction": "sum"},
        "optim": {"learning_rate": settings.learning_rate, "schedule": "constant", "warmup_ratio": 0.0},
        "track": {"every_steps": 1},
        "run": {
            "output_dir": str(folder / "run"),
            "seed": SEED,
            "max_steps": settings.steps,
            "resume": "never",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Job(
        model=str(model),
        pairs=str(write_pairs(rows, folder / "pairs.jsonl")),
        recipe=str(folder / "recipe.yaml"),
        deepspeed=str(DEEPSPEED / ("zero3.json" if torch.cuda.is_available() else "zero3_cpu.json")),
        step_pairs=settings.step_pairs,
        steps=settings.steps,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        dtype=settings.dtype,
        seed=SEED,
        activation_checkpointing=settings.activation_checkpointing,
        micro_batch_pairs=settings.micro_batch_pairs,
    )
