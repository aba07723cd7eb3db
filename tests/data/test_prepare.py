"""Prepared data: packed once, kept under a key, resumed, and never used when damaged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chinese_llama.artifacts import read_manifest
from chinese_llama.data import reading
from chinese_llama.data.formats import documents
from chinese_llama.data.mixture import Source, sources
from chinese_llama.data.prepare import Job, Prepared, key, prepare, source_digest
from chinese_llama.data.templates import find_template, text_ids
from chinese_llama.errors import BadFile
from tests import tiny
from tests.data.conftest import texts

TEMPLATE = find_template("chinese-alpaca")


@pytest.fixture
def tuning(work: Path, tokenizer: Path) -> Job:
    return Job("instructions", (Source(work / "ins.jsonl"),), tokenizer, 512, template=TEMPLATE)


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def all_rows(prepared: Prepared) -> list[dict[str, Any]]:
    found = prepared.dataset(0)
    return [
        {name: value.tolist() for name, value in found[number].items() if hasattr(value, "tolist")}
        for number in range(len(found))
    ]


def test_the_rows_are_the_documents(job: Job, fast: Any, tmp_path: Path, small: None) -> None:
    prepared = prepare(job, tmp_path / "prepared", fast)
    assert prepared.directory == tmp_path / "prepared" / key(job)[:16]
    assert len(list(prepared.directory.glob("0-*.arrow"))) > 2, "several parts"
    rows = all_rows(prepared)
    for number, source in enumerate(job.sources):
        own = [row for row in rows if row["source"] == number]
        wanted = [
            [fast.bos_token_id, *text_ids(fast, text), fast.eos_token_id] for text in documents(source.path)
        ]
        assert [index for row in own for index in row["input_ids"]] == [i for ids in wanted for i in ids]
        assert {len(row["input_ids"]) for row in own[:-1]} == {64}
        assert all(sum(row["lengths"]) == len(row["input_ids"]) for row in own)
        parts = [part for row in own for part in zip(row["documents"], row["lengths"], strict=True)]
        lengths = dict.fromkeys(range(len(wanted)), 0)
        for ordinal, length in parts:
            lengths[ordinal] += length
        assert list(lengths.values()) == list(map(len, wanted))


def test_the_manifest_counts_each_source(job: Job, fast: Any, tmp_path: Path) -> None:
    prepared = prepare(job, tmp_path / "prepared", fast)
    manifest = read_manifest(prepared.directory)
    assert manifest == prepared.manifest and manifest is not None and manifest.kind == "data"
    assert set(manifest.inputs) == {"tokenizer", "data:0", "data:1"}
    assert manifest.inputs["data:1"] == {
        "path": str(job.sources[1].path),
        "sha256": source_digest(job.sources[1]),
    }
    rows = all_rows(prepared)
    for number, source in enumerate(job.sources):
        found = list(documents(source.path))
        own = [row for row in rows if row["source"] == number]
        tokens = sum(len(row["input_ids"]) for row in own)
        assert manifest.metrics["sources"][number] == {
            "documents": len(found),
            "held_out": 0,
            "tokens": tokens,
            "characters": sum(map(len, found)),
            "bytes": sum(len(text.encode()) for text in found),
            "blocks": len(own),
            "learnt_tokens": tokens - sum(len(row["lengths"]) for row in own),
            "dropped": {},
        }


def test_instructions_become_rows_with_what_is_learnt(tuning: Job, fast: Any, tmp_path: Path) -> None:
    prepared = prepare(tuning, tmp_path / "prepared", fast)
    rows = all_rows(prepared)
    figures = prepared.manifest.metrics["sources"][0]
    assert figures["documents"] == 16 and figures["blocks"] == len(rows) < 16
    assert figures["learnt_tokens"] == sum(sum(row["learnt"]) for row in rows)
    assert sorted(n for row in rows for n in row["documents"]) == list(range(16))
    for row in rows:
        ids, learnt = np.array(row["input_ids"]), np.array(row["learnt"])
        ends = np.cumsum(row["lengths"]) - 1
        assert set(ids[ends]) == {fast.eos_token_id} and learnt[ends].all()
        starts = [0, *(ends[:-1] + 1)]
        assert set(ids[starts]) == {fast.bos_token_id} and not learnt[starts].any()


def test_everything_dropped_is_counted_and_told(
    tuning: Job, fast: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"instruction": "问", "output": "答"}
    records = [good, {"instruction": "问"}, {**good, "output": ""}, {**good, "instruction": "问" * 500}]
    path = write_lines(tmp_path / "a.jsonl", [*records, {**good, "output": "答" * 500}])
    job = replace(tuning, sources=(Source(path),), bad_records="skip", too_long="truncate")
    prepared = prepare(job, tmp_path / "prepared", fast)
    figures = prepared.manifest.metrics["sources"][0]
    wanted = {"malformed": 1, "empty": 1, "too_long": 1, "answers_cut": 1}
    assert (figures["documents"], figures["dropped"]) == (2, wanted)
    told = capsys.readouterr().err
    assert f"{path}: 2 documents" in told
    assert all(f"1 {reason.replace('_', ' ')}" in told for reason in wanted)
    with pytest.raises(BadFile, match=r"a\.jsonl, line 2: "):
        prepare(replace(job, bad_records="stop"), tmp_path / "prepared", fast)


def test_what_is_there_is_not_made_again(job: Job, fast: Any, tmp_path: Path) -> None:
    first = prepare(job, tmp_path / "prepared", fast)
    before = {file: file.stat().st_mtime_ns for file in first.directory.iterdir()}
    assert prepare(job, tmp_path / "prepared", None).directory == first.directory
    assert {file: file.stat().st_mtime_ns for file in first.directory.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == [".lock", first.directory.name]


def test_no_document_is_on_both_sides(tmp_path: Path, tokenizer: Path, fast: Any, small: None) -> None:
    """The same texts in two sources, and twice in one."""
    tiny.write_texts(tmp_path / "a.jsonl", texts(120) + texts(120)[:50])
    (tmp_path / "b.txt").write_text("\n".join(texts(120)[20:] + texts(30, 1)) + "\n", encoding="utf-8")
    found = tuple(sources([tmp_path / "a.jsonl", tmp_path / "b.txt"]))
    prepared = prepare(Job("pretraining", found, tokenizer, 64, eval_split=0.3), tmp_path / "p", fast)
    held = {name: list(documents(path)) for name, path in prepared.held_out().items()}
    trained: dict[int, list[int]] = {0: [], 1: []}
    for row in all_rows(prepared):
        trained[row["source"]] += [n for n in row["documents"] if n not in trained[row["source"]][-1:]]
    sides: dict[str, list[str]] = {}
    for number, (name, source) in enumerate(zip("ab", found, strict=True)):
        everything = list(documents(source.path))
        kept = [everything[ordinal] for ordinal in trained[number]]
        figures = prepared.manifest.metrics["sources"][number]
        assert (figures["documents"], figures["held_out"]) == (len(kept), len(held[name]))
        assert sorted(kept + held[name]) == sorted(everything)
        sides[name] = kept
    assert set(held["a"]) & set(held["b"]), "some are in both sources"
    assert not (set(sides["a"]) | set(sides["b"])) & (set(held["a"]) | set(held["b"]))


def test_a_text_is_held_out_or_kept_as_it_stands(tmp_path: Path, tokenizer: Path, fast: Any) -> None:
    odd = [f'"{n}"\u2028\n\\ 中文 😀' for n in range(40)]
    tiny.write_texts(tmp_path / "a.jsonl", odd)
    job = Job("pretraining", (Source(tmp_path / "a.jsonl"),), tokenizer, 64, eval_split=0.5)
    held = list(documents(prepare(job, tmp_path / "p", fast).held_out()["a"]))
    assert 5 < len(held) < 35 and set(held) < set(odd)


def test_a_share_that_holds_nothing_out_is_told(
    job: Job, fast: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(replace(job, eval_split=1e-9), tmp_path / "prepared", fast)
    assert prepared.held_out() == {}
    assert "eval_split 1e-09 holds out none of its documents" in capsys.readouterr().err


def test_weights_choose_blocks(job: Job, fast: Any, tmp_path: Path) -> None:
    weighted = replace(
        job, sources=tuple(replace(s, weight=w) for s, w in zip(job.sources, (1, 9), strict=True))
    )
    plain, mixed = (prepare(one, tmp_path / "prepared", fast) for one in (job, weighted))
    assert plain.directory == mixed.directory
    blocks = [figures["blocks"] for figures in plain.manifest.metrics["sources"]]
    numbers = mixed.dataset(0)["source"][:]
    assert len(numbers) == pytest.approx(sum(blocks), abs=1)
    assert list(numbers).count(1) == pytest.approx(0.9 * sum(blocks), abs=1)
    first, again, other = ([row["input_ids"].tolist() for row in mixed.dataset(seed)] for seed in (0, 0, 1))
    assert first == again != other


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tokenizer": lambda path: {"tokenizer": changed(path / "tokenizer", "tokenizer.json", '"', "'", 9)},
    "special tokens": lambda path: {
        "tokenizer": changed(path / "tokenizer", "tokenizer_config.json", "<s>", "<S>", 1)
    },
    "data": lambda path: {"sources": (Source(changed(path, "a.jsonl", "0", "1", 1) / "a.jsonl"),)},
    "another file": lambda path: {"sources": (Source(path / "b.jsonl"),)},
    "one more": lambda path: {"sources": (Source(path / "a.jsonl"), Source(path / "b.jsonl"))},
    "format": lambda path: {"sources": (Source(path / "a.jsonl", format="alpaca"),), "kind": "instructions"},
    "block size": lambda path: {"block_size": 65},
    "eval_split": lambda path: {"eval_split": 0.01},
    "kind": lambda path: {"kind": "instructions"},
    "template": lambda path: {"kind": "instructions", "template": TEMPLATE + " "},
    "too_long": lambda path: {"kind": "instructions", "too_long": "truncate"},
    "bad_records": lambda path: {"kind": "instructions", "bad_records": "skip"},
}


def changed(directory: Path, name: str, old: str, new: str, count: int) -> Path:
    file = directory / name
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, count), encoding="utf-8")
    return directory


@pytest.fixture
def keyed(tmp_path: Path, tokenizer: Path) -> Job:
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    tiny.write_texts(tmp_path / "a.jsonl", texts(3))
    tiny.write_texts(tmp_path / "b.jsonl", texts(3, 1))
    return Job("pretraining", (Source(tmp_path / "a.jsonl"),), tmp_path / "tokenizer", 64, template=TEMPLATE)


def test_each_change_gives_a_key_of_its_own(keyed: Job, tmp_path: Path) -> None:
    keys = {"": key(keyed)}
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for name, change in CHANGES.items():
        keys[name] = key(replace(keyed, **change(tmp_path)))
        for file, raw in before.items():
            file.write_bytes(raw)
    assert len(set(keys.values())) == len(keys), keys
    assert key(keyed) == keys[""]


def test_a_byte_of_the_tokenizer_is_enough(keyed: Job, tmp_path: Path) -> None:
    before = key(keyed)
    with open(tmp_path / "tokenizer" / "tokenizer.json", "a") as stream:
        stream.write(" ")
    assert key(keyed) != before


def test_places_and_weights_are_not_in_the_key(keyed: Job, tmp_path: Path) -> None:
    before = key(keyed)
    assert key(replace(keyed, sources=(Source(tmp_path / "a.jsonl", weight=3.0),))) == before
    assert key(replace(keyed, too_long="truncate", bad_records="skip", template=None)) == before, "not used"
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "moved" / "c.jsonl")
    shutil.move(tmp_path / "tokenizer", tmp_path / "moved" / "t")
    moved = (Source(tmp_path / "moved" / "c.jsonl"),)
    assert key(replace(keyed, sources=moved, tokenizer=tmp_path / "moved" / "t")) == before


def test_jobs_are_plain(job: Job) -> None:
    assert pickle.loads(pickle.dumps(job)) == job
    assert hash(job) == hash(replace(job))


def test_copied_data_is_still_good(job: Job, fast: Any, tmp_path: Path) -> None:
    """Other times of change, the same bytes."""
    made = prepare(job, tmp_path / "prepared", fast)
    shutil.copytree(made.directory, tmp_path / "copy" / made.directory.name, copy_function=shutil.copyfile)
    copy = prepare(job, tmp_path / "copy", None)
    assert all_rows(copy) == all_rows(made)


def empty(path: Path) -> None:
    path.write_text("")


def test_a_source_that_is_held_out_whole_is_named(tokenizer: Path, fast: Any, tmp_path: Path) -> None:
    text = next(f"text {n}" for n in range(99) if reading.held_out(f"text {n}", 0.5))
    tiny.write_texts(tmp_path / "a.jsonl", [text] * 3)
    job = Job("pretraining", (Source(tmp_path / "a.jsonl"),), tokenizer, 64, eval_split=0.5)
    with pytest.raises(
        BadFile, match=r"a\.jsonl: all 3 documents are held out; lower eval_split or give more"
    ):
        prepare(job, tmp_path / "prepared", fast)


def test_conversations_that_do_not_fit_at_all_are_counted(tuning: Job, fast: Any, tmp_path: Path) -> None:
    with pytest.raises(
        BadFile, match=r"ins\.jsonl: nothing to train on in blocks of 16 tokens: 16 too long\.$"
    ):
        prepare(replace(tuning, block_size=16), tmp_path / "prepared", fast)
    write_lines(tmp_path / "none.jsonl", [])
    with pytest.raises(BadFile, match=r"none\.jsonl: holds no conversations\.$"):
        prepare(replace(tuning, sources=(Source(tmp_path / "none.jsonl"),)), tmp_path / "prepared", fast)


def test_an_empty_file_among_others_is_no_error(tokenizer: Path, fast: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("\n \n")
    tiny.write_texts(tmp_path / "data" / "b.jsonl", texts(4))
    job = Job("pretraining", (Source(tmp_path / "data"),), tokenizer, 64)
    made = prepare(job, tmp_path / "prepared", fast)
    assert made.manifest.metrics["sources"][0]["documents"] == 4
