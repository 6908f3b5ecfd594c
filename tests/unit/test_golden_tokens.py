"""Ten formats and four tokenizers: ids and masks against a table that was written out and checked by hand.

The table is golden_tokens.txt; its vocabularies are written out in small_tokenizers.py, so that nothing in it is
trained. How it was checked: every piece against the vocabulary by its id, every row against its text by reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import hand_byte_level, hand_sentencepiece, hand_tool_user

from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.data.preferences import to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.tokenization import Kept, PairTokenizer
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSection

TABLE = Path(__file__).with_name("golden_tokens.txt")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TOOLS = [{"type": "function", "function": {"name": "ye"}}]
ROWS: dict[str, dict[str, Any]] = {
    "prompt, chosen and rejected strings": {"prompt": "say:", "chosen": " yes", "rejected": " no é"},
    "chosen and rejected strings, prompt in both": {"chosen": "say: yes", "rejected": "say: no"},
    "Human/Assistant dialogues": {
        "chosen": "\n\nHuman: say\n\nAssistant: yes",
        "rejected": "\n\nHuman: say\n\nAssistant: no",
    },
    "prompt, chosen and rejected messages": {
        "prompt": [user("say")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("no é")],
        "tools": TOOLS,
    },
    "whole chats, prompt in both": {
        "chosen": [user("say"), assistant("no"), user("ye"), assistant("yes")],
        "rejected": [user("say"), assistant("no"), user("ye"), assistant("no")],
    },
    "whole chats, prompt in both, with a system field": {
        "system": "yes",
        "chosen": [user("say"), assistant("yes no")],
        "rejected": [user("say"), assistant("no")],
        "tools": TOOLS,
    },
    "whole chats and their prompt as text": {
        "prompt": "say",
        "chosen": [user("say"), assistant("\tyes")],
        "rejected": [user("say"), assistant(" no")],
    },
    "prompt string, completions as messages": {
        "prompt": "say",
        "chosen": [assistant("yes")],
        "rejected": [assistant("yes:")],
        "tools": TOOLS,
    },
    # The space behind the prompt belongs to the token of the answer: the boundary moves.
    "ranked or scored completions, best against worst": {
        "prompt": "say: ",
        "completions": [{"text": "no", "score": 1}, {"text": "yes", "score": 2}],
    },
    # The last letters of the prompt and the first of one answer are one token: the boundary moves.
    "two responses and a preference": {"prompt": ":sa", "response_1": "y", "response_2": " no", "preference": -1},
}
MOVED = {"ranked or scored completions, best against worst", "two responses and a preference"}


@dataclass(frozen=True)
class Tokens:
    """One line of the table."""

    mask: int
    pieces: tuple[str, ...]
    ids: tuple[int, ...]


def read_table() -> dict[tuple[str, str], dict[str, Tokens]]:
    """(tokenizer, format) -> prompt, chosen and rejected."""
    table: dict[tuple[str, str], dict[str, Tokens]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("=="):
            tokenizer = line.strip("= ")
        elif line.startswith("--"):
            entry = table.setdefault((tokenizer, line.strip("- ")), {})
        elif line and not line.startswith("#"):
            part, mask, *tokens = line.split()
            split = [token.rpartition("=") for token in tokens]
            entry[part] = Tokens(
                int(mask), tuple(piece for piece, _, _ in split), tuple(int(id_) for _, _, id_ in split)
            )
    return table


EXPECTED = read_table()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return {
        "byte-level BPE": hand_byte_level(),
        "SentencePiece BPE with byte fallback": load_tokenizer(str(hand_sentencepiece(folder / "bpe", "bpe"))),
        "SentencePiece unigram": load_tokenizer(str(hand_sentencepiece(folder / "unigram", "unigram"))),
        "byte-level BPE with BOS and a template that writes it and tools": hand_tool_user(),
    }


def tokenized(tokenizer, fields: dict[str, Any], form: str) -> Kept:
    (pair,) = to_preferences(RawRow("rows.jsonl:1", fields))
    assert pair.format == form
    data = DataSection(train=["unused.jsonl"])
    (outcome,) = PairTokenizer(tokenizer, data).tokenize([pair])
    assert isinstance(outcome, Kept)
    return outcome


def test_the_table_is_whole(tokenizers):
    assert set(EXPECTED) == {(tokenizer, form) for tokenizer in tokenizers for form in ROWS}
    for entry in EXPECTED.values():
        assert [(part, tokens.mask) for part, tokens in entry.items()] == [
            ("prompt", 0),
            ("chosen", 1),
            ("rejected", 1),
        ]


@pytest.mark.parametrize(("tokenizer_name", "form"), EXPECTED)
def test_ids_and_masks_are_those_of_the_table(tokenizers, tokenizer_name, form):
    tokenizer = tokenizers[tokenizer_name]
    outcome = tokenized(tokenizer, ROWS[form], form)
    expected = EXPECTED[tokenizer_name, form]
    for part, tokens in expected.items():
        assert tokenizer.convert_ids_to_tokens(list(tokens.ids)) == list(tokens.pieces)
        assert tuple(getattr(outcome.pair, part).tolist()) == tokens.ids, part
    assert outcome.boundary_moved == (form in MOVED)

    # The mask of a sequence as the model sees it: which tokens are predicted.
    batch = collate([PromptCompletions.of_pair(outcome.pair)], "padded")
    width = batch.input_ids.shape[1]
    scored = np.zeros(batch.input_ids.shape, int)
    scored.reshape(-1)[batch.predictors.numpy() + 1] = 1
    for row, part in enumerate(("chosen", "rejected")):
        sequence = [*expected["prompt"].ids, *expected[part].ids]
        expected_mask = [0] * len(expected["prompt"].ids) + [1] * len(expected[part].ids)
        assert batch.input_ids[row, : len(sequence)].tolist() == sequence
        assert scored[row].tolist() == expected_mask + [0] * (width - len(sequence))
