"""Check a tokenizer: against its base, against itself in other readers, and on a corpus.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from chinese_llama.data.formats import texts as texts_of
from chinese_llama.progress import track
from chinese_llama.resources import shipped
from chinese_llama.vocab.measure import Lengths, figures
from chinese_llama.vocab.readers import Reader, open_readers
from chinese_llama.vocab.scripts import CHINESE

BATCH = 256  # documents
LARGEST = 4_000_000  # characters of a batch; a document is never cut
EXAMPLES = 5
SHOWN = 120  # characters of an example
PROBLEMS = {
    "disagreements": "SentencePiece and tokenizer.json give different ids for",
    "changed": "text without Chinese is tokenised differently than by the base",
    "longer": "more tokens than under the base for",
    "lost": "decoding does not give back, though the base's does,",
}

PROBES = (
    "",
    " ",
    "  two spaces, and three   more",
    "trailing space ",
    "\ttab\tand\nnewline\r\nand more\n\n",
    "In 2023 the price rose by 10.5% to $1,234,567.89 (see https://example.org/a?b=c&d=1).",
    "def f(x):\n    return {'a': [1, 2, 3]}  # code",
    "naïve café Zürich Ελληνικά русский العربية हिन्दी 한국어",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f emoji",
    "人工智能是计算机科学的一个分支，它企图了解智能的实质。",
    "越来越多的人在使用互联网！你呢？（真的）“是的”——《红楼梦》……",
    "2023年10月1日，GDP增长5.2%，约为126.06万亿元。",
    "繁體中文與简体中文混排，以及日本語のかな、カタカナ。",
    "　全角空格　ＡＢＣ１２３，；：？！",
    "生僻字：䶮、𠮷、𪚥、龘；兼容汉字：豈更車賈滑",
    "的的的的的的的的的的的的的的的的的的的的的的的的的",
    "哈哈哈哈 哈哈 哈 aaaaaaa bbbb ababababab",
    "literal <s> and </s> and <unk> and [PAD] and <0x41> stay text",
    "中文 English 混合 text，mixed标点,punctuation。",
    "combining: e\u0301 n\u0303 \u4e2d\u0301",
    "▁ literal mark ▁▁",
    "“quoted” ‘text’—with dashes—and… dots · “再引”——“再引”。”",
)


def probe_texts(file: Path | None = None) -> Iterator[str]:
    """The built-in probe texts, the shipped probe.txt, and the documents of `file`."""
    yield from PROBES
    yield from (shipped("vocab") / "probe.txt").read_text(encoding="utf-8").splitlines()
    if file is not None:
        yield from track(texts_of(file), f"checking on {file.name}", unit="documents")


def dead_pieces(reader: Reader, first: int = 0) -> list[str]:
    """The ordinary pieces with an id of at least `first` that the encoder never makes of their own text.

    A piece whose text the encoder splits is split in every context: joins depend on the characters
    inside a piece only.
    """
    ids = [index for index in reader.normal if index >= first]
    encoded = reader.plain(reader.texts(ids))
    return [reader.pieces[index] for index, got in zip(ids, encoded, strict=True) if got != [index]]


@dataclass
class Found:
    """What was seen on texts: sums, and problems with their first examples."""

    lengths: Lengths = field(default_factory=Lengths)
    without_chinese: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, problem: str, text: str, at: int = 0) -> None:
        """Count a problem with `text`, and keep what stands around its byte `at`."""
        self.counts[problem] = self.counts.get(problem, 0) + 1
        if len(self.examples.setdefault(problem, [])) < EXAMPLES:
            around = text.encode()[max(0, at - SHOWN // 2) :][: 2 * SHOWN].decode(errors="ignore")
            self.examples[problem].append(around[:SHOWN])


def compare(
    texts: Iterable[str], new: Reader, other: Reader | None, base: Reader | None, decoding: bool = False
) -> Found:
    """Encode `texts` with the new tokenizer in each of its readers, and with the base, in batches on all
    cores; look for everything that the contract forbids, decoding too if asked for."""
    found = Found(counts=dict.fromkeys(_looked_for(other, base, decoding), 0))
    readers = [reader for reader in (new, other, base) if reader is not None]

    def encode(batch: list[str]) -> list[list[list[int]]]:
        return [reader.encode(batch) for reader in readers]

    with ThreadPoolExecutor(1) as ahead:  # the next batch is encoded while this one is looked at
        waiting: tuple[list[str], Future[list[list[list[int]]]]] | None = None
        for batch in chain(_batches(texts), [None]):
            encoding = ahead.submit(encode, batch) if batch else None
            if waiting is not None:
                _look(found, waiting[0], waiting[1].result(), new, other, base, decoding)
            waiting = (batch, encoding) if batch and encoding else None
    return found


def _looked_for(other: Reader | None, base: Reader | None, decoding: bool) -> list[str]:
    wanted = {
        "disagreements": other is not None,
        "changed": base is not None,
        "longer": base is not None,
        "lost": decoding and base is not None,
    }
    return [problem for problem, looked in wanted.items() if looked]


def _look(
    found: Found,
    batch: list[str],
    encoded: list[list[list[int]]],
    new: Reader,
    other: Reader | None,
    base: Reader | None,
    decoding: bool,
) -> None:
    ids = encoded[0]
    sums = {"": (ids, new.lengths, new.prefix)}
    if other is not None and ids != encoded[1]:
        for text, one, two in zip(batch, ids, encoded[1], strict=True):
            if one != two:
                found.note("disagreements", text, _parting(one, two, new))
    if base is not None:
        sums["base"] = (encoded[-1], base.lengths, base.prefix)
        for text, one, two in zip(batch, ids, encoded[-1], strict=True):
            plain = not CHINESE.search(text)
            found.without_chinese += plain
            if plain and one != two:
                found.note("changed", text, _parting(one, two, new))
            if len(one) > len(two):
                found.note("longer", text, _parting(one, two, new))
        if decoding:
            spelt = [new.decode(ids), base.decode(encoded[-1]), (other or new).decode(ids)]
            for text, one, two, three in zip(batch, *spelt, strict=True):
                if two == text and not one == two == three:
                    found.note("lost", text)
    found.lengths.add(batch, sums)


def _parting(one: list[int], two: list[int], reader: Reader) -> int:
    """The byte of the text at which two encodings part; `one` is `reader`'s."""
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    return max(0, int(reader.lengths[one[:same]].sum()) - reader.prefix)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == BATCH or size + len(text) > LARGEST):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def check_contract(
    base: Reader, new: Reader, other: Reader | None, texts: Iterable[str] | None = None
) -> dict[str, Any]:
    """What breaks the contract of an extended tokenizer, each in a sentence under "broken".

    Old ids keep their pieces; no new piece is dead; SentencePiece and tokenizer.json give the same
    ids; text without Chinese is tokenised as by the base; no text gets longer; decoding gives back what
    the base's decoding gives back. Beside it counts, examples, and lengths.
    """
    size = len(base.pieces)
    broken = [
        f"id {i} was {old!r} and is {piece!r}."
        for i, (old, piece) in enumerate(zip(base.pieces, new.pieces, strict=False))
        if old != piece
    ]
    dead = dead_pieces(new, size)
    broken += [f"the piece {piece!r} cannot be produced." for piece in dead]
    found = compare(probe_texts() if texts is None else texts, new, other, base, decoding=True)
    for problem, examples in found.examples.items():
        broken += [f"{PROBLEMS[problem]} {text!r}." for text in examples]
    return {
        "dead": dead,
        **figures_of(found),
        "examples": found.examples,
        "broken": broken,
    }


