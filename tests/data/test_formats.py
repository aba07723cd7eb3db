"""Every way in which a corpus lies in files, and every way in which it can be broken."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.formats import as_paths, corpus_files, documents, file_documents, records, texts
from chinese_llama.errors import BadFile, UserError

TEXTS = ["中国的首都是北京。", "The quick brown fox.", "  leading  and 😀 trailing  "]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=40)


def content(kind: str, texts: list[str]) -> bytes:
    """The texts as the bytes of a .txt, .jsonl or .json file."""
    records = [{"text": text, "source": "test"} for text in texts]
    lines = {
        ".txt": lambda: "".join(text + "\n" for text in texts),
        ".jsonl": lambda: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        ".json": lambda: json.dumps(records, indent=1),
    }
    return lines[kind]().encode()


def put(path: Path, raw: bytes | str) -> Path:
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_every_suffix_gives_the_same_documents(tmp_path: Path, kind: str, packing: str) -> None:
    raw = content(kind, TEXTS)
    assert list(documents(put(tmp_path / f"a.b{kind}{packing}", PACK[packing](raw)))) == TEXTS
    marked = put(tmp_path / f"bom{kind}{packing}", PACK[packing](b"\xef\xbb\xbf" + raw))
    assert list(documents(marked)) == TEXTS, "a byte-order mark is not text"


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(PLAIN, min_size=1, max_size=5).filter(lambda texts: any(t.strip() for t in texts)))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """A line ends at a newline only, not at U+2028, U+0085 and the like."""
    folder = tmp_path_factory.getbasetemp()
    wanted = [text for text in texts if text.strip()]
    for kind in (".jsonl", ".json"):
        assert list(documents(put(folder / f"any{kind}", content(kind, texts)))) == wanted
    if not texts[0].startswith("\ufeff"):
        assert list(documents(put(folder / "any.txt", content(".txt", texts)))) == wanted


def test_parquet_streams_its_text_column(tmp_path: Path) -> None:
    texts = [f"{text} {number}" for number in range(700) for text in TEXTS]
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(documents(tmp_path / "a.parquet")) == texts


def test_of_parquet_only_the_text_is_read(tmp_path: Path) -> None:
    """Other columns may be large; here they are broken."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", "two"], "other": ["x" * 1000, "y" * 1000]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression=None)
    start = path.read_bytes().index(b"x" * 1000)
    raw = path.read_bytes()
    put(path, raw[: start - 40] + b"\xff" * 1000 + raw[start + 960 :])
    assert list(documents(path)) == ["one", "two"]
    with pytest.raises(BadFile, match="is not a readable Parquet file"):
        list(records(path))


def test_a_file_without_documents_is_no_error_among_others(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "\n")
    put(tmp_path / "b.txt", "one\n")
    assert list(file_documents(tmp_path / "a.txt")) == []
    assert list(documents(tmp_path)) == ["one"]


def test_empty_documents_and_lines_are_left_out(tmp_path: Path) -> None:
    assert list(documents(put(tmp_path / "a.txt", "one\r\n\r\n  \ntwo"))) == ["one", "two"]
    lines = '{"text": "one"}\n\n{"text": " "}\r\n{"text": "two"}'
    assert list(documents(put(tmp_path / "a.jsonl", lines))) == ["one", "two"]


def test_json_may_hold_its_list_under_data(tmp_path: Path) -> None:
    assert list(documents(put(tmp_path / "a.json", '{"data": [{"text": "one"}], "version": 1}'))) == ["one"]


def test_several_zst_frames_and_gz_members_are_one_file(tmp_path: Path) -> None:
    for packing in (".gz", ".zst"):
        raw = b"".join(PACK[packing](content(".jsonl", [text])) for text in TEXTS)
        assert list(documents(put(tmp_path / f"a.jsonl{packing}", raw))) == TEXTS


