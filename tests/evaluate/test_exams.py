"""The published formats of C-Eval and CMMLU, where people have them, and what is wrong with a file."""

from __future__ import annotations

import collections
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate.exams import find_exam, read_exam
from tests import test_hub
from tests.evaluate.exam_files import HEADERS, SCORED, csv_file, write_csv, write_exam

SUBJECTS = {"ceval": {"law": 3, "physician": 2}, "cmmlu": {"arts": 3, "virology": 2}}
EXAMS = sorted(SUBJECTS)


@pytest.fixture
def ceval(tmp_path: Path) -> Path:
    return write_exam(tmp_path / "ceval", "ceval", SUBJECTS["ceval"])


def zipped(root: Path, target: Path) -> Path:
    shutil.make_archive(str(target.with_suffix("")), "zip", root)
    return target


@pytest.mark.parametrize(
    ("exam", "sizes"),
    [
        ("ceval", {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11, "Hard": 8}),
        ("cmmlu", {"STEM": 17, "Social Science": 22, "Humanities": 13, "Other": 15, "China specific": 15}),
    ],
)
def test_the_subjects_and_categories_of_the_papers(exam: str, sizes: dict[str, int]) -> None:
    told = find_exam(exam)
    found = collections.Counter(category for _, category in told.subjects.values())
    assert {**found, **{name: len(members) for name, members in told.also.items()}} == sizes
    assert all(set(members) <= set(told.subjects) for members in told.also.values())
    assert len({name for name, _ in told.subjects.values()}) == len(told.subjects)


@pytest.mark.parametrize("exam", EXAMS)
def test_every_usual_layout_gives_the_same(exam: str, tmp_path: Path) -> None:
    root = write_exam(tmp_path / "up" / "exam", exam, SUBJECTS[exam])
    (root / SCORED[exam] / ".DS_Store").write_text("junk")
    (root / SCORED[exam] / f"._{next(iter(SUBJECTS[exam]))}_val.csv").write_text("junk")
    (tmp_path / "up" / "__MACOSX" / SCORED[exam]).mkdir(parents=True)
    packed = zipped(root, tmp_path / "hub" / "exam.zip")
    above = zipped(tmp_path / "up", tmp_path / "above.zip")
    told = find_exam(exam)
    wanted = read_exam(told, root, 2)
    assert {name: len(splits["test"]) for name, splits in wanted.items()} == SUBJECTS[exam]
    assert {len(splits["dev"]) for splits in wanted.values()} == {2}
    for place in (root.parent, root / SCORED[exam], root / "dev", packed, packed.parent, above):
        assert read_exam(told, place, 2) == wanted, place


