"""A base model for the village: a SentencePiece tokenizer and a small Llama that has read the corpus."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_scale.demo.world import World

VOCABULARY = 700
STEPS = 450
LINES_PER_STEP = 48
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 30


def make_base_model(
    world: World, folder: Path, seed: int, on_step: Callable[[int, float], None]
) -> None:
    """Train tokenizer and model on the corpus and save both as a Hugging Face folder.

    on_step is told the number of steps done and the mean next-token loss of the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(world.corpus, folder)
    rows = [
        torch.tensor([tokenizer.bos_id(), *ids, tokenizer.eos_id()])
        for ids in tokenizer.encode(list(world.corpus))
    ]
    model = train_model(rows, tokenizer, seed, on_step)
    model.save_pretrained(folder)


def train_tokenizer(
    corpus: Sequence[str], folder: Path
) -> sentencepiece.SentencePieceProcessor:
    """A bare `tokenizer.model` (BPE with byte fallback), and the line that tells transformers its family."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",  # keeps the line break between request and answer
        remove_extra_whitespaces=False,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    family = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(family, indent=2) + "\n")
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def train_model(
    rows: Sequence[torch.Tensor],
    tokenizer: sentencepiece.SentencePieceProcessor,
    seed: int,
    on_step: Callable[[int, float], None],
) -> LlamaForCausalLM:
    """A small Llama after a short next-token training in fp32 on rows of token ids."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size(),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_id(),
            eos_token_id=tokenizer.eos_id(),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine)
    order = torch.randperm(len(rows)).tolist()
    for step in range(STEPS):
        chosen = order[step * LINES_PER_STEP : (step + 1) * LINES_PER_STEP]
        ids = torch.nn.utils.rnn.pad_sequence(
            [rows[i] for i in chosen], batch_first=True, padding_value=-100
        )
        logits = model(input_ids=ids[:, :-1].clamp_min(0)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())
    return model


def _warmup_then_cosine(step: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))
