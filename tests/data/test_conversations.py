"""Every format that instruction data come in, and every way in which a record can be malformed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.conversations import FORMATS, conversations, file_conversations
from chinese_llama.errors import BadFile, UserError

SYSTEM = {"role": "system", "content": "简短"}
Q1, A1 = {"role": "user", "content": "问一"}, {"role": "assistant", "content": "答一"}
Q2, A2 = {"role": "user", "content": "问二"}, {"role": "assistant", "content": "答二"}
WITH_INPUT = {"role": "user", "content": "反义词\n大", "instruction": "反义词", "input": "大"}


def put(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def openai(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def alpaca(instruction: Any = "问一", output: str = "答一", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


READ = [
    ("alpaca", alpaca(), [Q1, A1]),
    ("alpaca", alpaca(input="", system=None, history=[], id=3), [Q1, A1]),
    ("alpaca", alpaca(input=None), [Q1, A1]),
    ("alpaca", alpaca("反义词", "答一", input="大"), [WITH_INPUT, A1]),
    ("alpaca", alpaca("问二", "答二", history=[["问一", "答一"]], system="简短"), [SYSTEM, Q1, A1, Q2, A2]),
    ("belle", alpaca("Human:问一\nAssistant:答一\nHuman:问二\nAssistant:", "答二"), [Q1, A1, Q2, A2]),
    ("belle", alpaca("Human: 问一\n\nAssistant: 答一\n\nHuman: 问二\n\nAssistant: ", "答二"), [Q1, A1, Q2, A2]),
    ("belle", alpaca("Human:问一\nAssistant:", "答一", input=""), [Q1, A1]),
    ("sharegpt", sharegpt(("human", "问一"), ("gpt", "答一"), id="x"), [Q1, A1]),
    ("sharegpt", sharegpt(("user", "问一"), ("chatgpt", "答一"), ("human", "问二"), ("bing", "答二")),
     [Q1, A1, Q2, A2]),
    ("sharegpt", sharegpt(("system", "简短"), ("human", "问一"), ("Assistant", "答一")), [SYSTEM, Q1, A1]),
    ("sharegpt", sharegpt(("human", "问一"), ("gpt", "答一"), system="简短"), [SYSTEM, Q1, A1]),
    ("sharegpt", sharegpt(("system", " "), ("human", "问一"), ("gpt", "答一")), [Q1, A1]),
    ("openai", openai(("user", "问一"), ("assistant", "答一")), [Q1, A1]),
    ("openai", openai(("system", "简短"), ("user", "问一"), ("assistant", "答一")), [SYSTEM, Q1, A1]),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("format", "record", "wanted"), READ)
def test_every_format_gives_messages_and_is_recognised(
    tmp_path: Path, format: str, record: Any, wanted: Any, suffix: str
) -> None:
    path = put(tmp_path / f"a{suffix}", record if suffix == ".jsonl" else [record])
    assert list(conversations(path, format)) == list(conversations(path)) == [wanted]


def test_the_belle_format_has_single_questions_and_conversations_too(tmp_path: Path) -> None:
    records = [
        alpaca("Human:问一\nAssistant:答一\nHuman:问二\nAssistant:", "答二"),
        alpaca("反义词", "答一", input="大"),
        sharegpt(("human", "问一"), ("assistant", "答一")),
        alpaca("Human:是什么意思？", "人。"),
    ]
    found = list(conversations(put(tmp_path / "a.jsonl", *records), "belle"))
    assert found[:3] == [[Q1, A1, Q2, A2], [WITH_INPUT, A1], [Q1, A1]]
    assert found[3][0]["content"] == "Human:是什么意思？"


def test_texts_come_as_they_are(tmp_path: Path) -> None:
    """White space and control tokens of the records stay; only a BELLE dialogue is cut out of its text."""
    text = " \n<s>[INST] 一  </s>\n"
    for record in (alpaca(text, text), sharegpt(("human", text), ("gpt", text))):
        (found,) = conversations(put(tmp_path / "a.jsonl", record))
        assert [message["content"] for message in found] == [text, text]


def test_each_file_of_a_directory_is_recognised_by_itself(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", alpaca())
    put(tmp_path / "b.jsonl", sharegpt(("human", "问二"), ("gpt", "答二")))
    put(tmp_path / "c.json", [openai(("user", "问一"), ("assistant", "答一"))])
    table = pyarrow.table(
        {"conversations": [sharegpt(("human", "问二"), ("gpt", "答二"))["conversations"]] * 2}
    )
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert list(conversations(tmp_path)) == [[Q1, A1], [Q2, A2], [Q1, A1], [Q2, A2], [Q2, A2]]


def test_what_is_said_before_the_first_question_and_questions_without_an_answer_are_dropped(
    tmp_path: Path,
) -> None:
    greeted = sharegpt(
        ("system", "简短"), ("gpt", "您好"), ("human", "问一"), ("gpt", "答一"), ("human", "问二")
    )
    asked_twice = sharegpt(("human", "问一"), ("gpt", "答一"), ("human", "在吗"), ("human", "问二"))
    path = put(tmp_path / "a.jsonl", greeted, asked_twice)
    assert list(conversations(path)) == [[SYSTEM, Q1, A1], [Q1, A1]]


ROLES = st.sampled_from(["system", "human", "gpt"])


@settings(max_examples=200, deadline=None)
@given(turns=st.lists(st.tuples(ROLES, st.sampled_from(["一", "二", " "])), max_size=6))
def test_whatever_is_read_begins_with_a_question_and_ends_with_an_answer(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]]
) -> None:
    path = put(tmp_path_factory.getbasetemp() / "turns.jsonl", sharegpt(*turns))
    left_out: Counter[str] = Counter()
    found = list(file_conversations(path, "sharegpt", "skip", left_out))
    assert len(found) + left_out.total() == 1
    for messages in found:
        roles = [message["role"] for message in messages]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        texts = iter(text for _, text in turns)  # in order, none invented
        assert all(message["content"].strip() and message["content"] in texts for message in messages)


MALFORMED = [
    ("auto", "[1, 2]", r"line 2: is no alpaca or belle record: it is no mapping \(found: list\)"),
    ("alpaca", {"instruction": "x"}, r"line 2: is no alpaca record: it has no 'output' \(found: instruction\)"),
    ("alpaca", {"output": "x"}, r"is no alpaca record: it has no 'instruction' \(found: output\)"),
    ("alpaca", alpaca(["x"]), r"is no alpaca record: its 'instruction' is not text"),
    ("alpaca", alpaca(input=3), r"its 'input' is not text"),
    ("alpaca", alpaca(history=["x"]), r"its 'history' is not a list of pairs of texts"),
    ("alpaca", alpaca(history=[["x", "y", "z"]]), r"its 'history' is not a list of pairs of texts"),
    ("alpaca", alpaca("half a pair: \ud83d"), r"line 2: holds half a surrogate pair"),
    ("alpaca", '{"instruction": ', r"line 2: is not valid JSON"),
    ("belle", alpaca("Human:一\nHuman:二\nAssistant:"), r"is no belle record: turn 2 is the user's, not the assistant's"),
    ("belle", {"conversations": "x"}, r"is no belle record: it has no list 'conversations'"),
    ("sharegpt", {"id": 1}, r"is no sharegpt record: it has no list 'conversations' \(found: id\)"),
    ("sharegpt", {"conversations": ["x"]}, r"turn 1 is not \{'from', 'value'\}"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, r"it has no 'value' \(found: from\)"),
    ("sharegpt", sharegpt(("human", "x"), ("tool", "y")), r"turn 2 is from 'tool'; known are system, human, user"),
    ("sharegpt", sharegpt(("human", "x"), ("gpt", "y"), ("gpt", "z")), r"turn 3 is the assistant's, not the user's"),
    ("sharegpt", sharegpt(("human", "x"), ("system", "y"), ("gpt", "z")), r"turn 2 is the system's, not the assistant's"),
    ("openai", {"messages": [{"role": "user", "content": [1]}]}, r"is no openai record: its 'content' is not text"),
    ("openai", openai(("developer", "x")), r"turn 1 is from 'developer'"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "record", "message"), MALFORMED)
def test_a_malformed_record_says_where_and_what_or_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, record: Any, message: str
) -> None:
    good = {
        "sharegpt": sharegpt(("human", "问一"), ("gpt", "答一")),
        "openai": openai(("user", "问一"), ("assistant", "答一")),
    }.get(format, alpaca())
    path = put(tmp_path / "a.jsonl", good, record, good)
    stream = conversations(path, format)
    assert next(stream) == [Q1, A1]
    with pytest.raises(BadFile, match=message) as told:
        next(stream)
    assert str(told.value).startswith(f"{path}, line 2: ")
    assert list(conversations(path, format, on_bad="skip")) == [[Q1, A1]] * 2
    said = capsys.readouterr().err
    assert f"Skipped: {told.value}\n" in said and "skipped 1 of 3 records, which are malformed" in said


def test_in_a_json_list_a_malformed_record_has_its_number(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", [alpaca(), alpaca(), {"instruction": "x"}])
    with pytest.raises(BadFile, match=r"a\.json: record 3 is no alpaca or belle record: it has no 'output'"):
        list(conversations(path))


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        (
            "a.txt",
            ["text"],
            r"a\.txt, line 1: is plain text; conversations come as \.jsonl, \.json or \.parquet",
        ),
        ("a.jsonl", ['"text"'], r"line 1: is plain text"),
        (
            "a.jsonl",
            [{"text": "x"}],
            r"line 1: is in no known format \(found: text\); known are alpaca and belle",
        ),
        ("a.jsonl", ["[]"], r"is in no known format \(found: list\)"),
        ("a.jsonl", ["{}"], r"is in no known format \(found: nothing\)"),
        ("a.jsonl", [], r"a\.jsonl: holds no conversations"),
        ("a.jsonl", [alpaca(output=" ")], r"a\.jsonl: holds no conversations"),
        ("a.jsonl", [sharegpt()], r"a\.jsonl: holds no conversations"),
    ],
)
def test_files_without_conversations_are_told(
    tmp_path: Path, name: str, records: list[Any], message: str
) -> None:
    with pytest.raises(BadFile, match=message):
        list(conversations(put(tmp_path / name, *records)))


def test_a_file_whose_first_records_are_skipped_is_still_recognised(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl", {"text": "x"}, "nonsense", openai(("user", "问一"), ("assistant", "答一"))
    )
    assert list(conversations(path, on_bad="skip")) == [[Q1, A1]]


def test_another_format_than_the_named_one_is_malformed(tmp_path: Path) -> None:
    for format in FORMATS:
        others = [
            record for other, record, _ in READ if {other, format} not in ({"alpaca", "belle"}, {format})
        ]
        for record in others:
            if not (format == "belle" and "conversations" in record):
                with pytest.raises(BadFile, match=f"is no {format} record"):
                    list(conversations(put(tmp_path / "a.jsonl", record), format))


def test_an_unknown_format_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'sharegtp' is unknown \(did you mean 'sharegpt'\?\); known are auto, alpaca"
    ):
        list(conversations(put(tmp_path / "a.jsonl", alpaca()), "sharegtp"))


def test_records_with_an_empty_question_or_answer_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = [alpaca("", "x"), alpaca("x", " \n"), alpaca(None, "x"), alpaca("x", "y", history=[["a", ""]])]
    path = put(tmp_path / "a.jsonl", alpaca(), *empty)
    assert list(conversations(path)) == [[Q1, A1]]
    assert "left out 4 of 5 records, whose question or answer is empty" in capsys.readouterr().err


def test_real_instructions_are_read_to_the_end(data: Path) -> None:
    left_out: Counter[str] = Counter()
    found = list(file_conversations(data / "alpaca_zh.jsonl.gz", "auto", "stop", left_out))
    assert len(found) + left_out.total() == 20_465 and left_out["malformed"] == 0
    assert len(found) > 20_000 and all(len(messages) == 2 for messages in found)


def test_a_dialogue_after_a_single_question_is_still_a_dialogue(tmp_path: Path) -> None:
    """BELLE's files hold both; the first record does not decide for all."""
    dialogue = {"instruction": "Human:一\nAssistant:二\nHuman:三\nAssistant:", "input": "四", "output": "五"}
    records = [{"instruction": "问", "output": "答"}, dialogue]
    file = tmp_path / "a.json"
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    first, second = conversations(file)
    assert [message["content"] for message in first] == ["问", "答"]
    assert [message["content"] for message in second] == ["一", "二", "三\n四", "五"]


@pytest.mark.parametrize("history", ["5", "true", '"a"', "{}"])
def test_a_history_of_another_kind_is_malformed(history: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"instruction": "问", "output": "答", "history": {history}}}\n', encoding="utf-8")
    if history == "{}":
        assert len(list(conversations(file))) == 1
        return
    with pytest.raises(BadFile, match=r"line 1: .*history"):
        list(conversations(file))


def test_a_line_in_another_encoding_is_skipped_where_that_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps({"instruction": "问", "output": "答"}, ensure_ascii=False)
    file.write_bytes(good.encode() + b"\n" + good.encode("gb18030") + b"\n" + good.encode() + b"\n")
    with pytest.raises(BadFile, match="line 2: is not UTF-8"):
        list(conversations(file))
    assert len(list(conversations(file, on_bad="skip"))) == 2