def figures_of(found: Found) -> dict[str, Any]:
    """Lengths and counts of problems, as a report has them."""
    told = {**figures(found.lengths), **found.counts}
    return {**told, "without_chinese": found.without_chinese} if "changed" in found.counts else told


def audit_vocab(path: Path, corpus: list[Path], base_path: Path | None = None) -> dict[str, Any]:
    """What `audit-vocab` reports of the tokenizer at `path` on the texts of `corpus`.

    Per file: characters, bytes, tokens, what a token holds, by script too, beside the base's; texts
    without Chinese that changed, texts on which the readers disagree. Over all: sizes, dead pieces,
    pieces that the corpus never uses, first examples.
    """
    new, other = open_readers(path)
    base = open_readers(base_path)[0] if base_path else None
    size = len(base.pieces) if base else 0
    used: Any = numpy.zeros(len(new.pieces), dtype=int)
    files: dict[str, Any] = {}
    examples: dict[str, list[str]] = {}
    for file in corpus:
        found = compare(track(texts_of(file), file.name, unit="documents"), new, other, base)
        used += found.lengths.tokens[""].used
        files[str(file)] = figures_of(found)
        for problem, texts in found.examples.items():
            examples[problem] = [*examples.get(problem, []), *texts][:EXAMPLES]
    return {
        "tokenizer": str(path),
        "base": str(base_path) if base_path else None,
        "vocab_size": len(new.pieces),
        "base_vocab_size": size or None,
        "dead": dead_pieces(new, size),
        "unused": [new.pieces[index] for index in new.normal if index >= size and not used[index]],
        "files": files,
        "examples": examples,
    }
