"""Which rows become which pairs, and what is said of the others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data.preferences import PreferencePair, check_columns, to_preferences
from dpo_scale.data.row_values import RowError
from dpo_scale.data.rows import RawRow
from dpo_scale.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def read(fields: dict, columns: dict[str, str] | None = None) -> PreferencePair:
    (pair,) = to_preferences(RawRow("rows.jsonl:7", fields), columns)
    assert pair.row == "rows.jsonl:7"
    return pair


def parts(pair: PreferencePair) -> tuple:
    return pair.prompt, pair.chosen, pair.rejected


QUESTION, YES, NO = (user("Q"),), (assistant("yes"),), (assistant("no"),)
FORMATS = {
    "prompt, chosen and rejected strings": (
        {"prompt": "Q", "chosen": " yes", "rejected": " no"},
        ("Q", " yes", " no"),
    ),
    "chosen and rejected strings, prompt in both": (
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        ("The sky is", " blue", " green"),
    ),
    "Human/Assistant dialogues": (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: yes",
            "rejected": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: no",
        },
        ("\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant:", " yes", " no"),
    ),
    "whole chats, prompt in both": (
        {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
        (QUESTION, YES, NO),
    ),
    "prompt, chosen and rejected messages": (
        {"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        (QUESTION, YES, NO),
    ),
    "chats, prompt given and in both": (
        {
            "prompt": [user("Q")],
            "chosen": [user("Q"), assistant("yes")],
            "rejected": [user("Q"), assistant("no")],
        },
        (QUESTION, YES, NO),
    ),
    "whole chats and their prompt as text": (
        {
            "prompt": "Q",
            "chosen": [user("Q"), assistant("yes")],
            "rejected": [user("Q"), assistant("no")],
        },
        (QUESTION, YES, NO),
    ),
    "prompt string, completions as messages": (
        {"prompt": "Q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        (QUESTION, YES, NO),
    ),
    "prompt as messages, completion strings": (
        {"prompt": [user("Q")], "chosen": "yes", "rejected": "no"},
        (QUESTION, YES, NO),
    ),
    "whole chats, prompt in both, with a system field": (
        {
            "system": "Be brief.",
            "chosen": [user("Q"), assistant("yes")],
            "rejected": [user("Q"), assistant("no")],
        },
        ((system("Be brief."), user("Q")), YES, NO),
    ),
    "prompt, chosen and rejected strings, with a system field": (
        {"system": "", "prompt": "Q", "chosen": "yes", "rejected": "no"},
        (QUESTION, YES, NO),
    ),
    "ranked or scored completions, best against worst": (
        {"prompt": "Q", "completions": [" no", " so", " yes"], "scores": [1, 2.5, "4"]},
        ("Q", " yes", " no"),
    ),
    "two responses and a preference": (
        {"prompt": "Q", "response_1": " no", "response_2": " yes", "preference": 2},
        ("Q", " yes", " no"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_by_its_fields_and_named(name):
    fields, expected_parts = FORMATS[name]
    pair = read(fields)
    assert parts(pair) == expected_parts
    assert pair.format == name


def test_the_longest_common_run_of_messages_is_the_prompt():
    common = [system("S"), user("Q"), assistant("a"), user("R")]
    pair = read({"chosen": [*common, assistant("yes")], "rejected": [*common, assistant("no")]})
    assert parts(pair) == (tuple(common), YES, NO)


def test_a_dialogue_that_parts_early_is_cut_at_the_last_common_turn():
    start = "\n\nHuman: Q\n\nAssistant:"
    pair = read({"chosen": start + " a\n\nHuman: R\n\nAssistant: b", "rejected": start + " c"})
    assert parts(pair) == (start, " a\n\nHuman: R\n\nAssistant: b", " c")


def test_equal_dialogues_leave_empty_completions_behind_the_last_turn():
    text = "\n\nHuman: Q\n\nAssistant: a"
    assert parts(read({"chosen": text, "rejected": text})) == (text[:-2], " a", " a")


def test_columns_name_the_fields_of_another_data_set():
    ultrafeedback = {
        "instruction": "Q",
        "completions": [
            {"response": "yes", "overall_score": 9.0},
            {"response": "no", "overall_score": 2.0},
        ],
    }
    assert parts(read(ultrafeedback, {"prompt": "instruction"})) == ("Q", "yes", "no")
    nectar = {
        "prompt": "\n\nHuman: Q\n\nAssistant:",
        "answers": [{"answer": " no", "rank": 7.0}, {"answer": " yes", "rank": 1.0}],
    }
    assert parts(read(nectar, {"completions": "answers"})) == (nectar["prompt"], " yes", " no")
    helpsteer = {"context": [user("Q")], "response1": "yes", "response2": "no", "overall": -2}
    columns = {
        "prompt": "context",
        "response_1": "response1",
        "response_2": "response2",
        "preference": "overall",
    }
    assert parts(read(helpsteer, columns)) == (QUESTION, YES, NO)


def test_sharegpt_messages_and_null_fields_are_read_as_chat_messages():
    pair = read(
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"role": "assistant", "content": "no", "tool_calls": None},
        },
        {"prompt": "conversations"},
    )
    assert parts(pair) == (QUESTION, YES, NO)


def test_parts_of_text_are_joined_and_other_parts_refused():
    parted = {"role": "user", "content": [{"type": "text", "text": "first, "}, {"text": "then"}, " more"]}
    image = {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
    assert parts(read({"prompt": [parted], "chosen": "yes", "rejected": "no"}))[0] == (user("first, then more"),)
    with pytest.raises(RowError, match=r"a message of 'prompt' has a part that is not text \('image'\)"):
        read({"prompt": [image], "chosen": "yes", "rejected": "no"})


def test_tools_documents_and_template_variables_travel_with_the_pair():
    fields, _ = FORMATS["prompt, chosen and rejected messages"]
    pair = read(
        {
            **fields,
            "tools": '[{"name": "clock"}]',
            "documents": [{"title": "T"}],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    )
    assert pair.tools == ({"name": "clock"},)
    assert pair.chat_template_kwargs == {"enable_thinking": False, "documents": [{"title": "T"}]}


def test_answers_of_equal_merit_are_marked_as_judged_equal():
    for fields in (
        {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "Q", "response_1": "a", "response_2": "b", "preference": 0},
    ):
        pair = read(fields)
        assert parts(pair) == ("Q", "a", "b")
        assert pair.judged_equal
    assert not read({"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2]}).judged_equal


# --- which completions make pairs ----------------------------------------------------------------

JUDGED = {"prompt": "Q", "completions": ["five", "nine", "eight", "two"], "scores": [5, 9, 8, 2]}


@pytest.mark.parametrize(
    ("choice", "margin", "expected"),
    [
        ("best_against_worst", 0.0, [("nine", "two")]),
        ("best_against_worst", 6.9, [("nine", "two")]),
        ("best_against_worst", 7.0, []),
        (
            "all_pairs",
            0.0,
            [
                ("five", "two"),
                ("nine", "five"),
                ("nine", "eight"),
                ("nine", "two"),
                ("eight", "five"),
                ("eight", "two"),
            ],
        ),
        ("all_pairs", 3.0, [("nine", "five"), ("nine", "two"), ("eight", "two")]),
        ("all_pairs", 7.0, []),
        ("best_against_random", 6.0, [("nine", "two")]),
        ("best_against_random", 7.0, []),
    ],
)
def test_the_recipe_chooses_the_pairs_of_judged_completions(choice, margin, expected):
    pairs = to_preferences(RawRow("rows.jsonl:7", JUDGED), None, choice, margin)
    assert [(pair.chosen, pair.rejected) for pair in pairs if not pair.judged_equal] == expected
    assert [pair.judged_equal for pair in pairs] == [False] * len(expected) or [True]
    assert {pair.format for pair in pairs} == {f"ranked or scored completions, {choice.replace('_', ' ')}"}


def test_ranks_count_from_the_best():
    ranked = {"prompt": "Q", "completions": [{"text": "b", "rank": 2}, {"text": "a", "rank": 1}]}
    assert parts(read(ranked)) == ("Q", "a", "b")


def test_the_random_other_depends_on_the_content_and_on_nothing_else():
    def rejected(index: int, place: str = "rows.jsonl:7") -> str:
        fields = {**JUDGED, "completions": [f"{text} {index}" for text in JUDGED["completions"]]}
        (pair,) = to_preferences(RawRow(place, fields), None, "best_against_random")
        assert pair.chosen == f"nine {index}"
        return pair.rejected.split()[0]

    drawn = [rejected(index) for index in range(300)]
    assert drawn == [rejected(index, f"other.parquet:{300 - index}") for index in range(300)]
    counts = {text: drawn.count(text) for text in ("five", "eight", "two")}
    assert sum(counts.values()) == 300
    assert all(70 < count < 130 for count in counts.values()), counts  # 100 each, give or take 3.7 deviations


def test_a_flood_of_pairs_from_one_row_is_refused():
    many = {"prompt": "Q", "completions": list("ab" * 40), "scores": list(range(80))}
    assert len(to_preferences(RawRow("rows.jsonl:7", many))) == 1
    with pytest.raises(RowError, match="80 completions, which are too many for all_pairs"):
        to_preferences(RawRow("rows.jsonl:7", many), None, "all_pairs")


def test_completions_that_are_whole_chats_are_split_like_chats():
    chats = [[user("Q"), assistant("no")], [user("Q"), assistant("yes")]]
    pair = read({"completions": chats, "scores": [1, 2], "system": "S"})
    assert parts(pair) == ((system("S"), *QUESTION), YES, NO)
    assert pair.format == "ranked or scored completions, best against worst, with a system field"


def test_columns_name_the_keys_inside_of_completions():
    fields = {
        "prompt": "Q",
        "completions": [
            {"content": "raw", "shown": "no", "helpfulness": 1, "rating": 9},
            {"content": "raw", "shown": "yes", "helpfulness": 4, "rating": 0},
        ],
    }
    named = {"completions.text": "shown", "completions.score": "helpfulness"}
    assert parts(read(fields, named)) == ("Q", "yes", "no")
    named = {"completions.text": "shown", "completions.rank": "helpfulness"}
    assert parts(read(fields, named)) == ("Q", "no", "yes")


# --- rows that can be read in two ways -----------------------------------------------------------

WHOLE = {"prompt": "Q:", "chosen": "Q: yes", "rejected": "Q: no"}
CHATS = {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "completions": ["c", "d"], "scores": [1, 2]},
            "by 'chosen' and 'rejected', or by 'completions'; name the fields of one",
        ),
        (WHOLE, "both begin with it: are they whole texts, or answers that repeat it"),
        ({**CHATS, "prompt": "R"}, "ambiguous prompt; it is text that the chats .* do not begin with"),
        ({**CHATS, "prompt": [user("R")]}, "not both with the messages of the prompt"),
        (
            {"prompt": [user("Q")], "chosen": CHATS["chosen"], "rejected": [assistant("no")]},
            "not both with the messages",
        ),
        ({"system": "T", "prompt": [system("S"), user("Q")], "chosen": "a", "rejected": "b"}, "system message differ"),
        (
            {"prompt": "Q", "completions": [{"text": "a", "score": 1, "rank": 2}] * 2},
            "'score' and 'rank' for a score or a rank, .* name one as 'completions.score'",
        ),
        (
            {"prompt": "Q", "completions": [{"text": "a", "response": "b", "score": 1}] * 2},
            "'text' and 'response' for its text; name one as 'completions.text'",
        ),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 2], "ranks": [2, 1]}, "both 'scores' and 'ranks'"),
    ],
)
def test_a_row_that_can_be_read_in_two_ways_is_refused_and_both_are_named(fields, message):
    with pytest.raises(RowError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("fields", "columns", "expected"),
    [
        ({**WHOLE, "completions": ["c"]}, {"prompt": "", "completions": ""}, ("Q:", " yes", " no")),
        (WHOLE, {"prompt": "prompt"}, ("Q:", "Q: yes", "Q: no")),
        ({**CHATS, "prompt": "R"}, {"prompt": ""}, (QUESTION, YES, NO)),
        ({**CHATS, "prompt": None}, {"prompt": ""}, (QUESTION, YES, NO)),
        (
            {**JUDGED, "best": "a", "worst": "b"},
            {"chosen": "best", "rejected": "worst"},
            ("Q", "a", "b"),
        ),
        (
            {**JUDGED, "chosen": "a", "rejected": "b"},
            {"completions": "completions"},
            ("Q", "nine", "two"),
        ),
    ],
)
def test_columns_say_which_of_two_readings_is_meant(fields, columns, expected):
    assert parts(read(fields, columns)) == expected


def test_a_prompt_as_text_may_be_any_common_message_or_hold_the_last():
    chat = [system("S"), user("first"), assistant("a"), user("second")]
    fields = {"chosen": [*chat, *YES], "rejected": [*chat, *NO]}
    for prompt in ("first", " second\n", "[INST] second [/INST]", ""):
        assert parts(read({**fields, "prompt": prompt})) == (tuple(chat), YES, NO)


def test_the_same_chat_twice_is_two_equal_answers():
    chat = [user("Q"), assistant("yes")]
    assert parts(read({"chosen": chat, "rejected": chat})) == (QUESTION, YES, YES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no field 'chosen' and no field 'rejected'; the row has no fields; name its columns in data columns$"),
        ({"prompt": "Q", "chosen": "a", "loser": "b"}, "no field 'rejected'; the row has 'prompt'"),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, "field 'rejected' is null"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' has to be text or a list of"),
        ({"prompt": "Q", "chosen": "a", "rejected": [assistant("b")]}, "one of chosen and"),
        (
            {"question": "Q", "chosen": "abc", "rejected": "xyz"},
            "no field 'prompt', and chosen and rejected have .*; the row has 'question', 'chosen', 'rejected'",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "no 'Assistant:' turn in common"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "begin with different messages: there is no prompt$"),
        (
            {"id": [1], "conversations": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "no prompt; field 'conversations' was not read, data columns {prompt: conversations} reads it$",
        ),
        ({"chosen": [{"content": "a"}], "rejected": [user("b")]}, "'chosen' has no 'role'"),
        ({"chosen": [{"role": "user"}], "rejected": [user("b")]}, "'chosen' has no 'content'"),
        ({"prompt": "Q", "chosen": "a\ud800", "rejected": "b"}, "lone surrogate at character 2"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": [{"\udfff": 1}]}, "'tools' is not valid Unicode"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": [{"name": "t"}]}, "for chat templates, .* is text"),
        ({"chosen": "a b", "rejected": "a c", "system": "S"}, "'system' makes a chat of a row, and this one is text"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1]}, "a number for each of the 2 completions"),
        ({"completions": ["a", "b"], "scores": [1, 2]}, "no field 'prompt', which ranked .* has 'completions'"),
        ({"chosen": [{"role": "user", "content": 3}], "rejected": []}, "content of a message of 'chosen' has to be"),
        ({"prompt": "Q", "completions": ["a"]}, "a list of two or more"),
        ({"prompt": "Q", "completions": ["a", "b"]}, "no score and no rank"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [1, "x"]}, "a number, not 'x'"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": "["}, "'tools' is not valid"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b"}, "need a field 'preference'"),
    ],
)
def test_a_row_without_a_pair_is_refused_with_the_reason(fields, message):
    with pytest.raises(RowError, match=message):
        read(fields)


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(RowError, match=r"no field 'win', which columns names as 'chosen'; .*'good'"):
        read({"good": "a"}, {"chosen": "win"})


def test_an_unknown_name_in_columns_gets_a_suggestion():
    with pytest.raises(DataError, match="'choosen'; did you mean 'chosen'"):
        check_columns({"choosen": "a"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
messages = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), st.text(max_size=5) | json_values)
names = ["prompt", "chosen", "rejected", "system", "tools", "completions", "scores", "ranks"]
names += ["response_1", "response_2", "preference", "documents", "chat_template_kwargs"]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(names), json_values | messages | st.lists(messages)))
def test_any_row_gives_pairs_or_a_reason(fields):
    try:
        pairs = to_preferences(RawRow("rows.jsonl:7", fields))
    except RowError as error:
        assert str(error)  # noqa: PT017
    else:
        assert all(isinstance(pair, PreferencePair) for pair in pairs)


@pytest.mark.parametrize("columns", [{}, {"system": "context"}])
def test_a_row_without_a_system_message_is_a_chat_like_its_neighbours(columns):
    """One of two rows of a source would else be text without a template."""
    name = columns.get("system", "system")
    strings = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    assert parts(read({name: None, **strings}, columns)) == (QUESTION, YES, NO)
    assert parts(read({name: "S", **strings}, columns)) == ((system("S"), *QUESTION), YES, NO)
    assert parts(read(strings)) == tuple(strings.values())
