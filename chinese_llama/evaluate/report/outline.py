"""All sections of a report, in order: what the page and the Markdown both write."""

from __future__ import annotations

import re

from chinese_llama.evaluate.report.blocks import Section
from chinese_llama.evaluate.report.exams import exams
from chinese_llama.evaluate.report.made import answers, artifacts, notes, settings, speed, vocabulary
from chinese_llama.evaluate.report.measured import bits, forgetting
from chinese_llama.evaluate.report.training import training
from chinese_llama.evaluate.report.values import one_line
from chinese_llama.evaluate.report.view import View

MOMENT = re.compile(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ$")
PARTS = (bits, forgetting, answers, exams, speed, vocabulary, training, artifacts, settings, notes)


def sections(view: View) -> list[Section]:
    return [section for part in PARTS if (section := part(view))]


def heading(view: View) -> tuple[str, str]:
    """The title, and in one line when it was made and by what."""
    said = [one_line(view.told.get(key)) for key in ("created", "tool")]
    said[0] = MOMENT.sub(r"\1 \2 UTC", said[0])
    return one_line(view.told.get("title")) or "Report", " · ".join(filter(None, said))