def test_a_directory_is_read_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    put(tmp_path / "b.txt", "two\n")
    put(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n', mtime=0))
    put(tmp_path / "sub" / "c.txt", "three\n")
    put(tmp_path / "README.md", "not a corpus")
    assert list(documents(tmp_path)) == ["one", "two", "three"]
    assert [path.name for path in corpus_files(tmp_path)] == ["a.jsonl.gz", "b.txt", "c.txt"]


BROKEN = [
    ("a.jsonl", '{"text": "one"}\n\n{"text": \n', r"a\.jsonl, line 3: is not valid JSON"),
    ("a.json", '[{"text": "one"},\n{"text": ]', r"a\.json, line 2: is not valid JSON"),
    ("a.json", '"text"', r"a\.json: must hold a list of records"),
    ("a.jsonl", '{"text": "one"}\n{"content": "x", "id": 1}', r"line 2: has no field 'text' \(found: content, id\)"),
    ("a.jsonl", "{}\n", r"line 1: has no field 'text' \(found: nothing\)"),
    ("a.jsonl", "[1, 2]\n", r"line 1: has no field 'text' \(found: list\)"),
    ("a.jsonl", '{"text": 3}\n', r"line 1: the field 'text' is not text"),
    ("a.jsonl", '{"text": null}\n', r"line 1: the field 'text' is not text"),
    ("a.txt", "one\n中文\n".encode() + "中文\n".encode("gb18030"), r"a\.txt, line 3: is not UTF-8; .*iconv"),
    ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), r"a\.jsonl, line 1: is not UTF-8"),
    ("a.txt", "", r"a\.txt: holds no text"),
    ("a.jsonl", "\n \n", r"a\.jsonl: holds no text"),
    ("a.json", "[]", r"a\.json: holds no text"),
    ("a.json", "", r"a\.json.*: is not valid JSON"),
    ("a.csv", "text\none\n", r"a\.csv: unknown format; known are \.txt, \.jsonl, \.json, \.parquet"),
    ("corpus.gz", gzip.compress(b"one\n", mtime=0), r"corpus\.gz: unknown format"),
    ("a.parquet", b"PAR1 and no more", r"a\.parquet: is not a readable Parquet file"),
    ("a.jsonl.gz", '{"text": "one"}\n', r"a\.jsonl\.gz: cannot be unpacked"),
    ("a.jsonl.zst", '{"text": "one"}\n', r"a\.jsonl\.zst: cannot be unpacked"),
    ("a.jsonl", '{"text": "half a pair: \\ud83d"}\n', r"a\.jsonl, line 1: .*(surrogate|Unicode|UTF)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "message"), BROKEN)
def test_a_broken_file_says_where_and_what(tmp_path: Path, name: str, raw: Any, message: str) -> None:
    path = put(tmp_path / name, raw)
    with pytest.raises(BadFile, match=message) as told:
        list(documents(path))
    assert str(told.value).startswith(str(path))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_archive_is_never_read_as_a_shorter_one(
    tmp_path: Path, packing: str, share: float
) -> None:
    texts = [f"document {number} {number * 7919 % 10007}" for number in range(20_000)]
    raw = PACK[packing](content(".jsonl", texts))
    path = put(tmp_path / f"a.jsonl{packing}", raw[: int(len(raw) * share)])
    with pytest.raises(BadFile, match=rf"a\.jsonl\{packing}: cannot be unpacked"):
        list(documents(path))


def test_missing_files_and_directories_without_a_corpus_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.txt: no such file"):
        list(documents(tmp_path / "gone.txt"))
    put(tmp_path / "README.md", "")
    with pytest.raises(BadFile, match=r"has no file that ends in \.txt, \.jsonl"):
        list(documents(tmp_path))


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadFile, match=r"line 1: has no field 'text' \(found: content, id\)"):
        list(documents(tmp_path / "a.parquet"))


def test_documents_before_a_bad_line_are_given(tmp_path: Path) -> None:
    """Reading streams: the error comes when the line is reached."""
    stream = documents(put(tmp_path / "a.jsonl", '{"text": "one"}\nnonsense\n'))
    assert next(stream) == "one"
    with pytest.raises(BadFile, match="line 2"):
        next(stream)


RECORD = {"instruction": "译成英文", "input": "你好", "output": "Hello"}


def path_packing(name: str) -> str:
    return next((packing for packing in (".gz", ".zst") if name.endswith(packing)), "")


def test_as_paths() -> None:
    assert as_paths("a.txt") == as_paths(Path("a.txt")) == [Path("a.txt")]
    assert as_paths(["a", Path("b")]) == [Path("a"), Path("b")]
    for nothing in (None, [], [None]):
        with pytest.raises(UserError, match="no corpus is given"):
            as_paths(nothing)


def test_real_files_are_read_to_the_end(data: Path) -> None:
    texts = list(documents(data / "en_pretrain.jsonl.gz"))
    assert len(texts) == 330
    assert all(text.strip() for text in texts)


