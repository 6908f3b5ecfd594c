"""Loading tokenizers; SentencePiece itself is the oracle for its models."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import SENTENCES, byte_level, hand_sentencepiece, train_sentencepiece
from transformers import AutoTokenizer

from dpo_scale.errors import UserError
from dpo_scale.model.loading import load_config
from dpo_scale.model.tokenizer import load_tokenizer, save_tokenizer, tokenizer_files

TEXTS = [
    "",
    " ",
    "   ",
    "Hello world",
    "  two  spaces and   a tail ",
    "tab\tline\nbreak\r\n\n\nHuman: hi\n\nAssistant:",
    "été naïve 漢字 \U0001f600\U0001f3f3️",
    "▁ a▁b▁",
    "1, 22, 333;<0x0A>",
    "a\x00b",
]
KINDS = [
    {"model_type": "bpe"},
    {"model_type": "unigram"},
    {"model_type": "bpe", "byte_fallback": False, "vocab_size": 120},
    {"model_type": "unigram", "byte_fallback": False, "vocab_size": 80},
    {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"model_type": "unigram", "normalization_rule_name": "identity", "add_dummy_prefix": False},
    {"model_type": "bpe", "user_defined_symbols": "<sep>,<tool>"},
    {"model_type": "bpe", "split_by_whitespace": False},
    {"model_type": "bpe", "remove_extra_whitespaces": False},
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def sentencepiece_folder(request, tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), **request.param)


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_a_bare_sentencepiece_model_gives_the_ids_of_sentencepiece(sentencepiece_folder):
    tokenizer, oracle = load_tokenizer(str(sentencepiece_folder)), processor(sentencepiece_folder)
    for text in [*TEXTS, "<sep>the river<tool>is <sep>", "the<sep>"]:
        actual_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert actual_ids == oracle.encode(text), text


def test_scores_rank_the_pieces_whatever_their_order_in_the_file(tmp_path):
    tokenizer = load_tokenizer(str(hand_sentencepiece(tmp_path, "bpe")))
    assert tokenizer.tokenize("eye") == ["▁", "e", "ye"] == processor(tmp_path).encode("eye", out_type=str)


def test_any_text_gives_the_ids_of_sentencepiece(tmp_path_factory):
    folder = train_sentencepiece(
        tmp_path_factory.mktemp("bpe"),
        "bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    tokenizer, oracle = load_tokenizer(str(folder)), processor(folder)
    text = st.text(st.one_of(st.sampled_from("aet hr\n▁<>"), st.characters(exclude_categories="C")))

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text)
    def check(text: str) -> None:
        if any(name in text for name in ("<s>", "</s>", "<unk>")):
            return  # text that spells a control symbol is read as that symbol
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == oracle.encode(text)

    check()


def test_real_dialogues_give_the_ids_of_sentencepiece(tmp_path, hh_pairs_path):
    with gzip.open(hh_pairs_path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]
    folder = train_sentencepiece(tmp_path, "bpe")
    tokenizer, oracle = load_tokenizer(str(folder)), processor(folder)
    actual_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert actual_ids == oracle.encode(texts)


def test_the_models_of_mistral_common_give_the_ids_of_sentencepiece(tmp_path):
    mistral = pytest.importorskip("mistral_common", reason="mistral-common brings real models")
    files = sorted((Path(mistral.__file__).parent / "data").glob("*.model.v*"))
    assert files
    for file in files:
        folder = tmp_path / file.name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(file.read_bytes())
        tokenizer, oracle = load_tokenizer(str(folder)), processor(folder)
        for text in [*TEXTS, *SENTENCES[:6], "def f(x):\n    return x  # \t漢字"]:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == oracle.encode(text), text


def test_a_tekken_file_gives_the_ids_of_mistral_common(tmp_path):
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="mistral-common brings real models")
    file = sorted((Path(tekken.__file__).parents[2] / "data").glob("tekken_*.json"))[-1]
    (tmp_path / "tekken.json").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer, oracle = load_tokenizer(str(tmp_path)), tekken.Tekkenizer.from_file(file)
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id == oracle.eos_id
    for text in [*TEXTS, *SENTENCES[:6], "def f(x):\n    return x  # \t漢字"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == oracle.encode(text, bos=False, eos=False), text


def test_a_bare_model_has_bos_end_and_round_trips(tmp_path):
    folder = train_sentencepiece(tmp_path, "bpe", normalization_rule_name="identity")
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer("the river\n漢")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the river\n漢"


def test_tokenizer_config_next_to_a_bare_model_is_heeded(tmp_path):
    folder = train_sentencepiece(tmp_path, "bpe", control_symbols="<|im_end|>")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 3
    assert tokenizer("the")["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer.chat_template == "{{ messages }}"


def with_added_tokens(folder: Path, ids: dict[str, int], **flags: bool) -> Path:
    """A bare model with tokens behind its 320 pieces, as fine-tunes to ChatML are saved."""
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **flags}
    decoder = {str(id_): {"content": content, **flags} for content, id_ in ids.items()}
    train_sentencepiece(folder, "bpe")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    return folder


CHATML_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 320, "<|im_start|>": 321}


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("flags", [{}, {"special": False, "normalized": True}], ids=["special", "plain"])
def test_tokens_added_to_a_bare_model_have_the_ids_that_are_stated(form, flags, tmp_path):
    folder = with_added_tokens(tmp_path / "source", CHATML_IDS, **flags)
    plain = AutoTokenizer.from_pretrained(folder)
    if form == "added_tokens.json":
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 321, "<|im_end|>": 320}))
    tokenizer, oracle = load_tokenizer(str(folder)), processor(folder)
    assert len(tokenizer) == len(plain) == 322
    assert tokenizer.eos_token_id == plain.eos_token_id == 320
    assert tokenizer.convert_tokens_to_ids(list(CHATML_IDS)) == plain.convert_tokens_to_ids(list(CHATML_IDS))
    expected_ids = [321, *oracle.encode("user the river"), 320, *oracle.encode("is old")]
    text = "<|im_start|>user the river<|im_end|>is old"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected_ids
    target = tmp_path / "target"
    target.mkdir()
    save_tokenizer(tokenizer, str(folder), target)
    shutil.copyfile(folder / "config.json", target / "config.json")
    assert AutoTokenizer.from_pretrained(target)(text, add_special_tokens=False)["input_ids"] == expected_ids


def test_an_added_token_keeps_its_flags(tmp_path):
    tokenizer = load_tokenizer(str(with_added_tokens(tmp_path, CHATML_IDS, rstrip=True)))
    text = "<|im_start|>   the<|im_end|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [321, *processor(tmp_path).encode("the"), 320]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"<|im_end|>": 320, "<|im_start|>": 330}, r"id 330 for the added token '<\|im_start\|>', .* it has 321"),
        ({"<|im_end|>": 320, "</s>": 321}, "id 321 for the added token '</s>', .* it has 2"),
        ({"": "x"}, "added_tokens.json or tokenizer_config.json cannot be read"),
    ],
    ids=["gap", "piece", "no number"],
)
def test_ids_of_added_tokens_that_cannot_be_had_are_refused(ids, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load_tokenizer(str(with_added_tokens(tmp_path, ids)))


def test_a_bos_token_that_is_no_token_is_refused(tmp_path):
    folder = train_sentencepiece(tmp_path, "bpe")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>"}))
    with pytest.raises(UserError, match=r"bos_token .<begin>. is no piece of tokenizer\.model"):
        load_tokenizer(str(folder))


def test_several_chat_templates_next_to_a_bare_model_keep_their_names(tmp_path):
    folder = train_sentencepiece(tmp_path / "source", "bpe")
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    expected = {"default": "plain", "tool_use": "tools"}
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == expected
    target = tmp_path / "target"
    target.mkdir()
    save_tokenizer(tokenizer, str(folder), target)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert AutoTokenizer.from_pretrained(target).chat_template == expected


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_an_exported_bare_model_loads_with_plain_transformers(tmp_path, model_type):
    folder = train_sentencepiece(tmp_path / "source", model_type)
    tokenizer = load_tokenizer(str(folder))
    target = tmp_path / "target"
    target.mkdir()
    save_tokenizer(tokenizer, str(folder), target)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    exported = AutoTokenizer.from_pretrained(target)
    assert exported.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        assert exported(text)["input_ids"] == [1, *processor(folder).encode(text)], text


def test_an_exported_json_tokenizer_is_copied_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer = byte_level()
    tokenizer.save_pretrained(source)
    target.mkdir()
    save_tokenizer(load_tokenizer(str(source)), str(source), target)
    names = [file.name for file in tokenizer_files(source)]
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    reloaded = AutoTokenizer.from_pretrained(target)
    assert reloaded("the river")["input_ids"] == tokenizer("the river")["input_ids"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "no tokenizer in this folder"),
        (lambda folder: folder.write_text("x"), "give the folder"),
        (lambda folder: None, "no such folder"),
    ],
)
def test_a_place_without_a_tokenizer_is_named(tmp_path, make, message):
    path = tmp_path / "model"
    make(path)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe nonsense", "not a SentencePiece model"), (b"", "not a SentencePiece model")],
)
def test_a_damaged_model_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.model: {message}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError: Expecting property name"),
        ("{}", "KeyError: 'added_tokens'"),
        ('{"added_tokens": []}', "Exception: Model missing"),
    ],
)
def test_a_damaged_tokenizer_json_is_named(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=rf"no tokenizer could be loaded \({reason}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "gp', r"is not valid JSON \(Unterminated string"),
        (b"\xff", r"is not valid JSON \('utf-8' codec"),
        (b"null", "holds no JSON object"),
        (b'{"model_type": "unheard of"}', ": .*model type `unheard of` but Transformers does not recognize"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^reference\.path: {tmp_path}/config\.json ?{message}"):
        load_config(tmp_path, trust_remote_code=False, setting="reference.path")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ],
    ids=str,
)
def test_a_configuration_with_impossible_values_is_named(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    with pytest.raises(UserError, match=said) as raised:
        load_config(tmp_path, trust_remote_code=False)
    assert str(raised.value).startswith(f"model.path: {tmp_path / 'config.json'}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"model_type": "t5"}, "is a t5 model; no causal language model is of that kind"),
        ("config.json", {"model_type": "llava"}, "is a llava model; no causal language model is of that kind"),
        (
            "config.json",
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"are quantized \(gptq\)",
        ),
        ("adapter_config.json", {"peft_type": "LORA"}, "holds an adapter alone; merge it"),
    ],
    ids=["encoder and decoder", "images", "quantized", "adapter"],
)
def test_a_model_that_cannot_be_trained_is_refused(
    file: str, content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        load_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
    ],
    ids=["text part", "code of its own"],
)
def test_a_model_with_a_causal_part_is_taken(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    load_config(tmp_path, trust_remote_code=False)


def test_a_tokenizer_with_files_of_other_names_is_saved_whole(tmp_path):
    """T5's and GPT-SW3's SentencePiece model is spiece.model; without it they load with a handful of tokens."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    shutil.copyfile(train_sentencepiece(tmp_path / "trained", "unigram") / "tokenizer.model", source / "spiece.model")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTSw3Tokenizer"}))
    tokenizer = load_tokenizer(str(source))
    save_tokenizer(tokenizer, str(source), target)
    assert load_tokenizer(str(target)).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) > 50