@pytest.mark.parametrize("name", ["{}-00000-of-00001.parquet", "{}/0000.parquet", "{}.jsonl"])
def test_a_folder_for_each_subject_as_the_hub_has_it(ceval: Path, tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    told = find_exam("ceval")
    for subject, splits in read_exam(told, ceval, 5).items():
        for split, found in (("val", splits["test"]), ("dev", splits["dev"]), ("test", splits["dev"])):
            file = tmp_path / "made" / subject / name.format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            answers = {"answer": ""} if split == "test" else {}  # which are not published
            rows = Dataset.from_list([{"id": n, **one.texts, **answers} for n, one in enumerate(found)])
            rows.to_parquet(file) if file.suffix == ".parquet" else rows.to_json(file, force_ascii=False)
    assert read_exam(told, tmp_path / "made", 5) == read_exam(told, ceval, 5)


def test_json_lines_in_the_place_of_csv_files(tmp_path: Path) -> None:
    file = tmp_path / "test" / "arts.jsonl"
    file.parent.mkdir()
    line = {"Question": "问", "A": 1, "B": "2", "C": None, "D": "4", "Answer": "B"}
    file.write_text(json.dumps(line) + "\n")
    ((one,),) = [splits["test"] for splits in read_exam(find_exam("cmmlu"), tmp_path, 0).values()]
    assert (list(one.texts.values()), one.file, one.line) == (["问", "1", "2", "", "4", "B"], str(file), 1)
    empty = line | {"Question": None}
    for bad, what in (
        ([line], "holds a list where a question"),
        ({"A": 1}, "has no column 'question'"),
        (empty, "the question is empty"),
    ):
        file.write_text(json.dumps(line) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(BadFile, match=f"arts.jsonl, line 2: {what}"):
            read_exam(find_exam("cmmlu"), tmp_path, 0)


def test_other_data_beside_an_exam_do_not_hide_it(tmp_path: Path) -> None:
    cmmlu = write_exam(tmp_path / "exams" / "cmmlu", "cmmlu", {"arts": 2})
    (tmp_path / "exams" / "alpaca").mkdir()
    (tmp_path / "exams" / "alpaca" / "test.jsonl").write_text("{}\n")
    told = find_exam("cmmlu")
    assert read_exam(told, tmp_path / "exams", 5) == read_exam(told, cmmlu, 5)


@pytest.mark.parametrize(
    "names", [("test/arts.csv", "test/arts.jsonl"), ("arts/test-0.csv", "arts/test-1.csv")]
)
def test_two_files_of_a_subject_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write_csv(tmp_path / name, HEADERS["cmmlu"], [["0", "问", "1", "2", "3", "4", "A"]])
    with pytest.raises(
        BadFile, match=f"{names[1]}: is a second file of 'arts', beside .*{names[0]}; keep one"
    ):
        read_exam(find_exam("cmmlu"), tmp_path, 0)


def test_texts_stay_as_they_are_written(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "cmmlu", "test", "arts")
    row = ["0", '他说：“一, 二”"三"\n四  ', "007", "1.50", "None", "", " c "]
    write_csv(file, HEADERS["cmmlu"], [row, []])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert b"\r\n" in file.read_bytes()
    ((one,),) = [splits["test"] for splits in read_exam(find_exam("cmmlu"), tmp_path, 0).values()]
    assert (list(one.texts.values()), one.line) == ([*row[1:6], "C"], 2)


def test_subjects_come_in_the_order_of_the_exam(tmp_path: Path) -> None:
    write_exam(tmp_path, "ceval", {"physician": 1, "computer_network": 1, "law": 1})
    assert list(read_exam(find_exam("ceval"), tmp_path, 0)) == ["computer_network", "law", "physician"]


HEAD = b"id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty."),
        (HEAD, "holds no questions."),
        (
            b"id,question,A,B,D,answer\n0,q,1,2,4,A\n",
            "has no column 'C' (found: id, question, A, B, D, answer).",
        ),
        (b"\n\n", "is empty."),
        (HEAD + b"0,q,1,2,3,4,A\n1,q,1,2,3,4,E\n", ", line 3: the answer is 'E', not one of A, B, C, D."),
        (HEAD + b"0,q,1,2,3,4,\n", ", line 2: the answer is '', not one of A, B, C, D."),
        (
            HEAD + b'0,"two\nlines",1,2,3,4,A\n1,one, two,1,2,3,4,A\n',
            ", line 4: has 8 fields, its header 7; are commas in a text not quoted?",
        ),
        (
            HEAD + "0,题目,1,2,3,4,A\n".encode("gb18030"),
            "is not UTF-8; convert it first (iconv -f GB18030 -t UTF-8).",
        ),
        (HEAD + b"0," + b"q" * 200_000 + b",1,2,3,4,A\n", ", line 2: is not valid CSV (field larger"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(ceval: Path, content: bytes, told: str) -> None:
    file = csv_file(ceval, "ceval", "val", "law")
    file.write_bytes(content)
    with pytest.raises(BadFile) as error:
        read_exam(find_exam("ceval"), ceval, 5)
    assert str(error.value).startswith(f"{file}: " if told[0] != "," else f"{file}{told}")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_examples_are_only_needed_for_shots(ceval: Path) -> None:
    told = find_exam("ceval")
    file = csv_file(ceval, "ceval", "dev", "law")
    with pytest.raises(BadFile, match=r"law_dev.csv: holds 5 examples, 6 are asked for; give fewer shots\.$"):
        read_exam(told, ceval, 6)
    file.unlink()
    with pytest.raises(
        BadFile, match=r"law_dev.csv: no such file; the 1 examples before a question are from it"
    ):
        read_exam(told, ceval, 1)
    shutil.rmtree(ceval / "dev")
    with pytest.raises(BadFile, match=r"dev/law_dev.csv: no such file"):
        read_exam(told, ceval, 1)
    assert len(read_exam(told, ceval, 0)) == 2


def test_what_is_no_exam(ceval: Path, tmp_path: Path) -> None:
    told = find_exam("ceval")
    with pytest.raises(
        UserError, match=r"exam 'ceva' is unknown \(did you mean 'ceval'\?\); known are ceval, cmmlu"
    ):
        find_exam("ceva")
    with pytest.raises(UserError, match=r"^-1 examples before a question \(shots\): give 0 or more\.$"):
        read_exam(told, ceval, -1)
    with pytest.raises(BadFile, match=r"/missing: no such directory; C-Eval is wanted here"):
        read_exam(told, tmp_path / "missing", 0)
    with pytest.raises(BadFile, match=r"missing.zip: no such directory"):
        read_exam(told, "nothing/missing.zip", 0)
    with pytest.raises(BadFile, match=r"law_val.csv: no such directory"):
        read_exam(told, csv_file(ceval, "ceval", "val", "law"), 0)
    with pytest.raises(BadFile, match=r"holds no CMMLU \(test/SUBJECT.csv\), nor does a directory in it\.$"):
        read_exam(find_exam("cmmlu"), ceval, 0)
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(BadFile, match=r"bad.zip: cannot be unpacked"):
        read_exam(told, tmp_path / "bad.zip", 0)
    with pytest.raises(
        UserError, match=r"^ceval/ceval-exam is no dataset here, and the hub does not give it"
    ):
        read_exam(told, "ceval/ceval-exam", 0)
    csv_file(ceval, "ceval", "val", "law").rename(csv_file(ceval, "ceval", "val", "laws"))
    with pytest.raises(
        BadFile, match=r"'laws' is no subject of C-Eval \(did you mean 'law'\?\); rename or remove"
    ):
        read_exam(told, ceval, 0)


def test_a_damaged_archive_is_told(ceval: Path, tmp_path: Path) -> None:
    packed = zipped(ceval, tmp_path / "exam.zip")
    content = bytearray(packed.read_bytes())
    name = b"val/law_val.csv"
    start = content.index(name) + len(name)
    content[start : start + 20] = bytes(20)
    packed.write_bytes(content)
    with pytest.raises(BadFile, match=r"exam.zip/val/law_val.csv: cannot be read \("):
        read_exam(find_exam("ceval"), packed, 0)


class Hub(test_hub.Hub):
    fetched: ClassVar[list[str]] = []


def test_a_hub_id_is_downloaded(ceval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(ceval, tmp_path / "made.zip").read_bytes()
    assert zipfile.is_zipfile(io.BytesIO(archive))
    monkeypatch.setattr(
        test_hub, "FILES", {"ceval-exam.zip": archive, "ceval-exam.py": b"raise SystemExit(7)"}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    program = (
        "from chinese_llama.evaluate.exams import *\n"
        "print({s: len(q['test']) for s, q in read_exam(find_exam('ceval'), 'user/wiki', 5).items()})"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **place, "HF_HOME": str(tmp_path / "home")},
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
    finally:
        server.shutdown()
    assert done.stdout.strip() == str(SUBJECTS["ceval"]), done.stderr
    assert Hub.fetched == ["ceval-exam.zip"], "code is not fetched, let alone run"
