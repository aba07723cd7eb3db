"""Prepared data that is damaged, and data that cannot be prepared: noticed, named, never used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data.mixture import Source
from chinese_llama.data.prepare import Job, key, prepare
from chinese_llama.errors import BadFile, UserError
from tests.data.test_prepare import TEMPLATE, empty


def break_size(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 64)


def break_byte(part: Path) -> None:
    raw = part.read_bytes()
    part.write_bytes(raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:])


def remove(part: Path) -> None:
    part.unlink()


def add(part: Path) -> None:
    shutil.copy(part, part.with_name("0-00009.arrow"))


def unmark(part: Path) -> None:
    (part.parent / "chinese_llama.json").unlink()


@pytest.mark.parametrize("damage", [break_size, break_byte, remove, add, unmark])
def test_damage_is_noticed_and_said(
    damage: Callable[[Path], None], job: Job, fast: Any, tmp_path: Path
) -> None:
    made = prepare(job, tmp_path / "prepared", fast).directory
    damage(made / "0-00000.arrow")
    with pytest.raises(BadFile, match=rf"{made.name}: is damaged .*; remove it, and it is made again\.$"):
        prepare(job, tmp_path / "prepared", fast)
    shutil.rmtree(made)
    assert prepare(job, tmp_path / "prepared", fast).directory == made


def test_a_manifest_that_cannot_be_read_is_named(job: Job, fast: Any, tmp_path: Path) -> None:
    made = prepare(job, tmp_path / "prepared", fast).directory
    (made / "chinese_llama.json").write_text("{")
    with pytest.raises(BadFile, match=r"chinese_llama\.json: is not a manifest"):
        prepare(job, tmp_path / "prepared", fast)


@pytest.mark.parametrize("cut", [0, 200, 1000])
def test_a_part_that_does_not_open_is_named(cut: int, job: Job, fast: Any, tmp_path: Path) -> None:
    """Damage after the directory was looked at, or that no size and no time shows."""
    prepared = prepare(job, tmp_path / "prepared", fast)
    part = prepared.directory / "1-00000.arrow"
    raw = part.read_bytes()
    part.write_bytes(raw[:cut] + b"\xff" * (len(raw) - cut))
    with pytest.raises(BadFile, match=rf"1-00000\.arrow: is damaged; remove {prepared.directory}, and"):
        prepared.dataset(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "both"}, r"^kind: 'both' is none of pretraining, instructions\.$"),
        ({"too_long": "cut"}, r"^too_long: 'cut' is none of drop, truncate\.$"),
        ({"bad_records": "fix"}, r"^bad_records: 'fix' is none of stop, skip\.$"),
        ({"eval_split": 0.6}, r"^eval_split: 0\.6 is no share from 0 to 0\.5\.$"),
        ({"eval_split": -0.1}, r"^eval_split: -0\.1 is no share"),
        ({"eval_split": float("nan")}, r"^eval_split: nan is no share"),
        ({"block_size": 1}, r"^block_size: 1 is too small; a block holds at least 2 tokens\.$"),
        ({"kind": "instructions"}, r"^Instructions need a template, and take no eval_split\.$"),
        ({"kind": "instructions", "template": TEMPLATE, "eval_split": 0.1}, r"^Instructions need a template"),
    ],
)
def test_settings_that_cannot_be_are_named(job: Job, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(job, **values)


def no_file(path: Path) -> None:
    path.unlink()


def no_utf8(path: Path) -> None:
    path.write_bytes(path.read_bytes() + '{"text": "中文"}'.encode("gb18030"))


def no_json(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_file, r"en\.jsonl: no such file\.$"),
        (empty, r"en\.jsonl: holds no text\.$"),
        (no_utf8, r"en\.jsonl, line 41: is not UTF-8; "),
        (no_json, r"en\.jsonl, line 41: is not valid JSON "),
    ],
)
def test_data_that_cannot_be_used_leave_nothing_behind(
    spoil: Callable[[Path], None], message: str, job: Job, fast: Any, tmp_path: Path
) -> None:
    """They have to change, and will have another key."""
    spoil(job.sources[1].path)
    with pytest.raises(BadFile, match=message):
        prepare(job, tmp_path / "prepared", fast)
    assert [path.name for path in tmp_path.glob("prepared/*")] in ([], [".lock"])


def test_a_directory_without_data_and_one_without_a_tokenizer_are_named(
    job: Job, fast: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match=r"empty: has no file that ends in \.txt"):
        prepare(replace(job, sources=(Source(tmp_path / "empty"),)), tmp_path / "prepared", fast)
    with pytest.raises(
        BadFile, match=r"empty: holds no tokenizer \(no tokenizer\.json or tokenizer\.model\)"
    ):
        key(replace(job, tokenizer=tmp_path / "empty"))
