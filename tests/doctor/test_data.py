"""A made case for everything that can be wrong with data."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.doctor import data, survey
from chinese_llama.doctor.data import check_data_together, check_unknown, look
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import Thing, recognise
from chinese_llama.resources import PACKAGE

TOPICS = "山水花草鸟鱼虫云雨雪风雷电星月日江河湖海"
TEXTS = [f"今天我们来说一说{topic}，这是大家都知道的，也是很有意思的。" for topic in TOPICS]
RECORDS = [
    {"instruction": f"请说一说{topic}。", "input": "", "output": f"{topic}是大家都知道的，很有意思。"}
    for topic in TOPICS
]
MARKS = {
    "control-tokens": "答案在这里<|im_end|>",
    "mojibake": "ä¸­å›½çš„é¦–éƒ½æ˜¯åŒ—äº¬",
    "replacement-characters": "中国的首都\ufffd\ufffd",
    "invisible-characters": "中国\u200b的首都",
    "private-use-characters": "中国的\ue123首都",
    "html": "<div class='a'>中国的首都</div>&nbsp;",
    "endless-documents": "中" * 1_000_001,
}


def write(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return file


def findings(path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in look(recognise(path))[0]}


def documents(tmp_path: Path, *more: str) -> dict[str, Finding]:
    return findings(write(tmp_path / "zh.jsonl", [{"text": text} for text in (*TEXTS, *more)]))


def conversations(tmp_path: Path, *more: Any) -> dict[str, Finding]:
    return findings(write(tmp_path / "ins.jsonl", [*RECORDS, *more]))


# --- nothing is wrong


def test_clean_data_is_healthy(tmp_path: Path) -> None:
    assert not documents(tmp_path)
    assert not conversations(tmp_path)
    (tmp_path / "zh.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    with gzip.open(tmp_path / "zh.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": TEXTS[0]}) + "\n")
    for name in ("zh.txt", "list.json", "zh.jsonl.gz"):
        assert not findings(tmp_path / name), name


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "quickstart" / "text").glob("*.jsonl")), ids=lambda file: file.name
)
def test_the_data_that_come_along_are_healthy(file: Path) -> None:
    assert not findings(file)


def test_parquet_and_a_directory(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", [{"text": TEXTS[3]}])
    found = findings(tmp_path)
    assert {*found} == {"duplicates"}
    assert "b.jsonl, line 1: as a.parquet, line 4" in found["duplicates"].evidence[0]


def test_it_tells_what_the_data_are(tmp_path: Path) -> None:
    thing = recognise(write(tmp_path / "ins.jsonl", RECORDS))
    look(thing)
    assert thing.facts["records"] == len(RECORDS)
    assert thing.facts["han_among_letters"] == 1.0
    assert "alpaca" in thing.title
    prompts = recognise(
        write(tmp_path / "prompts.jsonl", [{"prompt": "中国的首都是哪里？", "keyword": "北京"}])
    )
    assert not look(prompts)[0]
    assert "prompts" in prompts.title


def test_prepared_data_is_left_alone(tmp_path: Path) -> None:
    assert look(Thing(tmp_path, "data", "", {"made_by": "prepare"})) == ([], None)


# --- files


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    jsonl = json.dumps({"text": TEXTS[0]}).encode() + b"\n"
    cases: list[tuple[str, bytes, str, str]] = [
        ("a.jsonl", b"", "file-empty", "error"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs-pointer", "error"),
        ("c.jsonl", gzip.compress(jsonl), "wrong-extension", "error"),
        ("d.jsonl.gz", jsonl, "wrong-extension", "error"),
        ("e.txt", jsonl * 3, "wrong-extension", "error"),
        ("f.jsonl", b'[{"text": "x"}]', "wrong-extension", "error"),
        ("g.txt", "\n".join(TEXTS).encode("gb18030"), "wrong-encoding", "error"),
        ("h.txt", "\n".join(TEXTS).encode("utf-16"), "wrong-encoding", "error"),
        ("i.txt", "這是繁體中文，說的是大家都知道的事。\n".encode("big5") * 20, "wrong-encoding", "error"),
        ("j.txt", bytes(range(128, 256)) * 9, "wrong-encoding", "error"),
        ("k.txt", b"\xef\xbb\xbf" + "\n".join(TEXTS).encode(), "byte-order-mark", "note"),
        ("l.json", b'{"a": 1}', "data-not-readable", "error"),
        ("m.jsonl.gz", gzip.compress(jsonl)[:-9], "data-not-readable", "error"),
        ("n.jsonl", b'{"content": "x"}\n', "unknown-format", "error"),
        ("o.json", b"[]", "file-empty", "error"),
        ("p.parquet", b"PAR1 but no more", "data-not-readable", "error"),
    ]  # fmt: skip
    for name, content, check, severity in cases:
        (tmp_path / name).write_bytes(content)
        found = findings(tmp_path / name)
        assert {*found} == {check}, name
        assert found[check].severity == severity, name
    assert "GBK" in findings(tmp_path / "g.txt")["wrong-encoding"].what
    assert "iconv -f BIG5" in findings(tmp_path / "i.txt")["wrong-encoding"].remedy


@given(
    st.binary(max_size=200) | st.text(max_size=100).map(str.encode),
    st.sampled_from((".txt", ".jsonl", ".json", ".gz")),
)
@settings(max_examples=150, deadline=None)
def test_no_content_stops_it(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / (f"a.txt{suffix}" if suffix == ".gz" else f"a{suffix}")
        path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)
        found = look(Thing(path, "data", ""))[0]
        assert all(one.what and one.where == str(path) for one in found)
        assert found or content.strip()


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(("text", "instruction", "input", "output", "conversations", "messages", "role", "content", "from")),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(json_values, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_record_stops_it(records: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        look(Thing(path, "data", ""))[0]


def test_a_list_that_is_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LARGEST_LIST", 10)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    assert findings(tmp_path / "a.json")["json-too-large"].severity == "error"


def test_a_directory_without_data(tmp_path: Path) -> None:
    assert look(Thing(tmp_path, "data", ""))[0][0].check == "data-not-readable"


def test_large_data_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"text": f"{number}：{TEXTS[number % len(TEXTS)]}"} for number in range(4000)]
    for number in range(3800, 4000):
        texts[number] = {"text": f"结尾处的{number}<|im_end|>"}
    path = write(tmp_path / "zh.jsonl", texts)
    monkeypatch.setattr(survey, "PIECE", 4_000)
    monkeypatch.setattr(data, "budgets", lambda files: dict.fromkeys(files, 80_000))
    thing = recognise(path)
    found = {finding.check: finding for finding in look(thing)[0]}
    assert "pieces of" in found["read-in-part"].evidence[0]
    assert 100 < thing.facts["records"] < 4000
    assert "byte" in found["control-tokens"].evidence[0]
    assert survey.budgets([path]) == {path: None}
    monkeypatch.setattr(survey, "FULL", 100_000)
    assert survey.budgets([path]) == {path: 1 << 20}
    assert "malformed-records" not in found and "duplicates" not in found


# --- records


@pytest.mark.parametrize("check", sorted(MARKS))
def test_marks_in_texts(tmp_path: Path, check: str) -> None:
    found = documents(tmp_path, MARKS[check])
    assert found[check].severity in ("warning", "error")
    assert f"line {len(TEXTS) + 1}" in found[check].evidence[0]


def test_more_of_the_same_marks(tmp_path: Path) -> None:
    gbk = "中国的首都是北京，这是大家都知道的。".encode()[:-1].decode("gbk", "ignore")
    for text, check in (
        (gbk, "mojibake"),
        ("锟斤拷锟斤拷", "mojibake"),
        ("[INST] 你好 [/INST]", "control-tokens"),
        ("你好</s>", "control-tokens"),
        ("### Response:\n你好", "control-tokens"),
        ("\ufeff你好啊，朋友", "invisible-characters"),
    ):
        assert check in documents(tmp_path, text), text


def test_a_rare_mark_is_a_note(tmp_path: Path) -> None:
    more = [f"{number}：{TEXTS[0]}" for number in range(1200)]
    assert documents(tmp_path, *more, "你好，朋友<|im_end|>")["control-tokens"].severity == "note"


def test_good_text_has_no_marks(tmp_path: Path) -> None:
    good = [
        "a < b，b > c，[1] 与 x[0]",
        "### 标题\n正文很长很长很长",
        "鐵路與銀行，涓涓细流，鄂尔多斯",
        "naïve café – “quoted”, déjà vu",
    ]
    found = documents(tmp_path, *good)
    assert {*found} <= {"not-chinese", "traditional-characters"}


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "zh.jsonl", [{"text": text} for text in TEXTS])
    with open(path, "ab") as stream:
        stream.write(b'{"text": "half\n{"other": 1}\n{"text": 3}\n{"text": "\\ud800"}\n"\xff"\n')
    found = findings(path)["malformed-records"]
    assert found.severity == "error"
    assert found.what.startswith("5 of")
    assert [line.partition(":")[0] for line in found.evidence] == [
        f"line {number}" for number in range(21, 26)
    ]


def test_near_empty_and_duplicate_documents(tmp_path: Path) -> None:
    found = documents(tmp_path, "短", "很短", TEXTS[2])
    assert found["near-empty-documents"].severity == "warning"
    assert "line 23: as line 3" in found["duplicates"].evidence[0]
    assert found["duplicates"].severity == "warning"


def test_conversations_without_answers(tmp_path: Path) -> None:
    found = conversations(
        tmp_path,
        {"instruction": "没有回答的问题？", "input": "", "output": " "},
        {"instruction": "", "input": "", "output": "没有问题的回答。"},
        {"instruction": "重复一遍的话。", "input": "", "output": "重复一遍的话。"},
        {"instruction": "没有这一栏。"},
        {"instruction": "很长", "output": "长" * 10_001},
    )
    assert {check: one.severity for check, one in found.items()} == {
        "records-without-answer": "warning",
        "records-without-question": "warning",
        "answer-is-prompt": "warning",
        "no-answer-field": "error",
        "long-conversations": "note",
    }
    bare = write(
        tmp_path / "bare.jsonl", [{"instruction": one["instruction"], "output": ""} for one in RECORDS]
    )
    assert findings(bare)["records-without-answer"].severity == "error"


def test_preference_pairs(tmp_path: Path) -> None:
    record = {
        "conversations": [{"from": "human", "value": "你好"}],
        "chosen": {"value": "好"},
        "rejected": {"value": "坏"},
    }
    assert findings(write(tmp_path / "p.jsonl", [record]))["preference-pairs"].severity == "error"


def test_answers_in_other_fields(tmp_path: Path) -> None:
    """What to type is told; a prompt with an answer is no file of prompts."""
    fields = [("question", "answer"), ("prompt", "completion"), ("query", "response")]
    for question, answer in fields:
        found = findings(write(tmp_path / "x.jsonl", [{question: "你好吗？", answer: "很好。"}]))
        assert found["unknown-format"].remedy == (
            f'Rename the fields: jq -c \'{{instruction: ."{question}", output: ."{answer}"}}\' x.jsonl > renamed.jsonl'
        )
    (tmp_path / "y.json").write_text('[{"content": "中文"}]')
    assert (
        "jq -c '.[] | {text: .\"content\"}' y.json" in findings(tmp_path / "y.json")["unknown-format"].remedy
    )
    pairs = [{"prompt": "你好吗？", "chosen": "很好。", "rejected": "不好。"}]
    assert findings(write(tmp_path / "p.jsonl", pairs))["preference-pairs"].severity == "error"
    assert not findings(write(tmp_path / "q.jsonl", [{"prompt": "请问你今天过得好不好？"}]))


def test_one_question_with_several_answers(tmp_path: Path) -> None:
    again = {**RECORDS[0], "output": "别的回答，也很有意思。"}
    assert conversations(tmp_path, again)["same-questions"].severity == "note"
    assert "same-questions" not in conversations(tmp_path, RECORDS[0])


def test_control_tokens_of_other_families(tmp_path: Path) -> None:
    for mark in ("<｜end▁of▁sentence｜>", "<|start_header_id|>", "[gMASK]<sop>", "<eos>", "###Response:"):
        assert "control-tokens" in documents(tmp_path, f"{mark}中国的首都是北京"), mark


def test_japanese_is_not_chinese(tmp_path: Path) -> None:
    write(
        tmp_path / "ja.jsonl",
        [{"text": f"これは日本語の文章です。天気は{topic}ですね。"} for topic in TOPICS],
    )
    (found,) = check_data_together(surveys(tmp_path / "ja.jsonl"))
    assert (found.check, found.severity) == ("mostly-not-chinese", "warning")


def test_several_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", RECORDS)
    write(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS])
    assert findings(tmp_path)["mixed-formats"].severity == "warning"


def test_traditional_characters(tmp_path: Path) -> None:
    found = documents(tmp_path, "這是繁體中文，說的是大家來學習的時間，沒有問題。")
    assert found["traditional-characters"].severity == "note"


def test_records_in_another_language(tmp_path: Path) -> None:
    assert documents(tmp_path, "One English document among them.")["not-chinese"].severity == "note"


# --- together


def surveys(*paths: Path) -> list[survey.Survey]:
    found = [look(recognise(path))[1] for path in paths]
    return [one for one in found if one]


def test_english_is_a_replay_set_only_beside_chinese(tmp_path: Path) -> None:
    english = write(tmp_path / "en.jsonl", [{"text": f"An English document, number {n}."} for n in range(30)])
    chinese = write(tmp_path / "zh.jsonl", [{"text": text} for text in TEXTS])
    assert [one.severity for one in check_data_together(surveys(english))] == ["warning"]
    assert [one.severity for one in check_data_together(surveys(english, chinese))] == ["note"]
    assert not list(check_data_together(surveys(chinese)))


def test_what_is_measured_was_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", RECORDS)
    other = write(tmp_path / "more.jsonl", [*RECORDS[:1], {"instruction": "别的问题？", "output": "好。"}])
    held_out = write(tmp_path / "held_out.jsonl", [{**RECORDS[4], "output": "另一个回答。"}])
    assert [one.severity for one in check_data_together(surveys(train, other))] == ["warning"]
    (found,) = check_data_together(surveys(train, held_out))
    assert found.severity == "error"
    assert found.evidence == ["line 1, and line 5 of train.jsonl"]
    assert not list(check_data_together(surveys(other, held_out)))
    assert not list(check_data_together(surveys(train, train)))


def test_unknown_files(tmp_path: Path) -> None:
    cases = {
        "train": (json.dumps(RECORDS[0]).encode() + b"\n", "wrong-extension"),
        "a.csv": (b"instruction,output\n1,2\n", "unknown-file"),
        "a.bin": (b"PK\x03\x04", "unknown-file"),
        "b.bin": (b"", "file-empty"),
        "c.bin": (b"what is this", "unknown-file"),
    }
    for name, (content, check) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert [one.check for one in check_unknown(Thing(tmp_path / name, "unknown", ""))] == [check]
    assert not list(check_unknown(Thing(tmp_path, "unknown", "")))


def test_real_data_has_no_error(data: Path) -> None:
    found = findings(data / "zh_pretrain.jsonl.gz")
    assert {one.severity for one in found.values()} <= {"note"}
