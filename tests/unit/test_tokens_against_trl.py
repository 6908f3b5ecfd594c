"""TRL's own tokenization of its documented examples is the oracle."""

from __future__ import annotations

import pytest
from datasets import Dataset
from small_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_scale.data.preferences import to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.tokenization import Kept, PairTokenizer
from dpo_scale.recipe import DataSection

trl = pytest.importorskip("trl")

QUESTION = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]
ROWS = {
    "strings, explicit prompt": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "strings, implicit prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "chat, explicit prompt": {"prompt": QUESTION, "chosen": BLUE, "rejected": GREEN},
    "chat, implicit prompt": {"chosen": QUESTION + BLUE, "rejected": QUESTION + GREEN},
    "boundary inside a token": {"prompt": "The riv", "chosen": "er is old", "rejected": "ulet"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=400, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ROWS)
def test_ids_are_those_of_trl(tmp_path, model_folder, name):
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    settings = trl.DPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True
    )
    trainer = trl.DPOTrainer(
        model=model_folder,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([ROWS[name]]),
    )
    expected = trainer.train_dataset[0]

    (pair,) = to_preferences(RawRow("rows.jsonl:1", ROWS[name]))
    data = DataSection(train=["rows.jsonl"])
    (outcome,) = PairTokenizer(byte_level(), data).tokenize([pair])
    assert isinstance(outcome, Kept)
    actual = outcome.pair
    for completion in ("chosen", "rejected"):
        actual_ids = [*actual.prompt.tolist(), *getattr(actual, completion).tolist()]
        assert actual_ids == expected["prompt_ids"] + expected[f"{completion}_ids"]
    assert actual.prompt.tolist() == expected["prompt_ids"]
