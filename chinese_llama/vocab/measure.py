"""How long texts become: characters, bytes and tokens, in all and by script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy

from chinese_llama.vocab.scripts import LETTERS, MARKS

SCRIPTS = ("Han and kana", "Chinese marks", "Latin letters", "digits", "spaces", "other ASCII", "other")
HAN, MARK, LATIN, DIGIT, SPACES, ASCII, OTHER = range(len(SCRIPTS))
_ASCII = ((0x20, 0x20, SPACES), (0x30, 0x39, DIGIT), (0x41, 0x5A, LATIN), (0x61, 0x7A, LATIN))
_BLOCKS = sorted(
    [
        (0, 0x7F, ASCII),
        *((low, high, HAN) for low, high in LETTERS),
        *((low, high, MARK) for low, high in MARKS),
    ]
)
_STARTS = numpy.array([bound for low, high, _ in _BLOCKS for bound in (low, high + 1)])
_KINDS = numpy.array([kind for _, _, script in _BLOCKS for kind in (script, OTHER)])


Row = tuple[Any, Any]  # how many ids each text has, and all ids in one row
Encoded = tuple[list[list[int]], numpy.ndarray, int]  # ids, bytes of each id, bytes put before a text


@dataclass
class Tokens:
    """What one tokenizer makes of the texts. `used`: how often each id is; `by_script`: a token counts for
    the script of its first character, a space before others left aside; `non_ascii`: tokens that hold
    any byte of a non-ASCII character."""

    total: int = 0
    used: Any = 0
    by_script: Any = field(default_factory=lambda: numpy.zeros(len(SCRIPTS), dtype=int))
    non_ascii: int = 0


@dataclass
class Lengths:
    """Sums over texts; `tokens` maps the name of a tokenizer ("", "base") to its figures.

    `by_script` and `non_ascii`, here and there, are of the texts that all tokenizers spell byte for byte.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    by_script: Any = field(default_factory=lambda: numpy.zeros(len(SCRIPTS), dtype=int))
    non_ascii: int = 0
    tokens: dict[str, Tokens] = field(default_factory=dict)

    def add(self, texts: Sequence[str], encoded: Mapping[str, Encoded]) -> None:
        """Count `texts`; `encoded` gives, for each tokenizer, their ids, the bytes that each id stands
        for, and the bytes that it puts before a text (1 for LLaMA's dummy prefix)."""
        sizes = numpy.array([len(text.encode()) for text in texts], dtype=int)
        whole: Any = numpy.ones(len(texts), dtype=bool)
        rows = {name: _row(ids) for name, (ids, _, _) in encoded.items()}
        for name, (_, lengths, prefix) in encoded.items():
            counts, flat = rows[name]
            tokens = self.tokens.setdefault(name, Tokens())
            tokens.total += len(flat)
            tokens.used = tokens.used + numpy.bincount(flat, minlength=len(lengths))
            text: Any = numpy.repeat(numpy.arange(len(texts)), counts)
            whole &= numpy.bincount(text, weights=lengths[flat], minlength=len(texts)) == sizes + prefix
        self.documents += len(texts)
        self.characters += sum(map(len, texts))
        self.bytes += int(sizes.sum())
        if not whole.all():
            kept = numpy.flatnonzero(whole).tolist()
            texts, sizes = [texts[index] for index in kept], sizes[kept]
            rows = {name: _row([ids[index] for index in kept]) for name, (ids, _, _) in encoded.items()}
        self._by_script(texts, sizes, encoded, rows)

    def _by_script(
        self, texts: Sequence[str], sizes: Any, encoded: Mapping[str, Encoded], rows: Mapping[str, Row]
    ) -> None:
        code = numpy.frombuffer("".join(texts).encode("utf-32-le"), dtype=numpy.uint32)
        script = script_of(code)
        self.by_script = self.by_script + numpy.bincount(script, minlength=len(SCRIPTS))
        self.non_ascii += int((code > 0x7F).sum())
        width = 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)
        of_byte: Any = numpy.repeat(script, width)
        before = numpy.concatenate([[0], numpy.cumsum(numpy.repeat(code > 0x7F, width))])  # non-ASCII bytes
        first = numpy.cumsum(sizes) - sizes  # byte of each text, in the joined bytes
        for name, (_, lengths, prefix) in encoded.items():
            counts, flat = rows[name]
            text: Any = numpy.repeat(numpy.arange(len(texts)), counts)
            end = numpy.cumsum(lengths[flat]) - prefix * (text + 1)
            start = numpy.maximum(end - lengths[flat], first[text])
            start, end = start[start < end], end[start < end]
            spaced = (of_byte[start] == SPACES) & (end - start > 1)
            tokens = self.tokens[name]
            counted = numpy.bincount(of_byte[start + spaced], minlength=len(SCRIPTS))
            tokens.by_script = tokens.by_script + counted
            tokens.non_ascii += int((before[end] > before[start]).sum())


def _row(ids: list[list[int]]) -> Row:
    """The number of ids of each text, and all of them in one row."""
    counts = numpy.array([len(one) for one in ids], dtype=int)
    return counts, numpy.fromiter(chain.from_iterable(ids), dtype=numpy.int64, count=int(counts.sum()))


def script_of(code: numpy.ndarray) -> numpy.ndarray:
    """Code points -> index into SCRIPTS, of the same shape."""
    at = numpy.searchsorted(_STARTS, code, side="right") - 1
    script = _KINDS[at]
    for low, high, kind in _ASCII:
        script[(code >= low) & (code <= high)] = kind
    return script


def figures(lengths: Lengths) -> dict[str, Any]:
    """The sums as a report has them: counts, and characters and bytes per token for each tokenizer."""
    told: dict[str, Any] = {
        "documents": lengths.documents,
        "characters": lengths.characters,
        "bytes": lengths.bytes,
    }
    for name, tokens in lengths.tokens.items():
        prefix = f"{name}_" if name else ""
        told[f"{prefix}tokens"] = tokens.total
        told[f"{prefix}characters_per_token"] = _ratio(lengths.characters, tokens.total)
        told[f"{prefix}bytes_per_token"] = _ratio(lengths.bytes, tokens.total)
        told[f"{prefix}non_ascii_per_token"] = _ratio(lengths.non_ascii, tokens.non_ascii)
    told["scripts"] = {}
    for index, script in enumerate(SCRIPTS):
        if lengths.by_script[index]:
            counts = {
                f"{n}_tokens" if n else "tokens": int(t.by_script[index]) for n, t in lengths.tokens.items()
            }
            told["scripts"][script] = {"characters": int(lengths.by_script[index]), **counts}
    return told


def _ratio(many: int, few: int) -> float:
    return many / few if few else 0.0
