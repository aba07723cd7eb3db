"""What is wrong with data: files that are not what they seem, records without answers, text that is no clean Chinese.

What counts in a few records of many is a note, from a share of them on a warning, and where little is left an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chinese_llama.data.formats import corpus_files
from chinese_llama.doctor import raw
from chinese_llama.doctor.finding import Finding, Severity, listing, some
from chinese_llama.doctor.survey import (
    ENDLESS,
    LARGEST_LIST,
    LONG,
    SHORT,
    Survey,
    UnknownFormat,
    budgets,
)
from chinese_llama.doctor.things import Thing
from chinese_llama.errors import BadFile

CHINESE, FOREIGN = 0.5, 0.3  # shares of Han among the letters of Chinese text, and of text that is not
HELD_OUT = re.compile(r"held.?out|eval|test|dev(?![a-z])|valid", re.IGNORECASE)
NEVER = 2.0
# what others call the fields that this toolkit reads
QUESTION = ("instruction", "question", "query", "prompt", "问题", "input")
ANSWER = ("answer", "response", "completion", "output", "reply", "回答", "target")
TEXT = ("content", "body", "document", "article", "passage", "sentence")


@dataclass(frozen=True)
class Rule:
    """What is said of records that were counted: `what` after "N of M records (share)"; a warning and an error from
    which share of them on."""

    check: str
    what: str
    remedy: str
    warning: float = 0.001
    error: float = NEVER


RULES = (
    Rule(
        "malformed-records", "cannot be read as what the others are; training stops at the first.",
        "Correct or remove them, or let sft_lora leave them out: bad_records: skip.", 0.0, 0.0,
    ),
    Rule(
        "records-without-answer", "have no answer, and teach nothing: sft_lora leaves them out.",
        "Remove them, or see whether the answer is in another field than the format's.", 0.001, 0.5,
    ),
    Rule(
        "no-answer-field", "have no field with the answer (output); training stops at the first.",
        "Write the answer into a field `output`, or leave them out: bad_records: skip in sft_lora.", 0.0, 0.0,
    ),
    Rule(
        "preference-pairs", "are preference pairs (chosen, rejected), which sft_lora cannot learn from.",
        "Write each with its chosen answer as the last turn.", 0.0, 0.5,
    ),
    Rule(
        "records-without-question", "have an empty question: sft_lora leaves them out.",
        "Remove them, or see whether the question is in another field.", 0.001, 0.5,
    ),
    Rule(
        "answer-is-prompt", "answer with the question itself.", "Remove them: they teach to repeat.", 0.001, 0.5,
    ),
    Rule(
        "control-tokens", "hold control tokens or markers of a template as text (<s>, <|im_end|>, [INST], "
        "### Response:), of a template that was applied already; other programs read them as control tokens.",
        "Take the data before the template was applied, or remove them; this toolkit reads them as text.",
    ),
    Rule(
        "duplicates", "are there before, word for word: they are learnt by heart.", "Keep one of each.", 0.01,
    ),
    Rule(
        "same-questions", "ask what another record asks, and answer otherwise.",
        "Keep one of each, unless several answers are meant.", NEVER,
    ),
    Rule(
        "near-empty-documents", f"hold less than {SHORT} characters.",
        "Remove them, or join lines that belong together: in .txt a line is a document.", 0.05,
    ),
    Rule(
        "mojibake", "were decoded in another encoding than they were written in (锟斤拷, ä¸­, 涓).",
        "Read the original files again with their own encoding, as UTF-8: such text cannot be mended whole.",
        0.001, 0.1,
    ),
    Rule(
        "replacement-characters", "hold U+FFFD (�): characters were lost when the text was decoded.",
        "Decode the original again with its own encoding, or remove those records.", 0.001, 0.1,
    ),
    Rule(
        "invisible-characters", "hold invisible characters (zero-width, direction marks, control characters), which "
        "cost tokens and split words.",
        "Remove them: re.sub('[\\u200b\\u200e\\u200f\\u2060\\ufeff]', '', text).", 0.02,
    ),
    Rule(
        "private-use-characters", "hold private-use characters, which mean something in one font only.",
        "Replace or remove them.", 0.005,
    ),
    Rule(
        "html", "hold what is left of HTML (tags, &nbsp; &#39;).",
        "Unescape (html.unescape) and strip tags, unless it is code on purpose.", 0.01,
    ),
    Rule(
        "endless-documents", f"are longer than {ENDLESS:,} characters: a whole file as one record?",
        "Cut them where texts end; in .jsonl every document is a line of its own.", 0.0,
    ),
    Rule(
        "long-conversations", f"are longer than {LONG:,} characters, and are cut at max_seq_length.",
        "See sft_lora's max_seq_length and too_long.", NEVER,
    ),
    Rule("not-chinese", "are mostly not Chinese.", "See whether they are meant to be there.", NEVER),
)  # fmt: skip


def look(thing: Thing) -> tuple[list[Finding], Survey | None]:
    """The findings about data, and what was counted (None for data that `prepare` made, which is not text)."""
    if thing.facts.get("made_by"):
        return [], None
    measures = bool(thing.facts.get("measures") or HELD_OUT.search(thing.path.name))
    survey, findings = Survey(thing.path, measures), []
    try:
        files = corpus_files(thing.path)
    except BadFile as error:
        return [_unread(thing.path, error)], None
    told = budgets(files)
    for file in files:
        wrong = list(_file(file))
        findings += wrong
        if not any(one.severity == "error" for one in wrong):
            findings += _read(survey, file, told[file])
    findings += _counted(survey)
    _describe(thing, survey)
    return findings, survey


def check_unknown(thing: Thing) -> Iterator[Finding]:
    """A file that nothing is known of: data under another name, perhaps."""
    if not thing.path.is_file():
        return
    problems = [*raw.unfinished(thing.path)]
    problems += [problem] if not problems and (problem := raw.broken(thing.path)) else []
    yield from problems
    if problems:
        return
    kind, start = raw.other_content(thing.path), raw.head(thing.path)
    line = start.decode("utf-8", "replace").lstrip("\ufeff").split("\n")[0]
    name = ".jsonl" if raw.is_json_line(line) else None
    if thing.path.suffix in (".csv", ".tsv"):
        what, remedy = (
            "is a table as text",
            f"Write it as records: python -c \"import pandas; pandas.read_csv('{thing.path}', "
            f"sep={',' if thing.path.suffix == '.csv' else chr(92) + 't'!r}).to_json('{thing.path.stem}.jsonl', "
            "orient='records', lines=True, force_ascii=False)\"; the fields are instruction and output, or text.",
        )
    elif name:
        what, remedy = (
            f"holds a JSON record a line, but is not called {name}",
            f"Rename it to {thing.path.name}{name}.",
        )
    else:
        what = f"is {kind}" if kind else "is no file that this toolkit knows"
        remedy = "Data are .txt (a document a line), .jsonl, .json, .parquet, also .gz or .zst."
        if start.startswith(b"GGUF"):
            remedy = (
                "Give the model's Hugging Face form (config.json, safetensors): GGUF is for llama.cpp to run."
            )
    yield Finding(
        "error" if name else "warning", "wrong-extension" if name else "unknown-file", str(thing.path),
        f"The file {what}: the toolkit does not read it.", [repr(start[:40]) if kind else repr(line[:80])], remedy,
    )  # fmt: skip


def _file(file: Path) -> Iterator[Finding]:
    """What is wrong with a file as a whole."""
    problem = raw.broken(file)
    if problem is not None:
        yield problem
        return
    where, start = str(file), raw.head(file)
    if kind := raw.other_content(file):
        remedy = "Give it the ending that it should have, and unpack it if need be."
        yield Finding(
            "error",
            "wrong-extension",
            where,
            f"The content is {kind}, the name says otherwise.",
            [repr(start[:40])],
            remedy,
        )
        return
    if file.suffix == ".parquet":
        return
    if name := raw.encoding(start):
        code = {"GBK (GB18030)": "GB18030", "Big5": "BIG5", "UTF-16": "UTF-16"}.get(name, "ENCODING")
        yield Finding(
            "error", "wrong-encoding", where,
            "The text is not UTF-8" + (f"; it looks like {name}." if name != "unknown" else "."),
            [repr(start[:40])], f"Convert it: iconv -f {code} -t UTF-8 {file.name} > utf8-{file.name}",
        )  # fmt: skip
        return
    if start.startswith(b"\xef\xbb\xbf"):
        what = "The file begins with a byte-order mark; this toolkit drops it, others may not."
        yield Finding(
            "note", "byte-order-mark", where, what, [], f"sed -i '1s/^\\xef\\xbb\\xbf//' {file.name}"
        )
    yield from _form(file, start.decode("utf-8", "replace").lstrip("\ufeff"))


def _form(file: Path, text: str) -> Iterator[Finding]:
    """JSON in .txt, a list in .jsonl, a list too large to be read whole."""
    where, names = str(file), file.name.split(".")
    lines = [line for line in text.split("\n") if line.strip()][:5]
    if "txt" in names[1:] and lines and all(map(raw.is_json_line, lines[: max(1, len(lines) - 1)])):
        yield Finding(
            "error", "wrong-extension", where,
            "Each line is a JSON record, but .txt is read as it stands: braces and field names would be trained on.",
            [lines[0][:80]], f"Rename it to {file.name.replace('.txt', '.jsonl')}.",
        )  # fmt: skip
    elif "jsonl" in names[1:] and lines and lines[0].lstrip().startswith("["):
        yield Finding(
            "error", "wrong-extension", where, "The file is one JSON list, and .jsonl means a record a line.",
            [lines[0][:80]], f"Rename it to {file.name.replace('.jsonl', '.json')}.",
        )  # fmt: skip
    elif "json" in names[1:] and text.lstrip().startswith("[") and file.stat().st_size > LARGEST_LIST:
        yield Finding(
            "error", "json-too-large", where,
            f"The file is one JSON list of {file.stat().st_size / 1e9:.1f} GB, which has to be in memory whole.",
            listing(file), "Write a record a line (.jsonl): jq -c '.[]'.",
        )  # fmt: skip


def _read(survey: Survey, file: Path, budget: int | None) -> list[Finding]:
    before = survey.records
    try:
        survey.read(file, budget)
    except UnknownFormat as error:
        return [
            Finding(
                "error", "unknown-format", str(file), "The records are neither documents nor conversations.",
                [f"the first {error}"],
                _renamed(file, error.names),
            )
        ]  # fmt: skip
    except (BadFile, OSError, UnicodeError) as error:
        return [_unread(file, error)]
    if survey.records == before:
        return [
            Finding(
                "error",
                "file-empty",
                str(file),
                "The file holds no records.",
                listing(file),
                "Get or make it again.",
            )
        ]
    return []


def _renamed(file: Path, names: set[str]) -> str:
    """What to type, so that the records are in a known format."""
    question, answer, text = (
        next((name for name in known if name in names), None) for known in (QUESTION, ANSWER, TEXT)
    )
    if question and answer:
        fields = f'instruction: ."{question}", output: ."{answer}"'
    elif text:
        fields = f'text: ."{text}"'
    else:
        return (
            "Documents have a field `text`; conversations instruction and output, messages, or conversations."
        )
    each = ".[] | " if file.name.split(".")[1:2] == ["json"] else ""
    return f"Rename the fields: jq -c '{each}{{{fields}}}' {file.name} > renamed.jsonl"


def _unread(file: Path, error: Exception) -> Finding:
    told = str(error).removeprefix(f"{file}: ")
    what = "The data cannot be read."
    return Finding(
        "error", "data-not-readable", str(file), what, [told], "Correct it, or get the file again."
    )


def _counted(survey: Survey) -> Iterator[Finding]:
    """A finding for everything that was counted, by its share of the records."""
    for rule in RULES:
        hits = survey.hits.get(rule.check)
        foreign = survey.han < FOREIGN * survey.letters  # as a whole: told once, with what is given beside it
        if hits is None or (rule.check == "not-chinese" and foreign):
            continue
        share = hits.count / max(1, survey.records)
        severity: Severity = (
            "error" if share >= rule.error else "warning" if share >= rule.warning else "note"
        )
        more = hits.count - len(hits.examples)
        yield Finding(
            severity, rule.check, str(survey.path),
            f"{hits.count:,} of {survey.records:,} records ({share:.2%}) {rule.what}",
            [*hits.examples, *([f"... and {more:,} more"] if more else [])], rule.remedy,
        )  # fmt: skip
    if len(survey.kinds) > 1:
        yield Finding(
            "warning", "mixed-formats", str(survey.path), "The data are of several kinds.",
            [f"{kind}: {count:,} records" for kind, count in survey.kinds.items()],
            "Give documents (pt_lora) and conversations (sft_lora) in files of their own.",
        )  # fmt: skip
    forms = survey.traditional + survey.simplified
    if survey.han >= FOREIGN * survey.letters and survey.traditional > 0.05 * forms:
        share = survey.traditional / forms
        yield Finding(
            "note", "traditional-characters", str(survey.path),
            f"{share:.0%} of the characters that have two forms are traditional, {1 - share:.0%} simplified.",
            [], "" if share > 0.95 else "If one form is wanted, convert the other (OpenCC).",
        )  # fmt: skip
    if survey.partly:
        what = f"Large data are read in part: {survey.records:,} records; the figures are of those."
        yield Finding("note", "read-in-part", str(survey.path), what, some(survey.partly))


def _describe(thing: Thing, survey: Survey) -> None:
    """What the data are, in the thing's facts and title."""
    share = survey.han / max(1, survey.letters)
    named = ["conversations" if kind not in ("documents", "prompts") else kind for kind in survey.kinds]
    kinds = ", ".join(dict.fromkeys(named))
    formats = [kind for kind in survey.kinds if kind not in ("documents", "prompts")]
    thing.facts |= {
        "formats": dict(survey.kinds), "records": survey.records, "characters": survey.characters,
        "han_among_letters": round(share, 4), "read_in_part": bool(survey.partly),
    }  # fmt: skip
    if not survey.kinds:
        thing.title = "data: nothing that can be read"
        return
    which = f" ({', '.join(formats)})" if formats else ""
    part = ", read in part" if survey.partly else ""
    thing.title = (
        f"data: {kinds}{which}, {survey.records:,} records, {survey.characters:,} characters{part}"
        + (f", {share:.0%} of the letters Chinese" if survey.letters else "")
    )


