from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from misa_engine.cli.data import LoadedData, Reading, check_prepared, hold_out, load_data
from misa_engine.cli.data_files import TEXT_RECORD, text_records
from misa_engine.cli.record_formats import FORMATS
from misa_engine.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, *records: object) -> str:
    """JSON lines; a string is written as it stands."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def rows(loaded: LoadedData) -> list[dict]:
    return [dict(row) for row in loaded.dataset]


def error(source: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_data(source, **options)  # type: ignore[arg-type]
    return str(caught.value)


USER = {"role": "user", "content": "hello"}
BOT = {"role": "assistant", "content": "hi"}

GOOD: dict[str, tuple[dict, dict]] = {
    "text": ({"text": "a"}, {"text": "a"}),
    "prompt/completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    "prompt/completion messages": (
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": [USER], "completion": [BOT]},
    ),
    "messages": ({"messages": [USER, BOT]}, {"messages": [USER, BOT]}),
    "messages named conversations": ({"conversations": [USER, BOT]}, {"messages": [USER, BOT]}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[]"},
    ),
    "tokens": ({"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3]}),
    "prompt/response": ({"prompt": "a ", "response": "b"}, {"prompt": "a ", "completion": "b"}),
    "question/answer": ({"question": "a", "answer": " b"}, {"prompt": "a", "completion": " b"}),
    "instruction/response": ({"instruction": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "completion": "3"},
    ),
    "alpaca without input": (
        {"instruction": "Say it.", "output": " it "},
        {"prompt": "### Instruction:\nSay it.\n\n### Response:\n", "completion": "it"},
    ),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_every_shape_arrives_in_the_columns_that_trl_knows(name: str, ending: str, tmp_path: Path) -> None:
    record, expected = GOOD[name]
    record = {**record, "source": "a column that training must not see"}
    path = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        write(path, record, record)
    elif ending == "json":
        path.write_text(json.dumps([record, record], indent=1))
    else:
        from datasets import Dataset

        Dataset.from_list([record, record]).to_parquet(path)
    assert rows(load_data(str(path))) == [expected, expected]


def test_a_stray_prompt_column_beside_messages_is_dropped(tmp_path: Path) -> None:
    loaded = load_data(write(tmp_path / "a.jsonl", {"messages": [USER, BOT], "prompt": "x", "text": "y"}))
    assert loaded.dataset.column_names == ["messages"]


def test_text_field_names_another_column(tmp_path: Path) -> None:
    loaded = load_data(write(tmp_path / "a.jsonl", {"content": "x", "text": 5}), reading=Reading("content"))
    assert rows(loaded) == [{"content": "x"}]
    both = write(tmp_path / "b.jsonl", {"content": "x", "messages": [USER, BOT]})
    assert rows(load_data(both, reading=Reading("content"))) == [{"content": "x"}]
    assert "there is no column 'body' (--dataset_text_field); found: 'content', 'messages'" in error(
        both, reading=Reading("body")
    )


def test_json_file_may_wrap_its_records_or_hold_lines_or_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ('{"version": 1, "data": [{"text": "a"}]}', '{"text": "a"}\n', '[{"text": "a"}]', '{\n"text":\n"a"}'):
        path.write_text(text)
        assert rows(load_data(str(path))) == [{"text": "a"}], text
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert rows(load_data(str(path))) == [{"text": "a"}, {"text": "b"}]


def test_byte_order_mark_blank_lines_and_crlf_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert rows(load_data(str(path))) == [{"text": "a"}, {"text": "b"}]


def test_directory_reads_its_files_in_order_and_refuses_a_mixture(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "2"})
    write(tmp_path / "a.jsonl", {"text": "1", "id": 7})
    assert rows(load_data(str(tmp_path))) == [{"text": "1"}, {"text": "2"}]
    (tmp_path / "notes.txt").write_text("hello")
    assert "mixes kinds of files: a.jsonl, notes.txt" in error(str(tmp_path))


def test_directory_of_records_in_two_shapes_names_the_file_that_differs(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "1"})
    write(tmp_path / "b.jsonl", {"prompt": "1", "completion": "2"})
    assert "b.jsonl, line 1: column 'text' is missing (found: 'prompt', 'completion')" in error(str(tmp_path))


def test_held_out_files_of_a_directory_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", {"text": "1"})
    write(tmp_path / "extra.jsonl", {"text": "2"})
    write(tmp_path / "val.jsonl", {"text": "3"})
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "a.jsonl", {"text": "4"})
    assert [row["text"] for row in rows(load_data(str(tmp_path)))] == ["2", "1"]
    assert rows(load_data(str(tmp_path), split="validation")) == [{"text": "3"}]
    assert rows(load_data(str(tmp_path), split="test")) == [{"text": "4"}]
    assert "holds nothing of split 'dev'" in error(str(tmp_path), split="dev")
    assert "is one file and has no split 'test'" in error(str(tmp_path / "val.jsonl"), split="test")


def test_plain_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 300 for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    loaded = load_data(str(path))
    records = loaded.dataset["text"]
    assert loaded.text_only and len(records) > 3
    assert "\n\n".join(records) == "\n\n".join(paragraphs)
    assert all(len(record) < TEXT_RECORD + 2000 for record in records)
    assert text_records("one long line" * 5000) == ["one long line" * 5000]


@pytest.mark.parametrize("line", ["one long line " * 9999, "without-white-space" * 9999, "ü" * 30_000_000])
def test_a_book_in_one_line_is_cut_and_loses_nothing(line: str) -> None:
    records = text_records(f"first\n\n{line}")
    assert records[0] == "first" and "".join(records[1:]) == line
    assert all(len(record) <= TEXT_RECORD + 10 for record in records)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_record_that_no_tokenizer_would_finish_is_refused_with_its_size(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    file = tmp_path / f"data.{suffix}"
    records = [{"text": "short"}, {"text": "x" * 30_000_000}]
    if suffix == "parquet":
        Dataset.from_list(records).to_parquet(file)
    elif suffix == "json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="(line|record) 2.* has 30,000,0.. characters; a record may have 4,194,304"):
        load_data(str(file))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_without_a_bottom_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"data.{suffix}").write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(UserError, match="line 1: JSON nested too deeply"):
        load_data(str(tmp_path / f"data.{suffix}"))


BROKEN: dict[str, tuple[list, str]] = {
    "second line broken": (
        ['{"text": "a"}', '{"text": '],
        "line 2, column 9: broken JSON (Expecting value): '{\"text\":'",
    ),
    "a list": (['{"text": "a"}', "[1, 2]"], "line 2: a record must be an object with named columns; found list [1, 2]"),
    "unknown columns": (
        [{"ask": "a", "reply": "b"}],
        "line 1: columns found: 'ask', 'reply'; needed: 'text'; 'prompt' and 'completion' (or 'response'); 'question'",
    ),
    "misspelt column": ([{"mesages": []}], "Did you mean messages?"),
    "wrong type later": ([{"text": "a"}, {"text": 5}], "line 2: column 'text' is number 5; it must be text"),
    "wrong type first": ([{"prompt": 5, "completion": "a"}], "line 1: column 'prompt' is number 5; it must be text"),
    "null": ([{"text": "a"}, {"text": None}], "line 2: column 'text' is null"),
    "column missing later": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
        "line 2: column 'completion' is missing (found: 'prompt')",
    ),
    "message without role": (
        [{"messages": [USER]}, {"messages": [{"content": "x"}]}],
        "line 2: column 'messages' holds object {\"content\": \"x\"} as message 1; it needs 'role' and 'content'",
    ),
    "empty conversation": ([{"messages": []}], "line 1: column 'messages' is list []; it must be a list of {role"),
    "alpaca input of wrong type": (
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": 3, "output": "b"}],
        "line 2: column 'input' is number 3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_named_with_file_line_and_remedy(name: str, tmp_path: Path) -> None:
    records, expected = BROKEN[name]
    source = write(tmp_path / "data.jsonl", *records)
    message = error(source)
    assert message.startswith(f"{source}, line") and expected in message


def test_broken_json_document_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n {"text": oops}\n]')
    assert "line 3, column 11: broken JSON" in error(str(path))


def test_json_document_with_a_wrong_record_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": 1}]')
    assert "a.json, record 2: column 'text' is number 1" in error(str(path))


def test_parquet_with_nulls_or_garbage_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(path)
    assert "record 2: column 'text' is null" in error(str(path))
    path.write_bytes(b"this is no parquet file")
    assert "cannot be read as parquet" in error(str(path))


def test_files_that_are_not_there_or_empty_or_strange(tmp_path: Path) -> None:
    assert "does not exist" in error(str(tmp_path / "no.jsonl"))
    assert "does not exist" in error("no.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in error(str(tmp_path / "empty.jsonl"))
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert "holds no records" in error(str(tmp_path / "blank.jsonl"))
    (tmp_path / "list.json").write_text("[]")
    assert "holds no records" in error(str(tmp_path / "list.json"))
    (tmp_path / "blank.txt").write_text(" \n")
    assert "white space" in error(str(tmp_path / "blank.txt"))
    (tmp_path / "data.xlsx").write_text("x")
    assert "no known ending" in error(str(tmp_path / "data.xlsx"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "not UTF-8 text: byte 3 is 0xe9" in error(str(tmp_path / "latin.txt"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "not UTF-8 text" in error(str(tmp_path / "latin.jsonl"))
    (tmp_path / "sub").mkdir()
    assert "holds no file" in error(str(tmp_path / "sub"))


def test_unknown_hub_name_says_that_there_is_no_such_file_either(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "no such file or directory" in error("nobody/nothing")


def test_hub_data_set_is_loaded_by_split_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[tuple] = []

    def load(source: str, config: str | None, split: str, streaming: bool) -> object:
        seen.append((source, config, split, streaming))
        data = datasets.Dataset.from_list([{"instruction": "a", "output": "b"}] * 3)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    for streaming in (False, True):
        loaded = load_data("owner/name", config="en", split="validation", streaming=streaming)
        assert [row["completion"] for row in loaded.dataset] == ["b"] * 3
        assert set(rows(loaded)[0]) == {"prompt", "completion"}
    assert seen == [("owner/name", "en", "validation", False), ("owner/name", "en", "validation", True)]


def test_hold_out_is_the_same_for_the_same_seed_and_disjoint(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100)))).dataset
    train, held = hold_out(data, 0.05, seed=3)
    again = hold_out(data, 0.05, seed=3)[1]
    assert len(held) == 5 and held["text"] == again["text"]
    assert sorted([*train["text"], *held["text"]], key=int) == [str(i) for i in range(100)]
    assert held["text"] != hold_out(data, 0.05, seed=4)[1]["text"]
    one_left = hold_out(data.select(range(2)), 0.99, seed=0)
    assert [len(part) for part in one_left] == [1, 1]
    with pytest.raises(UserError, match="at least 2"):
        hold_out(data.select([0]), 0.5, seed=0)


def test_nothing_left_after_preparation_is_an_error(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "a.jsonl", {"text": "x"})).dataset
    check_prepared(data, "training", 8)
    with pytest.raises(UserError, match="no sample of the training data is left: with max_length=8"):
        check_prepared(data.select([]), "training", 8)


def test_shapes_are_consistent() -> None:
    for format in FORMATS:
        assert len(format.needed) == len(format.kinds)
        assert format.rename is None or format.rename[0] in format.needed


def test_a_readme_beside_the_data_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    write(tmp_path / "train.jsonl", {"text": "a"})
    assert rows(load_data(str(tmp_path))) == [{"text": "a"}]


def test_csv_is_read_and_an_empty_cell_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('question,answer\n"a, b",c\nd,e\n')
    expected = [{"prompt": "a, b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    assert rows(load_data(str(file))) == expected
    file.write_text("question,answer\na,b\nc,\n")
    assert "record 2: column 'answer' is null" in error(str(file))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_packed_files_are_read_and_damaged_ones_named(tmp_path: Path, ending: str, packing: str) -> None:
    content = {"jsonl": '{"text": "ab c"}\n', "csv": "text\nab c\n", "tsv": "text\tn\nab c\t1\n", "txt": "ab c\n"}[
        ending
    ]
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing](content.encode())
    file = tmp_path / f"data.{ending}.{packing}"
    file.write_bytes(packed)
    assert [row["text"].strip() for row in rows(load_data(str(file)))] == ["ab c"]
    assert [row["text"].strip() for row in rows(load_data(str(tmp_path)))] == ["ab c"]
    file.write_bytes(packed[: len(packed) // 2])
    assert str(file) in error(str(file)) and "cannot be" in error(str(file))
    file.write_text("not packed at all")
    assert str(file) in error(str(file)) and "cannot be" in error(str(file))


def test_columns_says_which_is_which_in_every_kind_of_file(tmp_path: Path) -> None:
    reading = Reading.of("text", "sft", "prompt=q, completion=a")
    record = {"q": "one", "a": "two", "prompt": "another column of that name"}
    lines = write(tmp_path / "a.jsonl", record)
    (tmp_path / "a.csv").write_text("q,a,prompt\none,two,other\n")
    for source in (lines, str(tmp_path / "a.csv")):
        assert rows(load_data(source, reading=reading)) == [{"prompt": "one", "completion": "two"}]
    swapped = Reading.of("text", "sft", "prompt=completion,completion=prompt")
    both = write(tmp_path / "b.jsonl", {"prompt": "x", "completion": "y"})
    assert rows(load_data(both, reading=swapped)) == [{"prompt": "y", "completion": "x"}]
    missing = Reading.of("text", "sft", "prompt=qq,completion=a")
    assert "no column 'qq' (--columns prompt=qq); found: 'q', 'a', 'prompt'. Did you mean q?" in error(
        lines, reading=missing
    )


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ("prompt", "takes known=yours"),
        ("promt=q", "no format has a column 'promt'. Did you mean prompt?"),
        ("prompt=a,prompt=b", "names prompt twice"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(columns: str, text: str) -> None:
    with pytest.raises(UserError, match=text.replace("?", "[?]")):
        Reading.of("text", "sft", columns)


PREFERRED: dict[str, tuple[dict, dict]] = {
    "texts": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score": 1},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "messages": (
        {"prompt": [USER], "chosen": [BOT], "rejected": [USER]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [USER]},
    ),
    "whole texts": ({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a c"}),
    "a text prompt that the answers repeat": (
        {"prompt": "hello", "chosen": [USER, BOT], "rejected": [USER, USER]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [USER]},
    ),
    "a text prompt that they do not repeat": (
        {"prompt": "hello", "chosen": [BOT], "rejected": [{"role": "assistant", "content": "no"}]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [{"role": "assistant", "content": "no"}]},
    ),
}


@pytest.mark.parametrize("name", PREFERRED)
def test_preferences_arrive_in_the_columns_that_trl_knows(name: str, tmp_path: Path) -> None:
    record, expected = PREFERRED[name]
    loaded = load_data(write(tmp_path / "a.jsonl", record, record), reading=Reading(objective="dpo"))
    assert rows(loaded) == [expected, expected]


def test_preferences_and_texts_are_told_apart_with_the_remedy(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "train on them with --objective dpo" in error(pairs)
    text = write(tmp_path / "text.jsonl", {"text": "a"})
    assert "--objective dpo needs 'chosen' and 'rejected'" in error(text, reading=Reading(objective="dpo"))
    (tmp_path / "book.txt").write_text("words")
    assert "is plain text" in error(str(tmp_path / "book.txt"), reading=Reading(objective="dpo"))
