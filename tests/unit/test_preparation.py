"""The way from files to stored tokens: counts, messages, the store, several processes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console
from small_tokenizers import byte_level, train_sentencepiece

from dpo_scale.data import preparation, readers, token_pairs, token_store
from dpo_scale.data.planning import CostModel, Schedule, layout_costs, plan_step
from dpo_scale.data.preparation import check_rows, prepare_pairs
from dpo_scale.data.report import DataReport, describe, overlap
from dpo_scale.data.rows import Block
from dpo_scale.data.samples import SampledPair, SampledSequence, sample_pairs, show
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.errors import DataError, UserError
from dpo_scale.model.tokenizer import load_tokenizer
from dpo_scale.recipe import DataSection, DataSource


def row(prompt: str = "Q:", chosen: str = " yes", rejected: str = " no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, *rows: dict | str) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def prepare(tmp_path):
    """prepare_pairs with a store of its own."""

    def call(*paths: str, tokenizer=None, seed=0, **settings) -> tuple[TokenPairs, DataReport]:
        data = DataSection(train=list(paths), **{"cache_dir": str(tmp_path / "store"), "workers": 1, **settings})
        return prepare_pairs(data.train, data, tokenizer or byte_level(), seed=seed)

    return call


# --- counts --------------------------------------------------------------------------------------


def test_every_row_is_kept_or_counted_under_its_reason(tmp_path, prepare):
    path = write(
        tmp_path / "rows.jsonl",
        row(),
        row(rejected=" yes"),
        row(chosen="  "),
        row(prompt="word " * 60),
        row(rejected=" no" * 60),
        "{",
        {"prompt": "Q"},
        row(prompt="R:", chosen=" no", rejected=" certainly yes"),
    )
    pairs, report = prepare(path, max_length=50, on_bad_row="skip")
    (source,) = report.sources
    assert [pair.row for pair in pairs] == [f"{path}:1", f"{path}:8"]
    assert (report.rows_read, report.pairs_kept) == (8, 2)
    assert report.dropped == {
        "chosen and rejected are equal": 1,
        "chosen is empty": 1,
        "prompt longer than the limit": 1,
        "prompt and completion longer than data.max_length": 1,
        "not valid JSON": 1,
        "no field 'chosen' and no field 'rejected'": 1,
    }
    assert source.first_places["chosen is empty"] == f"{path}:3: chosen is empty"
    assert source.formats == {"prompt, chosen and rejected strings": 6}
    assert report.rejected_longer == 0.5


def test_real_dialogues_are_counted_as_plain_python_counts_them(prepare, hh_pairs_path):
    tokenizer = byte_level()
    expected = []
    with gzip.open(hh_pairs_path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            chosen, rejected = json.loads(line)["chosen"], json.loads(line)["rejected"]
            size = next(n for n in range(len(chosen), -1, -1) if rejected.startswith(chosen[:n]))
            cut = chosen[:size].rindex("\n\nAssistant:") + len("\n\nAssistant:")
            if chosen != rejected and chosen[cut:].strip() and rejected[cut:].strip():
                expected.append((number, chosen[:cut], chosen[cut:], rejected[cut:]))
    pairs, report = prepare(str(hh_pairs_path), tokenizer=tokenizer, max_length=100_000)
    assert report.rows_read == 1500
    assert report.pairs_kept == len(pairs) == len(expected)
    assert sum(report.dropped.values()) == 1500 - len(expected)
    assert report.sources[0].boundaries_moved == 0
    for pair, (number, prompt, chosen, rejected) in zip(pairs, expected, strict=True):
        assert pair.row == f"{hh_pairs_path}:{number}"
        assert tokenizer.decode(pair.prompt) == prompt
        assert tokenizer.decode(pair.chosen) == chosen + "<|end|>"
        assert tokenizer.decode(pair.rejected) == rejected + "<|end|>"
    lengths = [[len(tokenizer(part)["input_ids"]) for part in one[1:]] for one in expected]
    prompts, chosen_ids, rejected_ids = np.array(lengths).T
    assert report.prompt_tokens.mean == pytest.approx(prompts.mean())
    assert report.chosen_tokens.max == chosen_ids.max() + 1
    assert report.chosen_longer == pytest.approx((chosen_ids > rejected_ids).mean())
    assert report.rejected_longer == pytest.approx((chosen_ids < rejected_ids).mean())
    assert report.tokens == np.sum(lengths) + 2 * len(expected)
    assert report.tokens_saved_by_sharing == prompts.sum()
    for summary, counted in ((report.prompt_tokens, prompts), (report.chosen_tokens, chosen_ids + 1)):
        spread = np.percentile(counted, (5, 50, 95, 99), method="nearest").tolist()
        assert [summary.p5, summary.p50, summary.p95, summary.p99] == spread
        expected_bins = Counter((counted // summary.bin_tokens).tolist())
        assert dict(enumerate(summary.bins)) == {n: expected_bins[n] for n in range(len(summary.bins))}
        assert len(summary.bins) <= 50
    texts = [one[1:] for one in expected]
    assert report.duplicates == len(texts) - len(set(texts))
    assert report.contradictions == sum((prompt, rejected, chosen) in set(texts) for prompt, chosen, rejected in texts)


def test_sources_are_reported_one_by_one(tmp_path, prepare):
    first = write(tmp_path / "a.jsonl", row(), row("R:"))
    second = write(tmp_path / "b.jsonl", row("S:"), row(rejected=""))
    pairs, report = prepare(first, second)
    assert [(one.path, one.rows_read, one.pairs_kept) for one in report.sources] == [
        (first, 2, 2),
        (second, 2, 1),
    ]
    assert len(pairs) == 3


def test_repeated_and_reversed_pairs_are_counted(tmp_path, prepare):
    path = write(
        tmp_path / "rows.jsonl",
        row(),
        row(),
        row(chosen=" no", rejected=" yes"),
        row("R:"),
        row("R:", chosen=" maybe"),
    )
    _, report = prepare(path)
    assert report.duplicates == 1
    assert report.contradictions == 3  # two copies one way, one the other


def test_held_out_pairs_that_are_trained_on_are_counted():
    def pair(*parts: list[int]) -> TokenPair:
        return TokenPair(*(np.array(part, np.int32) for part in parts), "rows.jsonl:1")

    train = TokenPairs.from_pairs([pair([1], [2], [3]), pair([1, 2], [3], [4])])
    held_out = TokenPairs.from_pairs([pair([1], [2], [3]), pair([1], [2], [4]), pair([2], [1], [3])])
    both = overlap(train, held_out)
    assert (both.prompts, both.pairs) == (2, 1)


def test_equal_tokens_and_only_those_have_equal_hashes(monkeypatch):
    monkeypatch.setattr(token_pairs, "_BLOCK_PAIRS", 7)
    rng = np.random.default_rng(0)
    parts = [tuple(rng.integers(0, 2, rng.integers(1, 5)).tolist()) for _ in range(600)]
    pairs = TokenPairs.from_pairs(
        TokenPair(*(np.array(part, np.int32) for part in parts[i : i + 3]), "rows.jsonl:1") for i in range(0, 600, 3)
    )
    hashes = pairs.hashes.reshape(-1).tolist()
    assert len(set(zip(parts, hashes, strict=True))) == len(set(parts)) == len(set(hashes))


def test_the_report_survives_json_and_shows_its_counts(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", row(), row(rejected=" yes"), row("R:"))
    _, report = prepare(path)
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table("train"))
    text = console.export_text()
    for expected in ("rows read", "3", "dropped: chosen and rejected are equal", "kept", "2"):
        assert expected in text


def test_an_empty_set_has_a_report():
    report = describe(TokenPairs.from_pairs([]), ())
    assert (report.rows_read, report.pairs_kept, report.prompt_tokens.max) == (0, 0, 0)


# --- several sources -----------------------------------------------------------------------------


def test_a_row_of_weight_two_is_two_pairs_and_no_duplicate(tmp_path, prepare):
    twice = write(tmp_path / "a.jsonl", row("Q:"), row("R:"), row(rejected=""))
    once = write(tmp_path / "b.jsonl", row("S:"), row("R:"))
    pairs, report = prepare(DataSource(path=twice, weight=2.0), once)
    places = [f"{twice}:1", f"{twice}:1", f"{twice}:2", f"{twice}:2", f"{once}:1", f"{once}:2"]
    assert [pair.row for pair in pairs] == places
    assert np.array_equal(pairs[0].chosen, pairs[1].chosen)
    assert [(one.rows_read, one.pairs_kept, one.copies) for one in report.sources] == [(3, 4, 2), (2, 2, 0)]
    assert report.duplicates == 1  # "R:", which stands in both sources
    assert sum(report.dropped.values()) == 1


def test_half_a_source_is_drawn_by_the_seed_alone(tmp_path, prepare):
    path = write(tmp_path / "a.jsonl", *(row(f"{n}:") for n in range(200)))
    half = DataSource(path=path, weight=0.5)
    drawn = [pair.row for pair in prepare(half)[0]]
    assert 70 < len(drawn) < 130
    beside_another = write(tmp_path / "b.jsonl", row("R:"))
    assert [pair.row for pair in prepare(beside_another, half)[0]][1:] == drawn
    assert [pair.row for pair in prepare(half, seed=1)[0]] != drawn


def test_the_mix_of_a_step_is_that_of_the_sources_and_the_same_for_every_world_size(tmp_path, prepare):
    large = write(tmp_path / "a.jsonl", *(row(f"{n}:") for n in range(300)))
    small = write(tmp_path / "b.jsonl", *(row(f"{n}.") for n in range(50)))
    pairs, _ = prepare(large, DataSource(path=small, weight=6.0))
    assert len(pairs) == 600
    schedule = Schedule(len(pairs), global_pairs=100, seed=3, epochs=1)
    costs = layout_costs(pairs.lengths, "shared", CostModel())
    for step in range(schedule.num_steps):
        members = schedule.pairs_of(step)
        shares = Counter(pairs[index].row.rpartition(":")[0] for index in members.tolist())
        assert abs(shares[small] - 50) < 25  # 5 standard deviations
        for world_size in (1, 3, 8):
            plan = plan_step(members, costs, world_size=world_size, rank_tokens=200, step=step)
            assert sorted(plan.pairs().tolist()) == sorted(members.tolist())


def test_progress_counts_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 20)
    path = write(tmp_path / "rows.jsonl", *(row(f"{n}:") for n in range(50)), row(rejected=""))
    data = DataSection(train=[path], cache_dir=str(tmp_path / "store"), workers=1)
    told: list[int] = []
    for _ in range(2):  # the second finds the store filled, and has nothing to tell
        prepare_pairs(data.train, data, byte_level(), seed=0, progress=told.append)
        assert told == [20, 20, 11]


def test_samples_show_every_token_and_which_are_scored(tmp_path, prepare):
    tokenizer = byte_level()
    path = write(tmp_path / "rows.jsonl", *(row(f"question {n}:", " yes" * 30) for n in range(20)))
    pairs, _ = prepare(path, tokenizer=tokenizer)
    samples = sample_pairs(pairs, tokenizer, seed=0)
    assert len({sample.row for sample in samples}) == 5
    assert samples == sample_pairs(pairs, tokenizer, seed=0) != sample_pairs(pairs, tokenizer, seed=1)
    for sample in samples:
        pair = pairs[int(sample.row.rpartition(":")[2]) - 1]
        for sequence, completion in ((sample.chosen, pair.chosen), (sample.rejected, pair.rejected)):
            assert list(sequence.ids) == [*pair.prompt, *completion]
            assert list(sequence.scored) == [0] * len(pair.prompt) + [1] * len(completion)
            assert list(sequence.tokens) == [tokenizer.decode(id_) for id_ in sequence.ids]
    assert json.loads(json.dumps(asdict(samples[0])))["chosen"]["scored"][-1] == 1
    assert len(sample_pairs(TokenPairs.from_pairs(pairs[index] for index in range(3)), tokenizer, seed=0)) == 3
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(show(samples))
    shown = console.export_text()
    rejected = samples[0].rejected
    scored = [token for token, is_scored in zip(rejected.tokens, rejected.scored, strict=True) if is_scored]
    assert " " + "".join(f"[{token}]" for token in scored) in shown


def test_a_line_break_in_a_token_breaks_no_line():
    sequence = SampledSequence((1, 2, 3, 4), ("a\n", "b", "\n\t", "</s>"), (0, 0, 1, 1))
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(show((SampledPair("f:1", sequence, sequence),)))
    lines = console.export_text().splitlines()
    assert len(lines) == 4
    assert lines[2].endswith(r"a\n|b [\n\t][</s>]")


@pytest.mark.parametrize("kind", ["byte level", "bpe", "unigram"])
def test_samples_are_text_in_any_script(kind, tmp_path, prepare):
    text = " you\u2019re naïve \U0001f600 漢字"
    path = write(tmp_path / "rows.jsonl", row(f"été{text}:", text, f"{text}\ufffd"))
    folder = train_sentencepiece(tmp_path / kind, kind, normalization_rule_name="identity") if " " not in kind else None
    tokenizer = load_tokenizer(str(folder)) if folder else byte_level()
    pairs, _ = prepare(path, tokenizer=tokenizer)
    (sample,) = sample_pairs(pairs, tokenizer, seed=0)
    for sequence in (sample.chosen, sample.rejected):
        assert "".join(sequence.tokens) == tokenizer.decode(sequence.ids)
        assert len(sequence.tokens) == len(sequence.ids)
        assert {"\u2019", "\U0001f600", "漢", ""} <= set(sequence.tokens)
    scored = sum(sample.chosen.scored)
    assert "".join(sample.chosen.tokens[-scored:]) == text + tokenizer.eos_token
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(show((sample,)))
    assert "[\u2019][r" in console.export_text()


def test_a_character_that_is_cut_off_does_not_hide_what_follows():
    tokenizer = byte_level()
    parts = tokenizer("漢", add_special_tokens=False)["input_ids"]
    whole = np.array(tokenizer("yes")["input_ids"], np.int32)
    pair = TokenPair(np.array(parts[:1] * 6, np.int32), whole, np.array(parts[:2], np.int32), "f:1")
    (sample,) = sample_pairs(TokenPairs.from_pairs([pair]), tokenizer, seed=0)
    assert "".join(sample.chosen.tokens).lstrip("\ufffd") == "yes"
    assert sample.rejected.tokens[-1].endswith("\ufffd")
    assert not all(token == "" for token in sample.chosen.tokens[:5]), "bytes of no character wait for no end"


def test_sources_have_a_table_with_their_shares(tmp_path, prepare):
    paths = [write(tmp_path / name, row(name), row(rejected="")) for name in ("a.jsonl", "b.jsonl")]
    _, report = prepare(DataSource(path=paths[0], weight=3.0), paths[1])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in report.tables("train"):
        console.print(table)
    text = console.export_text()
    for expected in ("train by source", "75.0%", "25.0%", "50.0% rejected is empty", "further copies among them"):
        assert expected in text


# --- messages ------------------------------------------------------------------------------------


def test_bad_rows_are_reported_together_with_their_places(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", row(), "{", {"prompt": "Q", "chosen": "a"}, "[]", row("R"))
    with pytest.raises(DataError) as caught:
        prepare(path)
    message = str(caught.value)
    assert message.splitlines()[0] == "3 rows cannot be used"
    assert f"{path}:2: not valid JSON" in message
    assert f"{path}:3: no field 'rejected'; the row has 'prompt', 'chosen'" in message
    assert f"{path}:4: a row is an object with named fields, this is a list" in message
    assert "data.on_bad_row=skip" in message
    assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]


def test_at_most_twenty_bad_rows_are_listed(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", *({f"column {number}": ""} for number in range(50)))
    with pytest.raises(DataError, match="20 rows, and maybe more, cannot be used") as caught:
        prepare(path)
    assert str(caught.value).count("no field 'chosen'") == 20


def test_a_fault_of_many_rows_is_said_once_with_its_first_place(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", "{", row(), *["{"] * 2, "[]", *["7"] * 2)
    with pytest.raises(DataError) as caught:
        prepare(path)
    assert str(caught.value).splitlines()[:-1] == [
        "6 rows cannot be used",
        f"  {path}:1 and 2 more rows: not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        f"  {path}:5: a row is an object with named fields, this is a list",
        f"  {path}:6 and 1 more row: a row is an object with named fields, this is a number",
    ]


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize("columns", [None, {"chosen": "good", "rejected": "bad"}, {"chosen": "win"}])
def test_columns_of_other_names_are_asked_for_as_a_recipe_writes_them(tmp_path, name, columns):
    good = write(tmp_path / "good.jsonl", row())
    path = write(tmp_path / "rows.jsonl", *[{"question": "Q", "good": "yes", "bad": "no"}] * 45)
    lists = {"train": [good], "evaluate": [good], name: [good, {"path": path, "columns": columns}]}
    data = DataSection(**lists, cache_dir=str(tmp_path / "store"), workers=1)
    tokenize = partial(prepare_pairs, getattr(data, name), data, byte_level(), setting=f"data.{name}")
    for read in (partial(check_rows, data), tokenize):
        with pytest.raises(DataError) as caught:
            read(seed=0)
        _, fault, advice = str(caught.value).splitlines()
        assert fault.startswith(f"  {path}:1 and 19 more rows: no field ")
        assert fault.endswith("; the row has 'question', 'good', 'bad'; name its columns in data columns")
        assert advice == (
            f"data columns are written as data.{name}: "
            f"[{{path: {path}, columns: {{prompt: ..., chosen: ..., rejected: ...}}}}]"
        )


def test_advice_is_given_for_the_rows_that_are_listed(tmp_path, prepare):
    paths = [write(tmp_path / "a.jsonl", *["{"] * 30), write(tmp_path / "b.jsonl", {"question": "Q"})]
    with pytest.raises(DataError) as caught:
        prepare(*paths)
    assert len(str(caught.value).splitlines()) == 3
    assert str(caught.value).endswith("set data.on_bad_row=skip to leave them out and count them")


@pytest.mark.parametrize("other", [row(), "{"])
def test_rows_may_be_skipped_where_not_all_of_them_lack_fields(tmp_path, prepare, other):
    path = write(tmp_path / "rows.jsonl", {"question": "Q"}, other)
    with pytest.raises(DataError, match=r"data\.on_bad_row=skip .*\ndata columns are written as"):
        prepare(path)


def test_pairs_without_a_preference_stop_the_run_where_the_recipe_says_so(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", row(), row(rejected=" yes"))
    with pytest.raises(DataError, match=rf"{path}:2: chosen and rejected are equal") as caught:
        prepare(path, on_no_preference="error")
    assert "data.on_no_preference=skip" in str(caught.value)


def test_data_of_which_nothing_is_left_names_reason_place_and_fix(tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", row("word " * 40))
    with pytest.raises(DataError, match="no pair is left") as caught:
        prepare(path, max_length=20)
    place = f"1 dropped, first {path}:1: prompt longer than the limit"
    assert re.search(rf"{place} \(\d+ tokens, data\.max_length is 20\)", str(caught.value))
    assert str(caught.value).endswith("\nraise the limit, or choose another data.truncation")


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        ([], "name files with rows"),
        ([row(rejected=" yes")], "mend the data"),
        (
            [row(rejected=" yes"), row("word " * 30)],
            "mend the data, or raise the limit, or choose another data.truncation",
        ),
    ],
    ids=["nothing", "equal", "equal and long"],
)
def test_where_nothing_is_left_the_remedy_is_that_of_the_reasons(rows, remedy, tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        prepare(path, max_length=20)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["no pair is left to train on", f"  {path}: {len(rows)} rows read"]
    assert lines[-1] == remedy
    if rows:
        assert lines[2] == f"    1 dropped, first {path}:1: chosen and rejected are equal"


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "many lines"])
def test_an_array_in_a_file_of_lines_is_named_so(indent, tmp_path, prepare):
    path = write(tmp_path / "rows.jsonl", json.dumps([row()], indent=indent))
    with pytest.raises(DataError) as caught:
        prepare(path)
    assert f"\n  {path}:1: a JSON array in a file of one object a line; name the file .json" in str(caught.value)
    assert "skip" not in str(caught.value)  # which would leave none


def test_held_out_data_of_which_nothing_is_left_are_named_so(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    data = DataSection(train=[path], evaluate=[path], cache_dir=str(tmp_path / "store"), workers=1)
    with pytest.raises(DataError, match=r"^no held-out pair is left \(data\.evaluate\)\n"):
        prepare_pairs(data.evaluate, data, byte_level(), seed=0, setting="data.evaluate")


def test_missing_files_and_a_wrong_column_are_named_before_anything_is_read(tmp_path, prepare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", row())
    with pytest.raises(DataError) as caught:
        prepare("a.jsonl", path, "b*.jsonl")
    assert str(caught.value) == (
        "data.train: a.jsonl: no such file; b*.jsonl: no file matches this pattern; "
        f"relative paths count from the current folder, {tmp_path}"
    )
    with pytest.raises(DataError, match=r"^data\.train: .*absent\.jsonl: no such file$"):
        prepare(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="unknown field 'winner'"):
        prepare(DataSource(path=path, columns={"winner": "chosen"}))


def test_a_store_that_cannot_be_made_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", row())
    data = DataSection(train=[path], cache_dir=f"{path}/store")
    with pytest.raises(UserError, match=r"data\.cache_dir: .* choose another folder"):
        prepare_pairs(data.train, data, byte_level(), seed=0)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, prepare):
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token; set eos_token"):
        prepare(write(tmp_path / "rows.jsonl", row()), tokenizer=tokenizer)


# --- the store -----------------------------------------------------------------------------------


@pytest.fixture
def tokenized_chunks(monkeypatch) -> list[int]:
    """Rows of each chunk that was really tokenized."""
    calls: list[int] = []
    original = preparation._tokenize_block

    def counted(tokenizer, columns, block):
        calls.append(len(block))
        return original(tokenizer, columns, block)

    monkeypatch.setattr(preparation, "_tokenize_block", counted)
    return calls


def test_a_second_call_reads_the_store(tmp_path, prepare, tokenized_chunks):
    path = write(tmp_path / "rows.jsonl", row(), row("R:"), row(chosen=" yes é"))
    first, first_report = prepare(path)
    second, second_report = prepare(path)
    assert tokenized_chunks == [3]
    assert second.digest() == first.digest()
    assert [pair.row for pair in second] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert second_report == first_report
    assert not [path for path in (tmp_path / "store").glob(".*") if path.is_dir()]


@pytest.mark.parametrize(
    "change",
    ["data", "limit", "truncation", "tokenizer", "template", "columns", "sample", "weight", "seed"],
)
def test_whatever_decides_the_tokens_decides_the_store(tmp_path, prepare, tokenized_chunks, change):
    path = write(tmp_path / "rows.jsonl", row(), row("R:"))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    source = DataSource(path=path, rows=1 if change == "seed" else None)
    settings: dict = {"tokenizer": byte_level(), "chat_template": str(template)}
    prepare(source, **settings)
    if change == "data":
        write(tmp_path / "rows.jsonl", row(), row("S:"))
    elif change == "limit":
        settings["max_length"] = 99
    elif change == "truncation":
        settings["truncation"] = "keep_start"
    elif change == "tokenizer":
        settings["tokenizer"].add_tokens(["Q:"])
    elif change == "template":
        template.write_text("{{ messages }}!")
    elif change == "columns":
        source = DataSource(path=path, columns={"chosen": "rejected", "rejected": "chosen"})
    elif change == "sample":
        source = DataSource(path=path, rows=1)
    elif change == "weight":
        source = DataSource(path=path, weight=2.0)
    else:
        settings["seed"] = 1
    prepare(source, **settings)
    assert len(tokenized_chunks) == 2


def test_what_decides_nothing_leaves_the_store(tmp_path, prepare, tokenized_chunks):
    path = write(tmp_path / "rows.jsonl", row(), row("R:"))
    prepare(path, seed=0)
    os.utime(path)
    prepare(path, seed=1, workers=2)
    assert len(tokenized_chunks) == 1


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, prepare, monkeypatch):
    path = write(tmp_path / "rows.jsonl", row())

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(token_store, "describe", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(path)
    assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]
    pairs, _ = prepare(path)
    assert len(pairs) == 1


def test_what_a_killed_writer_left_is_removed_after_a_day_and_nothing_else(tmp_path, prepare):
    """`data.cache_dir: .` is a folder as good as any, with the user's .git in it."""
    store = tmp_path / "store"
    dead, alive = (f".{digit * 32}.{digit * 32}" for digit in "ab")
    for name, age_hours in ((dead, 25), (alive, 23), (".git", 25)):
        (store / name).mkdir(parents=True)
        (store / name / "tokens.i32").write_bytes(b"1234")
        for path in (store / name / "tokens.i32", store / name):
            os.utime(path, (time.time() - 3600 * age_hours,) * 2)
    prepare(write(tmp_path / "rows.jsonl", row()))
    assert {path.name for path in store.glob(".*") if path.is_dir()} == {alive, ".git"}


