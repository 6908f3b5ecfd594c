"""TRL's own tokenization of its documented examples is the oracle; where we differ, the reason stands at the case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset
from small_tokenizers import THINKING, byte_level, hand_tool_user, train_sentencepiece
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dpo_scale.data.preferences import to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.tokenization import EMPTY_CHOSEN, Dropped, Kept, PairTokenizer
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSection

trl = pytest.importorskip("trl")

Ids = tuple[list[int], list[int], list[int]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


QUESTION = [user("What color is the sky?")]
BLUE, GREEN = [assistant("It is blue.")], [assistant("It is green.")]
LIGHTS = {"function": {"name": "control_light", "arguments": {"room": "living room", "state": "on"}}}
TOOL_TALK = [
    user("Turn on the living room lights."),
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **LIGHTS}]},
    {"role": "tool", "name": "control_light", "content": "The lights in the living room are now on."},
]
TOOLS = [{"type": "function", "function": {"name": "control_light", "description": "Turn lights on or off."}}]
ROWS: dict[str, dict[str, Any]] = {
    "strings, explicit prompt": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "strings, implicit prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "strings without a space between": {"prompt": "The sun is", "chosen": "in the sky.", "rejected": " in the sea."},
    "an end that the text already has": {"prompt": "The sky is", "chosen": " blue.EOS", "rejected": " green."},
    "a boundary inside a token": {"prompt": "The riv", "chosen": "er is old", "rejected": "ulet"},
    "chat, explicit prompt": {"prompt": QUESTION, "chosen": BLUE, "rejected": GREEN},
    "chat, implicit prompt": {"chosen": QUESTION + BLUE, "rejected": QUESTION + GREEN},
    "chat of several turns, implicit prompt": {
        "chosen": [*QUESTION, *BLUE, user("Where is the sun?"), assistant("In the sky.")],
        "rejected": [*QUESTION, *BLUE, user("Where is the sun?"), assistant("In the sea.")],
    },
    "chat whose prompt ends with an answer": {
        "prompt": [*QUESTION, assistant("It is")],
        "chosen": [assistant("blue.")],
        "rejected": [assistant("green.")],
    },
    "chat with tools": {
        "prompt": TOOL_TALK,
        "chosen": [assistant("Done!")],
        "rejected": [assistant("I cannot.")],
        "tools": TOOLS,
    },
    "chat with template variables": {
        "prompt": QUESTION,
        "chosen": BLUE,
        "rejected": GREEN,
        "chat_template_kwargs": {"enable_thinking": False},
    },
}


@dataclass(frozen=True)
class Trl:
    """TRL's way from rows to tokens."""

    trainer: Any

    def ids(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Ids:
        self.trainer._tokenizer = tokenizer
        prepared = self.trainer._prepare_dataset(Dataset.from_list([row]), tokenizer, self.trainer.args, "train")
        return prepared[0]["prompt_ids"], prepared[0]["chosen_ids"], prepared[0]["rejected_ids"]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Trl:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, num_attention_heads=2, **sizes)).save_pretrained(folder)
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    settings = trl.DPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True
    )
    first = Dataset.from_list([ROWS["strings, explicit prompt"]])
    return Trl(trl.DPOTrainer(model=str(folder), args=settings, processing_class=tokenizer, train_dataset=first))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, PreTrainedTokenizerBase]:
    folder = train_sentencepiece(tmp_path_factory.mktemp("bpe"), "bpe", control_symbols="<|im_start|>,<|im_end|>")
    with_bos = load_tokenizer(str(folder))
    with_bos.chat_template = "{{ bos_token }}" + THINKING
    return {"byte-level, thinking": byte_level(THINKING), "SentencePiece, BOS": with_bos, "tools": hand_tool_user()}


def ours(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Ids:
    (pair,) = to_preferences(RawRow("rows.jsonl:1", row))
    (outcome,) = PairTokenizer(tokenizer, DataSection(train=["rows.jsonl"])).tokenize([pair])
    assert isinstance(outcome, Kept), outcome
    return outcome.pair.prompt.tolist(), outcome.pair.chosen.tolist(), outcome.pair.rejected.tolist()


@pytest.mark.parametrize("tokenizer_name", ["byte-level, thinking", "SentencePiece, BOS", "tools"])
@pytest.mark.parametrize("name", ROWS)
def test_ids_are_those_of_trl(oracle, tokenizers, tokenizer_name, name):
    tokenizer = tokenizers[tokenizer_name]
    row = dict(ROWS[name])
    if str(row["chosen"]).endswith("EOS"):
        row["chosen"] = row["chosen"].replace("EOS", tokenizer.eos_token)
    assert ours(tokenizer, row) == oracle.ids(tokenizer, row)


# --- where we differ -----------------------------------------------------------------------------


def test_a_prompt_that_brings_its_own_bos_gets_one_and_trls_gets_two(oracle, tokenizers):
    tokenizer = tokenizers["SentencePiece, BOS"]
    row = {"prompt": "<s>The sky is", "chosen": " blue.", "rejected": " green."}
    expected = oracle.ids(tokenizer, row)
    assert expected[0][:2] == [tokenizer.bos_token_id] * 2
    assert ours(tokenizer, row) == (expected[0][1:], *expected[1:])


def test_dialogues_that_begin_alike_are_scored_from_the_turn_and_by_trl_from_the_first_difference(oracle, tokenizers):
    """The words that both answers begin with were written by the model that is trained: they are scored."""
    tokenizer = tokenizers["byte-level, thinking"]
    start = "\n\nHuman: What color is the sky?\n\nAssistant:"
    row = {"chosen": start + " It is blue.", "rejected": start + " It is green."}
    prompt, chosen, rejected = oracle.ids(tokenizer, row)
    actual_prompt, actual_chosen, actual_rejected = ours(tokenizer, row)
    assert (actual_prompt + actual_chosen, actual_prompt + actual_rejected) == (prompt + chosen, prompt + rejected)
    assert tokenizer.decode(prompt) == start + " It is"
    assert tokenizer.decode(actual_prompt) == start


def test_an_answer_that_holds_the_other_is_counted_as_empty_and_trl_cuts_inside_a_word(oracle, tokenizers):
    tokenizer = tokenizers["byte-level, thinking"]
    row = {"chosen": "The sky is", "rejected": "The sky is green."}
    assert tokenizer.decode(oracle.ids(tokenizer, row)[2]) == " is green.<|end|>"
    (pair,) = to_preferences(RawRow("rows.jsonl:1", row))
    (outcome,) = PairTokenizer(tokenizer, DataSection(train=["rows.jsonl"])).tokenize([pair])
    assert outcome == Dropped("rows.jsonl:1", EMPTY_CHOSEN)
