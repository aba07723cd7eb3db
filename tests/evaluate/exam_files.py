"""C-Eval and CMMLU in their own formats, with made questions."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from tests import tiny

SCORED = {"ceval": "val", "cmmlu": "test"}
HEADERS = {
    "ceval": ["id", "question", "A", "B", "C", "D", "answer"],
    "cmmlu": ["", "Question", "A", "B", "C", "D", "Answer"],
}


def question(draw: random.Random, answer: str | None = None) -> list[str]:
    """Question, four choices, answer."""
    texts = [draw.choice(tiny.CHINESE)[draw.randrange(8) :][: draw.randrange(3, 12)] for _ in range(5)]
    return [*texts, answer or draw.choice("ABCD")]


def csv_file(root: Path, exam: str, split: str, subject: str) -> Path:
    return root / split / (f"{subject}_{split}.csv" if exam == "ceval" else f"{subject}.csv")


def write_csv(file: Path, header: list[str], rows: list[list[str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def write_exam(root: Path, exam: str, sizes: dict[str, int], dev: int = 5, answer: str | None = None) -> Path:
    """An exam with so many questions for each subject, and `dev` examples; all answers are `answer`, if given."""
    draw = random.Random(exam)
    for subject, size in sizes.items():
        for split, count in ((SCORED[exam], size), ("dev", dev)):
            rows = [[str(number), *question(draw, answer)] for number in range(count)]
            explained = ["explanation"] if (exam, split) == ("ceval", "dev") else []
            header = HEADERS[exam] + explained
            write_csv(csv_file(root, exam, split, subject), header, [[*row, *explained] for row in rows])
    return root