def test_a_full_disk_is_named(tmp_path, prepare, monkeypatch):
    class OnAFullDisk(token_store.PairWriter):
        def __init__(self, folder):
            super().__init__(folder)
            self._streams = {column: open("/dev/full", "wb") for column in self._streams}  # noqa: SIM115

    monkeypatch.setattr(token_store, "PairWriter", OnAFullDisk)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*store: No space left on device; make room"):
        prepare(write(tmp_path / "rows.jsonl", row()))
    assert not [path for path in (tmp_path / "store").glob(".*") if path.is_dir()]


def test_two_writers_of_one_store_agree(tmp_path, prepare, monkeypatch):
    """The second finds the first one's store in place when it wants to put down its own: no lock keeps it away."""
    path = write(tmp_path / "rows.jsonl", row(), row("R:"))
    original = preparation._tokenize_sources
    inner: list[TokenPairs] = []

    def interrupted(*args):
        original(*args)
        if not inner:
            inner.append(TokenPairs.from_pairs([]))  # the inner call tokenizes once
            inner[0] = prepare(path)[0]

    monkeypatch.setattr(preparation, "_tokenize_sources", interrupted)
    monkeypatch.setattr(token_store, "one_at_a_time", lambda path, while_waiting: nullcontext(False))
    outer, _ = prepare(path)
    assert outer.digest() == inner[0].digest()