def check_data_together(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Data that are given together: what is in both, and what is mostly not Chinese without Chinese beside it."""
    chinese = any(survey.han >= CHINESE * survey.letters > 0 for survey in surveys)
    for survey in surveys:
        if survey.letters and survey.han < FOREIGN * survey.letters:
            share = survey.han / survey.letters
            yield Finding(
                "note" if chinese else "warning", "mostly-not-chinese", str(survey.path),
                f"{share:.1%} of the letters are Chinese: "
                + ("a replay set, for what the model is to keep." if chinese else "nothing here teaches Chinese."),
                [] if chinese or "not-chinese" not in survey.hits else survey.hits["not-chinese"].examples,
                "" if chinese else "As replay beside a Chinese corpus it is right, with a weight of about 0.2.",
            )  # fmt: skip
    for number, one in enumerate(surveys):
        for two in surveys[number + 1 :]:
            yield from _overlap(one, two)


def _overlap(one: Survey, two: Survey) -> Iterator[Finding]:
    """What two data sets share: documents, or first questions of conversations."""
    if one.path.resolve() == two.path.resolve():
        return
    small, large = sorted((one, two), key=lambda survey: len(survey.asked))
    common = [key for key in small.asked if key in large.asked]
    if not common:
        return
    share = len(common) / len(small.asked)
    measured = one.measures != two.measures
    yield Finding(
        "error" if measured else "warning" if share >= 0.01 else "note", "data-overlap", str(small.path),
        f"{len(common):,} of its {len(small.asked):,} documents or questions ({share:.1%}) are in {large.path} too: "
        + ("what is measured on them says nothing, once they are trained on." if measured else
           "they count twice; where one of the two is to measure with, it measures nothing."),
        some([f"{small.asked[key]}, and {large.asked[key]} of {large.path.name}" for key in common]),
        "Remove them from what is trained on; prepare and the recipes hold documents out by themselves (eval_split).",
    )  # fmt: skip
