"""Records line by line: nothing is lost but what a kill has cut."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate.lines import append_line, read_lines

RECORDS = st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=5)


@given(records=RECORDS, cut=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    records: list[dict[str, Any]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    for record in records:
        append_line(file, record)
    assert read_lines(file) == records
    if not records:
        return
    raw = file.read_bytes()
    file.write_bytes(raw[: (cut := min(cut, len(raw)))])
    whole = raw[:cut].count(b"\n")
    kept = read_lines(file)
    assert kept[:whole] == records[:whole] and len(kept) - whole in (0, 1)  # one if only its line end is cut
    append_line(file, {"new": 1})
    assert read_lines(file) == [*kept, {"new": 1}]


def test_a_last_line_of_an_editor_without_its_end_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}')
    append_line(file, {"a": 3})
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


@pytest.mark.parametrize("line", ["not json", "[1]", "7", '{"a": ', "\udcff"])
def test_a_line_in_the_middle_that_is_no_record_is_told(line: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(f'{{"a": 1}}\n\n{line}\n'.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadFile, match=r"x\.jsonl, line 3: is no record"):
        read_lines(file)


def test_many_may_write(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"

    def write(name: int) -> None:
        for number in range(20):
            append_line(file, {"name": name, "number": number, "text": "中" * 500})

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 80


def test_where_nothing_can_be_written_or_read(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "no" / "x") == []
    with pytest.raises(UserError, match="cannot be written"):
        append_line(tmp_path / "no" / "x", {})