def use_workers(monkeypatch, after_blocks, starting=False):
    """Blocks of 20 rows, of which workers get those after the first few; while these start, none."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 20)
    monkeypatch.setattr(preparation, "INLINE_BLOCKS", after_blocks)
    monkeypatch.setattr(preparation, "_are_starting", lambda signs: starting)


def test_worker_processes_give_what_this_process_gives(tmp_path, prepare, monkeypatch):
    rows = [row(f"question {n}:", " yes" * (n % 7 + 1), " no" * (n % 5 + 1)) for n in range(300)]
    rows[200] = row(rejected="")
    path = write(tmp_path / "rows.jsonl", *rows)
    alone, alone_report = prepare(path)
    use_workers(monkeypatch, after_blocks=2)
    many, many_report = prepare(path, workers=2, cache_dir=str(tmp_path / "other"))
    assert many.digest() == alone.digest()
    assert [pair.row for pair in many] == [pair.row for pair in alone]
    assert many_report == alone_report


def die(block: Block) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_this_process_works_on_while_others_start(tmp_path, prepare, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[row(f"question {n}:") for n in range(200)])
    alone, alone_report = prepare(path)
    use_workers(monkeypatch, after_blocks=1, starting=True)
    monkeypatch.setattr(preparation, "_work", die)
    many, many_report = prepare(path, workers=2, cache_dir=str(tmp_path / "other"))
    assert many.digest() == alone.digest()
    assert many_report == alone_report


def test_a_worker_that_is_killed_is_named(tmp_path, prepare, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[row()] * 100)
    use_workers(monkeypatch, after_blocks=1)
    monkeypatch.setattr(preparation, "_work", die)
    with pytest.raises(DataError, match=r"killed, as happens where the memory is full; lower data\.workers") as caught:
        prepare(path, workers=2)
    assert caught.value.may_pass  # as where a rank is killed


def press_ctrl_c(block: Block) -> preparation._Chunk:
    os.kill(os.getpid(), signal.SIGINT)
    return preparation._tokenize_block(*preparation._worker, block)


def test_ctrl_c_is_for_the_process_that_reads_to_act_on(tmp_path, prepare, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[row(f"question {n}:") for n in range(200)])
    alone, _ = prepare(path)
    use_workers(monkeypatch, after_blocks=1)
    monkeypatch.setattr(preparation, "_work", press_ctrl_c)
    try:
        pairs, _ = prepare(path, workers=2, cache_dir=str(tmp_path / "other"))
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("a worker passed Ctrl-C on as an error of its own")
    assert pairs.digest() == alone.digest()


DYING_PARENT = """
import os, pathlib, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from dpo_scale.data.preparation import _start_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (None, None))
    pathlib.Path("worker").write_text(str(pool.submit(os.getpid).result()))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(DYING_PARENT)
    parent = subprocess.run([sys.executable, script], cwd=tmp_path, check=False)
    assert parent.returncode == -signal.SIGKILL
    try:
        worker = psutil.Process(int((tmp_path / "worker").read_text()))
    except psutil.NoSuchProcess:
        return
    try:
        worker.wait(timeout=20)
    except psutil.TimeoutExpired:
        worker.kill()
        raise


def test_a_mistake_in_a_worker_process_reaches_the_user(tmp_path, prepare, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[row()] * 60, "{", *[row()] * 200)
    use_workers(monkeypatch, after_blocks=2)
    with pytest.raises(DataError, match=f"{path}:61: not valid JSON"):
        prepare(path, workers=2)


def test_rows_read_as_text_are_those_that_a_run_would_draw(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{name}.jsonl", row()) for name in ("train", "held_out")]
    seeds = []
    monkeypatch.setattr(preparation, "read_blocks", lambda source, seed: seeds.append(seed) or iter(()))
    check_rows(DataSection(train=paths[:1], evaluate=paths[1:]), seed=7)
    assert seeds == [7, preparation.HELD_OUT_SEED]
