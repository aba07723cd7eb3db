"""C-Eval and CMMLU as they are published: which subjects they have, and their questions from files.

A place is a directory (of the exam, or one level above it), the published .zip, or a hub id. In it lie
folders dev and val (C-Eval) or test (CMMLU) with a CSV file for each subject, or, as the hub converts such
data, a folder for each subject with a file for each split; not in archives, these may be Parquet or JSON lines.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama.config import load_yaml
from chinese_llama.data.formats import records, valid_unicode
from chinese_llama.errors import BadFile, UserError, nearest
from chinese_llama.hub import dataset, is_hub_id

TASKS = Path(__file__).with_name("tasks")
LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *LETTERS, "answer")
DEV = "dev"  # the split that examples are from
KINDS = ("csv", "parquet", "jsonl")
Folder = Path | zipfile.Path


@dataclass(frozen=True)
class Question:
    """The texts of COLUMNS, and where they stand: `line` is the record's first, or its number in a Parquet file."""

    texts: dict[str, str]
    file: str = field(compare=False)
    line: int | None = field(compare=False)


Questions = dict[str, dict[str, list[Question]]]  # subject -> "dev", "test" -> questions


@dataclass(frozen=True)
class Exam:
    """`subjects`: name in Chinese and category of each; `also`: further categories; `task`: what
    lm-evaluation-harness is told; `files`: how a subject's file is called; `scored`: the split with the
    questions."""

    name: str
    title: str
    files: str
    scored: str
    task: dict[str, Any]
    also: dict[str, list[str]]
    subjects: dict[str, list[str]]


def find_exam(name: str) -> Exam:
    """The exam called `name`. Raises UserError naming those there are."""
    known = sorted(file.stem for file in TASKS.glob("*.yaml"))
    if name not in known:
        raise UserError(f"exam {name!r} is unknown{nearest(name, known)}; known are {', '.join(known)}.")
    return Exam(name, **load_yaml(TASKS / f"{name}.yaml"))


def read_exam(exam: Exam, place: str | Path, shots: int) -> Questions:
    """The questions of the subjects that are in `place`, in the exam's order: "test" to be answered, "dev" the
    `shots` first examples.

    Raises UserError for a number of examples that is none, BadFile (with the line) for what cannot be used.
    """
    if shots < 0:
        raise UserError(f"{shots} examples before a question (shots): give 0 or more.")
    root, found = _find(exam, place)
    for subject, file in found.items():
        if subject not in exam.subjects:
            hint = nearest(subject, exam.subjects)
            raise BadFile(str(file), f"{subject!r} is no subject of {exam.title}{hint}; rename or remove it.")
    questions: Questions = {}
    for subject in [subject for subject in exam.subjects if subject in found]:
        questions[subject] = {"test": _read(found[subject]), "dev": []}
        if shots:
            questions[subject]["dev"] = _examples(exam, root, subject, shots)
    return questions


def _examples(exam: Exam, root: Folder, subject: str, shots: int) -> list[Question]:
    file = _files(exam, root, DEV).get(subject)
    if file is None:
        expected = root / DEV / exam.files.format(subject=subject, split=DEV)
        raise BadFile(
            str(expected),
            f"no such file; the {shots} examples before a question are from it (or give 0 shots).",
        )
    found = _read(file)
    if len(found) < shots:
        raise BadFile(str(file), f"holds {len(found)} examples, {shots} are asked for; give fewer shots.")
    return found[:shots]


def _find(exam: Exam, place: str | Path) -> tuple[Folder, dict[str, Folder]]:
    """The exam's folder in `place`, and in it the scored files by subject."""
    packed = str(place).endswith(".zip")
    if is_hub_id(place) and not packed:
        given = dataset(str(place), [f"**/*.{kind}" for kind in (*KINDS, "zip")])
    else:
        given = Path(place)
    if not given.is_dir() and not (packed and given.is_file()):
        raise BadFile(given, f"no such directory; {exam.title} is wanted here, as it is published.")
    for root in _roots(given):
        if files := _files(exam, root, exam.scored):
            return root, files
    pattern = f"{exam.scored}/{exam.files.format(subject='SUBJECT', split=exam.scored)}"
    raise BadFile(given, f"holds no {exam.title} ({pattern}), nor does a directory in it.")


