"""Tokens, boundaries, ends and cuts, against tables written by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CHATML,
    THINKING,
    byte_level,
    hand_byte_level,
    hand_sentencepiece,
    train_sentencepiece,
)
from test_preferences import FORMATS
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dpo_scale.data import tokenization
from dpo_scale.data.preferences import PreferencePair, to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.tokenization import Dropped, Kept, PairTokenizer
from dpo_scale.errors import DataError, UserError
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSection

USER = {"role": "user", "content": "say"}
TOOL = {"type": "function", "function": {"name": "say", "parameters": {}}}


def section(**settings) -> DataSection:
    return DataSection(train=["unused.jsonl"], **{"max_length": 100, **settings})


def answer(text: str) -> tuple[dict[str, str]]:
    return ({"role": "assistant", "content": text},)


def strings(prompt: str = "say:", chosen: str = " yes", rejected: str = " no é") -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, "rows.jsonl:1", "strings")


def chat(chosen: str = "yes", rejected: str = "no", **more) -> PreferencePair:
    return PreferencePair((USER,), answer(chosen), answer(rejected), "rows.jsonl:1", "chat", **more)


def kept(tokenizer, pair: PreferencePair, **settings) -> Kept:
    (outcome,) = PairTokenizer(tokenizer, section(**settings)).tokenize([pair])
    assert isinstance(outcome, Kept), outcome
    return outcome


def dropped(tokenizer, pair: PreferencePair, **settings) -> str:
    (outcome,) = PairTokenizer(tokenizer, section(**settings)).tokenize([pair])
    assert isinstance(outcome, Dropped), outcome
    return outcome.reason


def pieces(tokenizer, outcome: Kept) -> tuple[list[str], ...]:
    """Prompt, chosen and rejected as token strings."""
    pair = outcome.pair
    return tuple(tokenizer.convert_ids_to_tokens(part.tolist()) for part in (pair.prompt, pair.chosen, pair.rejected))


# --- every format, three tokenizers --------------------------------------------------------------


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hand")
    names = {name: hand_sentencepiece(folder / name, name) for name in ("bpe", "unigram")}
    loaded = {name: load_tokenizer(str(path)) for name, path in names.items()}
    return {"byte_level": hand_byte_level(), **loaded}


@pytest.mark.parametrize("name", ["byte_level", "bpe", "unigram"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_gives_the_tokens_of_its_texts(hand, format_name, name):
    """The thirteen formats say the same few things, so their tokens follow from the parts."""
    fields, (prompt, chosen, rejected) = FORMATS[format_name]
    (pair,) = to_preferences(RawRow("rows.jsonl:1", fields))
    tokenizer = hand[name]
    (start, middle, end) = pieces(tokenizer, kept(tokenizer, pair))
    text = tokenizer.decode(tokenizer.convert_tokens_to_ids([*start, *middle]))
    loser = tokenizer.decode(tokenizer.convert_tokens_to_ids([*start, *end]))
    if isinstance(prompt, str):
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
        gap = " " if bos else ""  # decoding shows SentencePiece's dummy prefix behind BOS
        assert (text, loser) == (
            f"{bos}{gap}{prompt}{chosen}{eos}",
            f"{bos}{gap}{prompt}{rejected}{eos}",
        )
    else:
        roles = [message["role"] for message in prompt]
        assert "".join(start).count("<|im_start|>") == len(roles) + 1
        assert middle[0] == "yes"
        assert end[0] == "no"
        assert "<|im_end|>" in middle
        assert "<|im_end|>" in end


def test_pairs_tokenized_together_are_those_tokenized_alone(hand):
    tokenizer = hand["bpe"]
    pairs = [strings("say:", f" {'yes ' * n}", " no") for n in range(1, 4)]
    pairs.insert(1, strings("say:", " no", " no"))  # dropped
    together = PairTokenizer(tokenizer, section()).tokenize(pairs)
    assert isinstance(together.pop(1), Dropped)
    alone = [kept(tokenizer, pair) for pair in (pairs[0], *pairs[2:])]
    for actual, expected in zip(together, alone, strict=True):
        assert pieces(tokenizer, actual) == pieces(tokenizer, expected)
        assert actual.boundary_moved == expected.boundary_moved


# --- ends, beginnings, boundaries ----------------------------------------------------------------


def test_bos_is_written_once(hand):
    tokenizer = hand["bpe"]
    for prompt in ("say:", "<s>say:"):
        ids = kept(tokenizer, strings(prompt)).pair.prompt
        assert (ids == tokenizer.bos_token_id).sum() == 1
        assert ids[0] == tokenizer.bos_token_id


def test_an_end_token_of_the_tokenizers_own_is_not_written_into_the_middle():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    assert tokenizer("a")["input_ids"][-1] == 0
    pair = kept(tokenizer, strings()).pair
    assert (pair.prompt != 0).all()
    assert (pair.chosen == 0).tolist() == [False] * (len(pair.chosen) - 1) + [True]


def test_a_tokenizers_own_truncation_and_padding_change_no_pair():
    """Many tokenizer.json files keep the limit and the padding of whoever wrote them."""
    plain, limited = byte_level(), byte_level()
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=40)
    pair = PreferencePair("the river is behind the mill", " yes", " no", "rows.jsonl:1", "")
    expected, found = kept(plain, pair).pair, kept(limited, pair).pair
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(found, part).tolist() == getattr(expected, part).tolist()


def test_an_end_that_the_text_already_has_is_not_doubled(hand):
    outcome = kept(hand["byte_level"], strings(chosen=" yes<|end|>"))
    assert pieces(hand["byte_level"], outcome)[1] == ["Ġyes", "<|end|>"]


def test_a_template_without_a_turn_end_gets_the_end_token(hand):
    tokenizer = hand_byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert pieces(tokenizer, kept(tokenizer, chat()))[1:] == (["yes", "<|end|>"], ["no", "<|end|>"])
    tokenizer.add_tokens(["</think>"])  # a token of its own that ends no turn
    endings = pieces(tokenizer, kept(tokenizer, chat("yes</think>", "no</think>")))[1:]
    assert endings == (["yes", "</think>", "<|end|>"], ["no", "</think>", "<|end|>"])


def test_a_token_across_the_boundary_is_scored_whole_and_counted(hand):
    """`sa` + `y` is the one token `say`: the prompt keeps what both joined texts begin with."""
    tokenizer = hand["byte_level"]
    outcome = kept(tokenizer, strings(":sa", "y", " no"))
    assert outcome.boundary_moved
    assert pieces(tokenizer, outcome) == (
        [":"],
        ["say", "<|end|>"],
        ["sa", "Ġno", "<|end|>"],
    )


def test_all_that_the_tokenizer_puts_in_front_of_a_text_stays_there():
    """GLM's texts begin with `[gMASK]<sop>`, and it has no BOS."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["[gMASK]", "<sop>"])
    prefix = [(name, backend.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    backend.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    for prompt in ("the river", "[gMASK]<sop>the river"):
        pair = PreferencePair(prompt, " yes", " no", "rows.jsonl:1", "")
        actual = kept(tokenizer, pair).pair.prompt.tolist()
        assert actual == [*(id_ for _, id_ in prefix), *tokenizer("the river", add_special_tokens=False)["input_ids"]]
    long = PreferencePair("the river is behind the mill", " yes", " no", "rows.jsonl:1", "")
    cut = kept(tokenizer, long, max_prompt_length=3, truncation="keep_end_of_prompt").pair.prompt.tolist()
    assert cut == [*(id_ for _, id_ in prefix), tokenizer(" mill")["input_ids"][-1]]
    assert "prompt longer" in dropped(tokenizer, long, max_prompt_length=2, truncation="keep_end_of_prompt")


def test_a_prompt_that_vanishes_into_the_completion_needs_bos(hand):
    pair = strings("sa", "y", " no")
    assert dropped(hand["byte_level"], pair) == tokenization.EMPTY_PROMPT
    assert pieces(hand["bpe"], kept(hand["bpe"], pair))[0] == ["<s>"]
    assert pieces(hand["bpe"], kept(hand["bpe"], strings("")))[0] == ["<s>"]


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
FIRST = "<|im_start|>user\nsay<|im_end|>\n"


def thoughtful(prompt: tuple, chosen: tuple, **more) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as the template above writes them; nothing moved, nothing cut."""
    tokenizer = byte_level(THINKING)
    pair = PreferencePair(prompt, chosen, answer("no"), "rows.jsonl:1", "chat", **more)
    outcome = kept(tokenizer, pair, max_length=1000)
    assert not outcome.boundary_moved
    return tuple(tokenizer.decode(part) for part in (outcome.pair.prompt, outcome.pair.chosen, outcome.pair.rejected))


@pytest.mark.parametrize(
    "written", [{"content": "<think>\nplan\n</think>\n\nyes"}, {"content": "yes", "reasoning_content": "plan"}]
)
def test_thoughts_of_the_answer_are_scored(written):
    assert thoughtful((USER,), ({"role": "assistant", **written},)) == (
        FIRST + "<|im_start|>assistant\n",
        "<think>\nplan\n</think>\n\nyes<|im_end|>\n",
        EMPTY_THOUGHT + "no<|im_end|>\n",
    )


def test_without_thinking_the_empty_thought_belongs_to_the_prompt():
    prompt, chosen, rejected = thoughtful((USER,), answer("yes"), chat_template_kwargs={"enable_thinking": False})
    assert prompt == FIRST + "<|im_start|>assistant\n" + EMPTY_THOUGHT
    assert (chosen, rejected) == ("yes<|im_end|>\n", "no<|im_end|>\n")


def test_thoughts_of_earlier_turns_are_left_out_as_the_template_says():
    history = (USER, {"role": "assistant", "content": "<think>\nhidden\n</think>\n\nfirst"}, USER)
    prompt, chosen, _ = thoughtful(history, answer("yes"))
    assert prompt == FIRST + "<|im_start|>assistant\nfirst<|im_end|>\n" + FIRST + "<|im_start|>assistant\n"
    assert chosen == EMPTY_THOUGHT + "yes<|im_end|>\n"


def test_thoughts_before_a_call_of_a_tool_stay_while_its_question_is_the_last():
    call = {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [TOOL]}
    prompt, _, _ = thoughtful((USER, call, {"role": "tool", "content": "42"}), answer("yes"), tools=(TOOL,))
    assert prompt == (
        "<|im_start|>system\ntools: say<|im_end|>\n"
        + FIRST
        + "<|im_start|>assistant\n<think>\nlook\n</think>\n\n<tool_call>say</tool_call><|im_end|>\n"
        + "<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_of_several_turns_has_thoughts_in_the_last_alone():
    turns = (*answer("<think>\ngone\n</think>\n\nfirst"), USER, *answer("<think>\nkept\n</think>\n\nyes"))
    _, chosen, _ = thoughtful((USER,), turns)
    expected = "first<|im_end|>\n" + FIRST + "<|im_start|>assistant\n<think>\nkept\n</think>\n\nyes<|im_end|>\n"
    assert chosen == expected


def test_a_template_whose_prompt_is_no_prefix_is_cut_at_the_common_tokens_and_counted():
    opened = THINKING.replace("{%- if enable_thinking", "{{- '<think>plan' }}{%- if enable_thinking")
    assert opened != THINKING
    tokenizer = byte_level(opened)
    outcome = kept(tokenizer, chat(), max_length=1000)
    assert outcome.boundary_moved
    assert tokenizer.decode(outcome.pair.prompt).endswith("assistant\n<think>")
    assert tokenizer.decode(outcome.pair.chosen) == "\n\n</think>\n\nyes<|im_end|>\n"


def test_a_chat_needs_a_template_and_the_file_wins(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* set data\.chat_template"):
        kept(byte_level(None), chat())
    file = tmp_path / "template.jinja"
    file.write_text("Q{{ messages[0].content }}{% for m in messages[1:] %}A{{ m.content }}{% endfor %}")
    tokenizer = byte_level()
    pair = kept(tokenizer, chat(), chat_template=str(file)).pair
    assert tokenizer.decode(pair.prompt) == "Qsay"
    assert tokenizer.decode(pair.chosen) == "Ayes<|end|>"
    with pytest.raises(DataError, match=r"data\.chat_template: .*absent\.jinja cannot be read"):
        kept(tokenizer, chat(), chat_template=str(tmp_path / "absent.jinja"))


NAMED = {"default": "D{{ messages[-1].content }}", "tool_use": "T{{ messages[-1].content }}", "rag": "R"}


def test_a_tokenizer_with_several_templates_uses_the_one_for_tools_or_the_one_that_is_named():
    tokenizer = byte_level()
    tokenizer.chat_template = NAMED | {"rag": "R{{ messages[-1].content }}{{ documents }}"}

    def first(pair: PreferencePair, **settings) -> str:
        return tokenizer.decode(kept(tokenizer, pair, **settings).pair.prompt)[0]

    assert first(chat()) == "D"
    assert first(chat(tools=(TOOL,))) == "T"
    assert first(chat(chat_template_kwargs={"documents": [{"title": "t"}]}), chat_template="rag") == "R"
    assert first(chat(tools=(TOOL,)), chat_template="rag") == "R"


def test_templates_that_may_be_used_are_part_of_the_key():
    def key(templates: dict[str, str], name: str | None = None) -> str | None:
        tokenizer = byte_level()
        tokenizer.chat_template = templates
        return PairTokenizer(tokenizer, section(chat_template=name)).template

    keys = [key(NAMED), key(NAMED, "rag"), key(NAMED, "tool_use"), key(NAMED | {"tool_use": "U"})]
    assert len(set(keys)) == 4
    assert key(NAMED, "rag") == key({"rag": "R"}, "rag")


def test_a_template_that_is_not_there_or_not_chosen_is_named_with_those_that_are(tmp_path, monkeypatch):
    tokenizer = byte_level()
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    with pytest.raises(UserError, match=r"no chat template named 'default', only rag, tool_use; set data\.chat"):
        kept(tokenizer, chat())
    with pytest.raises(DataError, match=r"data\.chat_template: rga cannot be read .* has: rag, tool_use"):
        kept(tokenizer, chat(), chat_template="rga")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rag").write_text("F{{ messages[-1].content }}")
    with pytest.raises(DataError, match=r"rag is a template of the tokenizer and a file; write \./rag"):
        kept(tokenizer, chat(), chat_template="rag")
    assert tokenizer.decode(kept(tokenizer, chat(), chat_template="./rag").pair.chosen) == "yes<|end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ messages[9].content.x }}", "list object has no element 9"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_on_a_row_says_why(template, reason):
    (outcome,) = PairTokenizer(byte_level(template), section()).tokenize([chat()])
    assert isinstance(outcome, Dropped)
    assert outcome.reason == tokenization.TEMPLATE_FAILED
    assert reason in outcome.detail


def test_a_row_cannot_set_the_arguments_of_the_template_call():
    pair = chat(chat_template_kwargs={"tokenize": True, "add_generation_prompt": False})
    (outcome,) = PairTokenizer(byte_level(), section()).tokenize([pair])
    expected = "chat_template_kwargs cannot set add_generation_prompt, tokenize"
    assert outcome == Dropped("rows.jsonl:1", tokenization.TEMPLATE_FAILED, expected)


CALL = ({"role": "assistant", "content": "", "tool_calls": [TOOL]},)


@pytest.mark.parametrize(
    ("end", "completion", "expected"),
    [
        ("", answer("yes"), "yes<|end|>"),
        ("", answer("one\ntwo"), "one\ntwo<|end|>"),
        ("\n", answer("yes"), "yes\n<|end|>"),
        ("<|im_end|>\n", answer("yes"), "yes<|im_end|>\n"),
        ("<|end|>", answer("yes"), "yes<|end|>"),
        ("[/A]", answer("yes"), "yes[/A]"),
        ("", CALL, "call:say<|end|>"),
        ("<|im_end|>", CALL, "call:say<|im_end|>"),
    ],
)
def test_an_end_is_always_scored_the_templates_own_or_the_tokenizers(end, completion, expected):
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}call:{{ c.function.name }}{% endfor %}"
    tokenizer = byte_level(template + f"{{{{ {end!r} }}}}" + "{% endfor %}")
    outcome = kept(tokenizer, replace(chat(), chosen=completion))
    assert tokenizer.decode(outcome.pair.chosen) == expected


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (strings(chosen=" a", rejected=" a"), tokenization.EQUAL),
        (strings(chosen=" \n"), tokenization.EMPTY_CHOSEN),
        (strings(rejected=""), tokenization.EMPTY_REJECTED),
        (chat(rejected=" "), tokenization.EMPTY_REJECTED),
        (replace(chat(), chosen=()), tokenization.EMPTY_CHOSEN),
        (replace(strings(), judged_equal=True), tokenization.JUDGED_EQUAL),
    ],
)
def test_a_pair_without_a_preference_is_set_aside(pair, reason):
    assert dropped(byte_level(), pair) == reason


# --- truncation ----------------------------------------------------------------------------------

# Prompt `<s> ▁say : : : :` of 6 tokens, chosen of 5 with its end, rejected of 3.
LONG = strings("say::::", "::::", "::")
BOS_SAY = ["<s>", "▁say"]


@pytest.mark.parametrize(
    ("settings", "expected", "cuts"),
    [
        ({"max_length": 11}, (BOS_SAY + [":"] * 4, 5, 3), ()),
        ({"max_length": 10}, tokenization.PAIR_TOO_LONG, ()),
        ({"max_prompt_length": 5}, tokenization.PROMPT_TOO_LONG, ()),
        ({"max_length": 6}, tokenization.PROMPT_TOO_LONG, ()),
        ({"max_completion_length": 4}, tokenization.COMPLETION_TOO_LONG, ()),
        (
            {"max_length": 8, "truncation": "keep_start_of_prompt"},
            (["<s>", "▁say", ":"], 5, 3),
            (tokenization.PROMPT_END_CUT,),
        ),
        (
            {"max_length": 8, "truncation": "keep_end_of_prompt"},
            (["<s>", ":", ":"], 5, 3),
            (tokenization.PROMPT_START_CUT,),
        ),
        (
            {"max_prompt_length": 4, "truncation": "keep_end_of_prompt"},
            (["<s>", ":", ":", ":"], 5, 3),
            (tokenization.PROMPT_START_CUT,),
        ),
        (
            {"max_length": 6, "truncation": "keep_end_of_prompt"},
            tokenization.COMPLETION_TOO_LONG,
            (),
        ),
        (
            {"max_length": 10, "truncation": "keep_start"},
            (BOS_SAY + [":"] * 4, 4, 3),
            (tokenization.CHOSEN_CUT,),
        ),
        ({"max_length": 8, "truncation": "keep_start"}, tokenization.EQUAL_AFTER_CUT, ()),
        ({"max_length": 6, "truncation": "keep_start"}, tokenization.PROMPT_TOO_LONG, ()),
        (
            {"max_completion_length": 4, "truncation": "keep_start"},
            (BOS_SAY + [":"] * 4, 4, 3),
            (tokenization.CHOSEN_CUT,),
        ),
    ],
)
def test_a_pair_over_a_limit_is_cut_or_dropped_as_the_recipe_says(hand, settings, expected, cuts):
    tokenizer = hand["bpe"]
    if isinstance(expected, str):
        assert dropped(tokenizer, LONG, **settings) == expected
        return
    outcome = kept(tokenizer, LONG, **settings)
    prompt, n_chosen, n_rejected = expected
    assert pieces(tokenizer, outcome)[0] == prompt
    assert (len(outcome.pair.chosen), len(outcome.pair.rejected)) == (n_chosen, n_rejected)
    assert outcome.cuts == cuts
    # An end token is at the end of what was not cut, and nowhere else.
    ends = [ids[-1] == 2 for ids in (outcome.pair.chosen, outcome.pair.rejected)]
    assert ends == [tokenization.CHOSEN_CUT not in cuts, True]


def test_a_pair_that_fills_every_limit_is_kept_whole(hand):
    outcome = kept(hand["bpe"], LONG, max_prompt_length=6, max_completion_length=5, max_length=11)
    assert (outcome.cuts, len(outcome.pair.prompt), len(outcome.pair.chosen)) == ((), 6, 5)


@pytest.mark.parametrize(
    ("truncation", "limits", "reason", "tokens"),
    [
        ("drop", {"max_prompt_length": 5}, tokenization.PROMPT_TOO_LONG, 6),
        ("drop", {"max_length": 6}, tokenization.PROMPT_TOO_LONG, 6),
        ("drop", {"max_completion_length": 4}, tokenization.COMPLETION_TOO_LONG, 5),
        ("drop", {"max_length": 10}, tokenization.PAIR_TOO_LONG, 11),
        ("keep_start", {"max_prompt_length": 5}, tokenization.PROMPT_TOO_LONG, 6),
        ("keep_start", {"max_length": 6}, tokenization.PROMPT_TOO_LONG, 6),
        ("keep_start_of_prompt", {"max_completion_length": 4}, tokenization.COMPLETION_TOO_LONG, 5),
        ("keep_start_of_prompt", {"max_length": 6}, tokenization.COMPLETION_TOO_LONG, 5),
        ("keep_end_of_prompt", {"max_prompt_length": 1}, tokenization.PROMPT_TOO_LONG, 6),
    ],
)
def test_a_pair_dropped_for_a_limit_names_its_setting(hand, truncation, limits, reason, tokens):
    (outcome,) = PairTokenizer(hand["bpe"], section(truncation=truncation, **limits)).tokenize([LONG])
    ((name, limit),) = limits.items()
    assert outcome == Dropped("rows.jsonl:1", reason, f"{tokens} tokens, data.{name} is {limit}")


limits = st.integers(1, 14)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["drop", "keep_start", "keep_start_of_prompt", "keep_end_of_prompt"]),
    st.sampled_from(["bpe", "byte_level"]),
    limits,
    st.none() | limits,
    st.none() | limits,
    st.tuples(*(st.text("sayeno: ", min_size=1, max_size=9) for _ in range(3))),
)
def test_a_cut_pair_is_the_whole_pair_less_what_is_too_much(hand, mode, name, longest, prompt_limit, limit, texts):
    tokenizer = hand[name]
    (whole,) = PairTokenizer(tokenizer, section()).tokenize([strings(*texts)])
    if isinstance(whole, Dropped):  # equal answers, or a prompt that is gone
        return
    prompt, chosen, rejected = (part.tolist() for part in (whole.pair.prompt, whole.pair.chosen, whole.pair.rejected))
    limited = section(max_length=longest, max_prompt_length=prompt_limit, max_completion_length=limit, truncation=mode)
    (outcome,) = PairTokenizer(tokenizer, limited).tokenize([strings(*texts)])
    prompt_room = min(longest, prompt_limit or longest)
    room = min(longest - len(prompt), limit or longest)
    answer = max(len(chosen), len(rejected))
    fits = len(prompt) <= prompt_room and answer <= room
    bos = prompt[: prompt[0] == tokenizer.bos_token_id]
    if fits:
        expected = (prompt, chosen, rejected, ())
    elif mode == "keep_start" and len(prompt) <= prompt_room and room >= 1 and chosen[:room] != rejected[:room]:
        cuts = [(chosen, tokenization.CHOSEN_CUT), (rejected, tokenization.REJECTED_CUT)]
        expected = (prompt, chosen[:room], rejected[:room], tuple(cut for ids, cut in cuts if len(ids) > room))
    else:
        prompt_room = min(prompt_room, longest - answer)
        answers_fit = answer <= (limit or longest) and prompt_room >= 1 + len(bos)
        ends = {
            "keep_start_of_prompt": (prompt[: max(prompt_room, 0)], tokenization.PROMPT_END_CUT),
            "keep_end_of_prompt": (
                [*bos, *prompt[len(prompt) - prompt_room + len(bos) :]],
                tokenization.PROMPT_START_CUT,
            ),
        }
        expected = (ends[mode][0], chosen, rejected, (ends[mode][1],)) if mode in ends and answers_fit else None
    if expected is None:
        assert isinstance(outcome, Dropped)
        assert outcome.reason in (
            tokenization.PROMPT_TOO_LONG,
            tokenization.COMPLETION_TOO_LONG,
            tokenization.PAIR_TOO_LONG,
            tokenization.EQUAL_AFTER_CUT,
        )
        return
    assert isinstance(outcome, Kept), outcome
    actual = outcome.pair
    assert (actual.prompt.tolist(), actual.chosen.tolist(), actual.rejected.tolist(), outcome.cuts) == expected


# --- any text ------------------------------------------------------------------------------------

odd = st.sampled_from(
    ["", " ", "\x00", "\x1b[0m", "\r\n", "\u2028", "\ufeff", "e\u0301", "\U0001f468\u200d\U0001f469", "▁"]
)
any_text = st.builds(
    "".join,
    st.lists(
        st.one_of(
            odd,
            st.text(st.sampled_from(" abehrst:\n▁"), max_size=8),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            st.sampled_from(["long " * 1000]),
        ),
        max_size=4,
    ),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, object]:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    folders: dict[str, Path] = {
        kind: train_sentencepiece(
            tmp_path_factory.mktemp(kind), kind, **plain, control_symbols="<|im_start|>,<|im_end|>"
        )
        for kind in ("bpe", "unigram")
    }
    loaded = {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}
    for tokenizer in loaded.values():
        tokenizer.chat_template = CHATML
    return {"byte_level": byte_level(), **loaded}


def written(tokenizer, ids: np.ndarray) -> str:
    """What the pieces say, letter by letter: nothing is stripped or tidied as a decoder would."""
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    if "<0x00>" not in tokenizer.get_vocab():
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return bytes(letters[letter] for piece in pieces for letter in piece).decode("utf-8")
    codes = [bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.encode() for piece in pieces]
    return b"".join(codes).decode("utf-8").replace("▁", " ")


@pytest.mark.parametrize("name", ["byte_level", "bpe", "unigram"])
def test_scored_tokens_say_the_completion_and_nothing_of_the_prompt(trained, name):
    tokenizer = trained[name]
    pairs = PairTokenizer(tokenizer, section(max_length=100_000))
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    space = "" if name == "byte_level" else " "  # SentencePiece's dummy prefix, in front of a text and behind a symbol
    counts = {"strings": 0, "chat": 0}

    def check(prompt: str, chosen: str, pair, outcome: Kept, start: str, end: str) -> None:
        head = written(tokenizer, pair.prompt[int(pair.prompt[0] == tokenizer.bos_token_id) :])
        tail = written(tokenizer, pair.chosen)
        plain_prompt, plain_chosen = prompt.replace("▁", space or "▁"), chosen.replace("▁", space or "▁")
        assert head + tail == start + plain_prompt + plain_chosen + end
        assert tail.endswith(plain_chosen + end)
        if not outcome.boundary_moved and prompt:
            assert tail == plain_chosen + end

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(any_text, any_text, any_text)
    def both(prompt: str, chosen: str, rejected: str) -> None:
        if any(token in prompt + chosen + rejected for token in special):
            return  # text that spells a symbol is read as that symbol
        (plain,) = pairs.tokenize([strings(prompt, chosen, rejected)])
        if isinstance(plain, Kept):
            check(prompt, chosen, plain.pair, plain, space, tokenizer.eos_token)
            joined = tokenizer(prompt + chosen, add_special_tokens=False)["input_ids"]
            assert [*plain.pair.prompt.tolist(), *plain.pair.chosen.tolist()][-len(joined) - 1 : -1] == joined
            counts["strings"] += 1
        else:
            empty = not chosen.strip() or not rejected.strip() or chosen == rejected
            assert empty or plain.reason == tokenization.EMPTY_PROMPT
        message = {"role": "user", "content": prompt}
        (talk,) = pairs.tokenize([replace(chat(chosen, rejected), prompt=(message,))])
        if isinstance(talk, Kept):
            turn = f"<|im_start|>{space}user\n{prompt}<|im_end|>{space}\n<|im_start|>{space}assistant\n"
            check(turn, chosen, talk.pair, talk, "", f"<|im_end|>{space}\n")
            counts["chat"] += 1
        else:
            assert not chosen.strip() or not rejected.strip() or chosen == rejected

    both()
    assert min(counts.values()) > 20, counts


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "say", "arguments": {}}}]}


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_call_that_the_template_does_not_write_is_no_completion(field):
    """ChatML would have it as the end of a turn and nothing else."""
    pair = replace(chat(), **{field: (CALL,)})
    assert dropped(byte_level(), pair) == "chat template failed"
    assert kept(byte_level(THINKING), pair)


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_completion_without_a_token_is_set_aside(field):
    """It would be no sequence: nothing predicts it, and no hash has it."""
    tokenizer = byte_level(
        "{% for m in messages %}<|im_start|>{{ '' if m.content == 'hush' else m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    pair = replace(chat(), **{field: answer("hush")})
    assert dropped(tokenizer, pair) == f"{field} is empty"


def test_the_day_is_the_same_on_every_day():
    """A run that goes on tomorrow, or on a machine of its own cache, must have the prompts of today."""
    ask = "{% if strftime_now is defined %}{% set day = strftime_now( '%d %b %Y' ) %}{% endif %}"
    tokenizer = byte_level(ask + '{{ day }} {{ strftime_now("%Y-%m-%d") }}' + CHATML)
    prompt = kept(tokenizer, chat()).pair.prompt
    assert tokenizer.decode(prompt).startswith("26 Jul 2024 2024-07-26<|im_start|>user")


@pytest.mark.parametrize("open_side", ["chosen", "rejected"])
def test_an_end_is_added_to_the_completion_that_lacks_it(open_side):
    tokenizer = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not m.content.endswith('?') %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pair = kept(tokenizer, chat(**{open_side: "may I?"})).pair
    added, own = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    for side in ("chosen", "rejected"):
        scored = getattr(pair, side)
        assert (added in scored, own in scored) == (side == open_side, side != open_side)


def test_completions_that_only_their_ends_told_apart_are_equal():
    assert dropped(byte_level(), strings(chosen=" yes", rejected=" yes<|end|>")) == "chosen and rejected are equal"
