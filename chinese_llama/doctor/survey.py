"""Read data once, and count in it all that the doctor looks for. Sentences about the counts are in data.py.

Up to `FULL` bytes everything is read. Of more, the beginning of each file, and of files that lines can be found in
(uncompressed .txt and .jsonl) pieces at even distances too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from chinese_llama.data.conversations import Malformed, Message, conversation_of, detected
from chinese_llama.data.formats import records, valid_unicode
from chinese_llama.doctor import raw
from chinese_llama.errors import BadFile, UserError
from chinese_llama.progress import track
from chinese_llama.vocab.measure import HAN, LATIN, OTHER, script_of

FULL = 200 << 20  # bytes of text that are read whole; of more, about as many
LARGEST_LIST = 1 << 30  # bytes of a .json file, which is in memory whole
PACKED = 4  # bytes of text in one of a .gz or .zst file
PIECE = 1 << 20  # bytes of a piece of a large file
BATCH = 1 << 20  # characters
SHORT, LONG, ENDLESS = 10, 10_000, 1_000_000  # characters of a document, a conversation, anything
KANA = (0x3040, 0x30FF)  # https://www.unicode.org/charts/PDF/U3040.pdf and U30A0.pdf
JAPANESE = 0.2  # of the letters that are kana, in a text that is Japanese, Han or not
ANSWERS = {"completion", "response", "answer", "output", "chosen"}
FEW = 20  # letters that tell a language
EXAMPLES = 5

CONTROL = re.compile(
    r"</?s>|<[|｜][^<>|｜\s]{2,30}[|｜]>|\[/?INST\]|<</?SYS>>|<(?:unk|pad|bos|eos|sop|eop|eot)>|\[PAD\]|\[gMASK\]"
    r"|<(?:start|end)_of_turn>|^### ?(?:Response|Instruction):",
    re.MULTILINE,
)
HTML = re.compile(
    r"</?(?:div|span|p|br|a|img|td|tr|table|script|style|li|ul|font|b|strong|h[1-6])(?:\s[^<>]*)?/?>"
    r"|&(?:nbsp|lt|gt|amp|quot|#\d{2,5});",
    re.IGNORECASE,
)
INVISIBLE = re.compile("[\u0000-\u0008\u000e-\u001f\u007f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
# UTF-8 taken for Latin-1 or Windows-1252 (ä¸­å›½), UTF-8 taken for GBK (涓浗, 锛), and what lossy ways back leave
LATIN_1 = re.compile(
    "(?:[\u00c2-\u00ef][\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u203a\u20ac\u2122]{1,2}){2}"
)
AS_GBK = re.compile("[鐨涓銆锛浜鏄鍦鎴]")
LOSSY = ("锟斤拷", "烫烫烫", "屯屯屯")
TRADITIONAL = (
    "這們來時說國會對發學過後還沒無種從進開長問間將讓點當實現經應變東車書語話關見電樂媽爾給義愛頭馬門氣萬買賣"
)
SIMPLIFIED = (
    "这们来时说国会对发学过后还没无种从进开长问间将让点当实现经应变东车书语话关见电乐妈尔给义爱头马门气万买卖"
)


@dataclass
class Hits:
    """How often something was seen, and the first places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """What was read. `kinds`: records by format ("documents", or that of conversations); `letters`, `han`,
    `traditional`, `simplified`: characters; `seen`: hashes of whole records, `asked`: of first questions or
    documents, with their places; `partly`: what was not read; `measures`: it is there to measure with."""

    path: Path
    measures: bool = False
    kinds: Counter[str] = field(default_factory=Counter)
    records: int = 0
    characters: int = 0
    hits: dict[str, Hits] = field(default_factory=dict)
    letters: int = 0
    han: int = 0
    traditional: int = 0
    simplified: int = 0
    seen: dict[int, str] = field(default_factory=dict)
    asked: dict[int, str] = field(default_factory=dict)
    partly: list[str] = field(default_factory=list)
    _again: str | None = None
    _batch: list[tuple[str, str]] = field(default_factory=list)
    _size: int = 0
    _bytes: int = 0

    def hit(self, name: str, place: str, shown: str = "") -> None:
        """Count something at a place, of which a piece of text may be shown."""
        hits = self.hits.setdefault(name, Hits())
        hits.count += 1
        if len(hits.examples) < EXAMPLES:
            hits.examples.append(f"{place}: {shown}" if shown else place)

    def read(self, file: Path, budget: int | None) -> None:
        """Read a file, about `budget` bytes of it. Raises BadFile for what cannot be read at all."""
        before = self._bytes
        kind = ""
        name = f"{file.name}, " if file != self.path else ""
        count = 0
        rows = track(self._records(file), f"reading {file.name}", unit="records")
        for count, (line, record) in enumerate(rows, 1):
            kind = self._take(kind, f"{name}line {line}" if line else f"{name}record {count}", record, file)
            if budget is not None and self._bytes - before > budget // 2:
                self.partly.append(
                    f"{file.name}: the first {count:,} records" + self._spaced(file, kind, name, budget)
                )
                break
        self._count_letters()

    def _records(self, file: Path) -> Iterator[tuple[int | None, Any]]:
        def bad(error: BadFile) -> None:
            self.records += 1
            self.hit("malformed-records", str(error).removeprefix(str(self.path)).lstrip(", "))

        return records(file, bad=bad)

    def _spaced(self, file: Path, kind: str, name: str, budget: int) -> str:
        """Read pieces of the rest of a file, at even distances; says how many."""
        size, pieces = file.stat().st_size, max(1, budget // 2 // PIECE)
        if file.suffix not in (".txt", ".jsonl") or size <= budget + PIECE:
            return ""
        with open(file, "rb") as stream:
            for number in track(range(pieces), f"sampling {file.name}", unit="pieces"):
                stream.seek(
                    budget + (size - budget - PIECE) * number // max(1, pieces - 1)
                )  # the last at the end
                stream.readline()
                at = stream.tell()
                for line in stream.read(PIECE).split(b"\n")[:-1]:
                    if line.strip():
                        self._line(file, kind, f"{name}byte {at:,}", line)
                    at += len(line) + 1
        return f", and {pieces} pieces of {PIECE:,} bytes at even distances in the other {size - budget:,}"

    def _line(self, file: Path, kind: str, place: str, line: bytes) -> None:
        try:
            text = line.decode("utf-8").rstrip("\r")
            self._take(kind, place, text if file.suffix == ".txt" else json.loads(text), file)
        except (ValueError, RecursionError) as error:
            self.records += 1
            self.hit("malformed-records", place, str(error)[:80])

    def _take(self, kind: str, place: str, record: Any, file: Path) -> str:
        """Count one record; returns what kind the file's are."""
        if isinstance(record, str) and not record.strip():
            return kind
        self.records += 1
        kind = kind or _kind(record)
        self.kinds[kind] += 1
        try:
            texts = self._texts(kind, place, record, file)
        except (Malformed, UserError) as error:
            lost = "it has no 'output'" in str(error)
            self.hit(
                "no-answer-field" if lost else "malformed-records",
                place,
                str(error).removeprefix(f"{file}: ")[:160],
            )
            return kind
        text = "\n".join(texts)
        if text.strip():
            self._look(kind, place, text)
        return kind

    def _texts(self, kind: str, place: str, record: Any, file: Path) -> list[str]:
        """What people wrote in a record. Raises for a malformed one."""
        if kind in ("documents", "prompts"):
            if kind == "prompts" and isinstance(record, dict) and "chosen" in record:
                self.hit("preference-pairs", place, _shown(_plain(record)))
                return []
            field = "text" if kind == "documents" else "prompt"
            text = (
                record if isinstance(record, str) else record.get(field) if isinstance(record, dict) else None
            )
            if not isinstance(text, str):
                raise Malformed(f"has no text in a field {field!r}")
            valid_unicode(file, None, text)
            if not text.strip():
                self.hit("near-empty-documents", place)
            self._ask(place, text)
            return [text]
        messages = conversation_of(kind, record)
        for message in messages:
            valid_unicode(file, None, message["content"])
        if not self._answered(place, messages, record):
            return []
        return [message["content"] for message in messages]

    def _answered(self, place: str, messages: list[Message], record: Any) -> bool:
        """Whether a conversation has questions and answers."""
        said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
        for message in messages:
            said[message["role"]].append(message["content"].strip())
        if not messages or not all(said["assistant"]):
            preference = isinstance(record, dict) and {"chosen", "rejected"} <= record.keys()
            self.hit(
                "preference-pairs" if preference else "records-without-answer", place, _shown(_plain(record))
            )
            return False
        if not all(said["user"]):
            self.hit("records-without-question", place, _shown(said["assistant"][0]))
            return False
        self._again = self._ask(place, said["user"][0])
        if any(one == two for one, two in zip(said["user"], said["assistant"], strict=False)):
            self.hit("answer-is-prompt", place, _shown(said["assistant"][0]))
        return True

    def _ask(self, place: str, text: str) -> str | None:
        """Remember what is asked at a place; where it was asked before, None if nowhere."""
        first = self.asked.setdefault(hash("".join(text.split())), place)
        return None if first == place else first

    def _look(self, kind: str, place: str, text: str) -> None:
        """Look for everything in the text of one record."""
        self.characters += len(text)
        self._bytes += len(text.encode())
        first = self.seen.setdefault(hash(text.strip()), place)
        if first != place:
            self.hit("duplicates", place, f"as {first}: {_shown(text)}")
        elif self._again and kind not in ("documents", "prompts"):
            self.hit("same-questions", place, f"as {self._again}: {_shown(text)}")
        if kind == "documents" and len(text.strip()) < SHORT:
            self.hit("near-empty-documents", place, _shown(text))
        if len(text) > ENDLESS:
            self.hit("endless-documents", place, f"{len(text):,} characters")
        elif kind not in ("documents", "prompts") and len(text) > LONG:
            self.hit("long-conversations", place, f"{len(text):,} characters")
        self._marks(place, text)
        self._batch.append((place, text))
        self._size += len(text)
        if self._size > BATCH:
            self._count_letters()

    def _marks(self, place: str, text: str) -> None:
        """Characters and words that do not belong in a text."""
        if ("<" in text or "[" in text or "###" in text) and (found := CONTROL.search(text)):
            self.hit("control-tokens", place, _around(text, found.start()))
        if ("<" in text or "&" in text) and (found := HTML.search(text)):
            self.hit("html", place, _around(text, found.start()))
        if "\ufffd" in text:
            self.hit("replacement-characters", place, _around(text, text.index("\ufffd")))
        if found := INVISIBLE.search(text):
            shown = f"U+{ord(found[0]):04X} in {_around(text, found.start())}"
            self.hit("invisible-characters", place, shown)
        if found := PRIVATE.search(text):
            self.hit(
                "private-use-characters", place, f"U+{ord(found[0]):04X} in {_around(text, found.start())}"
            )
        if (at := _mojibake(text)) is not None:
            self.hit("mojibake", place, _around(text, at))

    def _count_letters(self) -> None:
        """Count scripts in the waiting texts, and those that are mostly not Chinese."""
        if not self._batch:
            return
        code = numpy.frombuffer(
            "".join(text for _, text in self._batch).encode("utf-32-le"), dtype=numpy.uint32
        )
        script = script_of(code)
        ends = numpy.cumsum([len(text) for _, text in self._batch])
        sums = {}
        kana = (code >= KANA[0]) & (code <= KANA[1])
        letters = numpy.isin(script, (HAN, LATIN, OTHER))
        for name, chosen in (("han", (script == HAN) & ~kana), ("kana", kana), ("letters", letters)):
            totals = numpy.concatenate([[0], numpy.cumsum(chosen)])[numpy.concatenate([[0], ends])]
            sums[name] = numpy.diff(totals)
        sums["han"][sums["kana"] > JAPANESE * sums["letters"]] = 0
        for (place, text), han, count in zip(self._batch, sums["han"], sums["letters"], strict=True):
            if count >= FEW and han < 0.3 * count:
                self.hit("not-chinese", place, _shown(text))
        self.han += int(sums["han"].sum())
        self.letters += int(sums["letters"].sum())
        for name, forms in (("traditional", TRADITIONAL), ("simplified", SIMPLIFIED)):
            table: Any = numpy.zeros(0x10000, dtype=bool)
            table[[ord(c) for c in {*forms} - ({*TRADITIONAL} & {*SIMPLIFIED})]] = True
            setattr(self, name, getattr(self, name) + int(table[code[code < 0x10000]].sum()))
        self._batch, self._size = [], 0


def _kind(record: Any) -> str:
    """What the records of a file are, by the first. Raises BadFile-like Malformed for no known format."""
    if isinstance(record, str):
        return "documents"
    if (
        isinstance(record, dict)
        and "text" in record
        and not {"instruction", "messages", "conversations"} & record.keys()
    ):
        return "documents"
    try:
        return detected(record)
    except Malformed as error:
        names = set(record) if isinstance(record, dict) else set()
        if "prompt" in names and ("rejected" in names or not names & ANSWERS):
            return "prompts"
        raise UnknownFormat(str(error), names) from None


class UnknownFormat(UserError):
    """Records that are neither documents nor conversations; `names`: their fields."""

    def __init__(self, told: str, names: set[str]) -> None:
        super().__init__(told)
        self.names = names


def _mojibake(text: str) -> int | None:
    """Where a text was decoded in another encoding than it was written in, None if it was not."""
    for lossy in LOSSY:
        if lossy in text:
            return text.index(lossy)
    if found := LATIN_1.search(text):
        return found.start()
    found = AS_GBK.search(text)
    if found is None or len(AS_GBK.findall(text[:2000])) < 2:
        return None
    part = text[:2000].encode("gbk", "ignore").decode("utf-8", "replace")
    back = sum(character in raw.COMMON for character in part)
    return found.start() if back > sum(character in raw.COMMON for character in text[:2000]) else None


def _plain(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)


def _shown(text: str) -> str:
    return repr(text.strip()[:40])


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 15) : at + 25])


def budgets(files: list[Path]) -> dict[Path, int | None]:
    """How many bytes of each file are read: None for all."""
    sizes = {
        file: file.stat().st_size * (PACKED if file.suffix in (".gz", ".zst", ".parquet") else 1)
        for file in files
    }
    total = sum(sizes.values())
    return {
        file: None if total <= FULL else max(1 << 20, FULL * size // total) for file, size in sizes.items()
    }