def _roots(place: Path) -> Iterator[Folder]:
    """Where an exam may be: `place`, the directory above it (it may be the split itself), those in it; archives
    too."""
    if place.suffix == ".zip":
        try:
            packed = zipfile.Path(place)
        except zipfile.BadZipFile as error:
            raise BadFile(place, f"cannot be unpacked ({error}).") from error
        yield from [packed, *_folders(packed)]
        return
    yield place
    if place.name in (DEV, "val", "test"):
        yield place.parent
    yield from _folders(place)
    for archive in sorted(place.glob("*.zip")):
        yield from _roots(archive)


def _folders(place: Folder) -> list[Folder]:
    below: list[Any] = sorted(place.iterdir(), key=str)
    return [folder for folder in below if folder.is_dir() and not folder.name.startswith((".", "__"))]


def _files(exam: Exam, root: Folder, split: str) -> dict[str, Folder]:
    """The file of each subject for a split."""
    ending = exam.files.format(subject="", split=split).removesuffix(".csv")
    folder = root / split
    if folder.is_dir():
        kinds = "|".join(KINDS if isinstance(folder, Path) else KINDS[:1])
        named = re.compile(rf"([^.].*?)(?:{ending})?\.(?:{kinds})")
        found = ((named.fullmatch(file.name), file) for file in folder.iterdir())
        return _by_subject((name[1], file) for name, file in found if name)
    if not isinstance(root, Path):
        return {}
    below = [root.glob(f"*/{split}{rest}.{kind}") for kind in KINDS for rest in ("", "-*", "/[0-9]*")]
    files = [(file.relative_to(root).parts[0], file) for found in below for file in found]
    if not any(subject in exam.subjects for subject, _ in files):  # folders of other data, beside the exam's
        return {}
    return _by_subject(files)


def _by_subject(files: Iterable[tuple[str, Folder]]) -> dict[str, Folder]:
    found: dict[str, Folder] = {}
    for subject, file in sorted(files, key=str):
        if subject in found:
            raise BadFile(
                str(file),
                f"is a second file of {subject!r}, beside {found[subject]}; keep one, or put them together.",
            )
        found[subject] = file
    return found


def _read(file: Folder) -> list[Question]:
    """The questions of a file, each as it is written.

    The csv module reads them and not pandas (as the harness would), for which 1.50 is 1.5 and None is missing.
    """
    rows = records(file) if isinstance(file, Path) and file.suffix != ".csv" else _csv(file)
    found = [_question(str(file), line, row) for line, row in rows]
    if not found:
        raise BadFile(str(file), "holds no questions.")
    return found


def _csv(file: Folder) -> list[tuple[int, dict[str, str]]]:
    """(first line, fields by column) of the records of a CSV file."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(str(file), "is not UTF-8; convert it first (iconv -f GB18030 -t UTF-8).") from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # an archive's
        raise BadFile(str(file), f"cannot be read ({error}).") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    found, line = [], 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                what = f"has {len(row)} fields, its header {len(header)}; are commas in a text not quoted?"
                raise BadFile(str(file), what, line)
            if row:
                found.append((line, dict(zip(header, row, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadFile(str(file), f"is not valid CSV ({error}).", line) from error
    if not header:
        raise BadFile(str(file), "is empty.")
    _check_columns(str(file), header)
    return found


def _check_columns(file: str, header: list[str], line: int | None = None) -> None:
    written = {name.strip().lower() for name in header}
    missing = [name for name in COLUMNS if name.lower() not in written]
    if missing:
        names = ", ".join(name for name in header if name.strip()) or "nothing"
        raise BadFile(file, f"has no column {missing[0]!r} (found: {names}).", line)


def _question(file: str, line: int | None, row: Any) -> Question:
    """The fields of COLUMNS of a record, whose names C-Eval and CMMLU write with and without capitals."""
    if not isinstance(row, dict):
        raise BadFile(file, f"holds a {type(row).__name__} where a question is wanted.", line)
    _check_columns(file, list(row), line)
    by_name = {name.strip().lower(): value for name, value in row.items()}
    found = {name: by_name[name.lower()] for name in COLUMNS}
    texts = {name: "" if value is None else str(value) for name, value in found.items()}
    texts["answer"] = texts["answer"].strip().upper()
    if not texts["question"].strip():
        raise BadFile(file, "the question is empty.", line)
    if texts["answer"] not in LETTERS:
        raise BadFile(file, f"the answer is {texts['answer']!r}, not one of A, B, C, D.", line)
    return Question({name: valid_unicode(Path(file), line, text) for name, text in texts.items()}, file, line)
