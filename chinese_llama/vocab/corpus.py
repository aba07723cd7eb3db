"""Count the clauses of a corpus: what the choice of pieces is made on, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from chinese_llama.data.formats import texts
from chinese_llama.errors import UserError
from chinese_llama.progress import say, track
from chinese_llama.vocab.scripts import CHINESE, CLAUSE

MOST = 2_000_000  # distinct clauses held: this bounds the memory
FEW = 100_000  # characters; fewer say little beside the Chinese model
LONGEST = 200  # characters of a clause; a longer one is cut
HELD_OUT = 50  # one document in so many is kept apart, to measure on
MEASURED = 500_000  # characters of the documents kept apart


def clauses(text: str) -> Iterator[str]:
    """The Chinese of `text` in order, in the runs within which pieces are learnt: letters, which one
    mark may lead (as in ，但是; the pre-tokenizers of GPT-4, Llama-3 and Qwen do the same), or marks."""
    for clause in CLAUSE.findall(text):
        for start in range(0, len(clause), LONGEST):
            part = clause[start : start + LONGEST]
            if CHINESE.search(part):
                yield part


@dataclass
class Corpus:
    """`counts`: clause -> how often; one clause in `every` was counted. `held_out`: documents that were
    not counted."""

    counts: Counter[str] = field(default_factory=Counter)
    held_out: list[str] = field(default_factory=list)
    documents: int = 0
    every: int = 1


def read_corpus(files: list[Path], most: int = MOST, held_out: int = HELD_OUT) -> Corpus:
    """Stream `files` and count their clauses; one document in `held_out` is kept apart (0: none).

    Once more than `most` different clauses are held, all counts are halved (an odd one is rounded by a
    checksum of the clause, so that a clause seen once stays or goes evenly), and from then on half as
    many documents are read. The same files give the same counts. Raises UserError where nothing is
    Chinese.
    """
    corpus, measured = Corpus(), 0
    for file in files:
        for text in track(texts(file), f"reading {file.name}", unit="documents"):
            corpus.documents += 1
            if held_out and corpus.documents % held_out == 0:
                if measured < MEASURED:
                    corpus.held_out.append(text[: MEASURED - measured])
                    measured += len(text)
            # a checksum, lest every second document be of the same kind
            elif crc32(str(corpus.documents).encode()) % corpus.every == 0:
                corpus.counts.update(clauses(text))
            while len(corpus.counts) > most:
                corpus.every *= 2
                corpus.counts = _halved(corpus.counts, corpus.every.bit_length())
    if not corpus.counts:
        names = ", ".join(map(str, files))
        raise UserError(f"--corpus {names}: holds no Chinese characters; give text that does.")
    characters = sum(len(clause) * count for clause, count in corpus.counts.items())
    if characters < FEW:
        say(f"the corpus holds only {characters:,} Chinese characters: it will change little.")
    if corpus.every > 1:
        say(f"the corpus is large: pieces are chosen on one document in {corpus.every}.")
    return corpus


def _halved(counts: Counter[str], bit: int) -> Counter[str]:
    """Half of each count, odd ones rounded up or down by a bit of the clause's checksum: another one
    each time, or those that stayed once would stay always."""
    halves = ((c, (n + (crc32(c.encode()) >> bit & 1)) // 2) for c, n in counts.items())
    return Counter({clause: count for clause, count in halves if count})