CONVERSATION = {
    "id": "x1",
    "source": "web",
    "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好！"}],
}
OF_ANY_KIND = [
    ({"text": "一", "title": "二"}, "一"),
    (RECORD, "译成英文\n你好\nHello"),
    ({"instruction": "问", "input": "", "output": "答"}, "问\n\n答"),
    (CONVERSATION, "你好\n您好！"),
    ({"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]}, "你好\n好"),
    ({"question": "问", "chosen": "好", "rejected": "不好", "score": 3, "good": True}, "问\n好\n不好"),
    ({"content": {"title": "题", "body": ["段一", "段二"]}, "n": None}, "题\n段一\n段二"),
]


@pytest.mark.parametrize(("record", "text"), OF_ANY_KIND)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.zst"])
def test_texts_are_all_that_people_wrote_in_a_record(
    tmp_path: Path, record: dict[str, Any], text: str, suffix: str
) -> None:
    line = json.dumps(record, ensure_ascii=False)
    raw = f"[{line}]" if suffix.startswith(".json.") or suffix == ".json" else line + "\n"
    path = put(tmp_path / f"a{suffix}", PACK[path_packing(suffix)](raw.encode()))
    assert list(texts(path)) == [text]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_texts_of_documents_are_the_documents(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / f"a{kind}", content(kind, [*TEXTS, "", "  "]))
    assert list(texts(path)) == list(documents(path)) == TEXTS


def test_texts_of_parquet_are_those_of_its_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2], "prompt": ["问", "再问"], "answer": ["答", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(texts(tmp_path / "a.parquet")) == ["问\n答", "再问"]


def test_texts_of_a_directory_may_be_of_several_kinds(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "一\n二\n")
    put(tmp_path / "b.jsonl", json.dumps(RECORD) + "\n")
    put(tmp_path / "c.jsonl", json.dumps(CONVERSATION) + "\n")
    assert list(texts(tmp_path)) == ["一", "二", "译成英文\n你好\nHello", "你好\n您好！"]


def test_records_whose_texts_are_empty_are_left_out(tmp_path: Path) -> None:
    lines = ['{"instruction": "", "output": " "}', '{"text": ""}', '{"output": "答"}']
    assert list(texts(put(tmp_path / "a.jsonl", "\n".join(lines)))) == ["答"]
    with pytest.raises(BadFile, match=r"b\.jsonl: holds no text"):
        list(texts(put(tmp_path / "b.jsonl", "\n".join(lines[:2]))))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"n": 1, "id": "x"}', r"line 2: has no field with text \(found: n, id\)"),
        ("{}", r"line 2: has no field with text \(found: nothing\)"),
        ("[1, 2]", r"line 2: has no field with text \(found: list\)"),
        ("3", r"line 2: has no field with text \(found: int\)"),
        ('{"text": 3, "title": "x"}', "line 2: the field 'text' is not text"),
        ('{"text": null}', "line 2: the field 'text' is not text"),
        ('{"output": "half: \\ud83d"}', r"line 2: holds half a surrogate pair \('\\ud83d'\)"),
        ('{"text": "half: \\ud83d"}', "line 2: holds half a surrogate pair"),
        ('{"output": ', "line 2: is not valid JSON"),
    ],
)
def test_texts_of_a_broken_file_say_where_and_what(tmp_path: Path, line: str, message: str) -> None:
    path = put(tmp_path / "a.jsonl", '{"output": "one"}\n' + line + "\n")
    stream = texts(path)
    assert next(stream) == "one"
    with pytest.raises(BadFile, match=rf"a\.jsonl, {message}"):
        next(stream)


@settings(max_examples=50, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(["instruction", "output", "a", "b", "from", "role", "id", "source"]),
        PLAIN,
        min_size=1,
    )
)
def test_the_texts_of_any_record_are_its_fields_in_order(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, str]
) -> None:
    path = put(tmp_path_factory.getbasetemp() / "fields.jsonl", json.dumps([fields])[1:-1] + "\n")
    wanted = [value for name, value in fields.items() if name not in ("from", "role", "id", "source")]
    if "".join(wanted).strip():
        assert list(texts(path)) == ["\n".join(wanted)]
    else:
        with pytest.raises(BadFile, match=r"holds no text|has no field with text"):
            list(texts(path))


def test_real_instructions_are_texts_too(data: Path) -> None:
    for name in ("alpaca_zh.jsonl.gz", "preference_zh.jsonl.gz"):
        found = list(texts(data / name))
        assert len(found) > 100
        assert all("\n" in text for text in found[:100])


def test_what_lies_beside_data_is_passed_over(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".hidden.jsonl", "dataset_infos.json"):
        (tmp_path / name).write_text('{"text": "x"}\n', encoding="utf-8")
    assert [file.name for file in corpus_files(tmp_path)] == ["a.jsonl"]


def test_a_string_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["abc \\ud83d"]', encoding="utf-8")
    with pytest.raises(BadFile, match="half a surrogate"):
        list(documents(tmp_path / "a.json"))


def test_parquet_that_is_no_utf8_is_one_sentence(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(BadFile, match="not a readable Parquet"):
        list(documents(tmp_path / "a.parquet"))
