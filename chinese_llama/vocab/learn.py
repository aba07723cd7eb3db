"""Which pieces are worth a row: continued BPE on counted clauses, and what the encoder makes of them.

The base's own pieces come first, so learning goes on from what the base makes of a clause (Purason et
al. 2025, arXiv 2512.03989). Pieces that earn least are then taken away again, leaves only: a piece
that another one is joined from stays as long as that one does.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

LONGEST_PIECE = 16  # characters: nothing is joined to this length; a piece of the base counts as one
BATCH = 200_000  # characters handed to the trainer at once
PRIVATE = 0xF0000  # characters that stand for pieces of the base while others are learnt


def continued_bpe(words: Mapping[str, int], most: int, spell: Mapping[str, Sequence[str]]) -> list[str]:
    """At most `most` joins, in the order in which byte-pair encoding learns them from `words`
    (clause -> count).

    `spell` gives the base's pieces of those clauses that do not fall into single characters.
    """
    symbols: dict[str, str] = {}  # piece of the base -> the one character that stands for it

    def written(word: str) -> str:
        parts = spell.get(word)
        if parts is None:
            return word
        return "".join(
            p if len(p) == 1 else symbols.setdefault(p, chr(PRIVATE + len(symbols))) for p in parts
        )

    counts = {written(word): count for word, count in words.items() if count}
    alphabet = len({character for word in counts for character in word})
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=alphabet + most, min_frequency=2, show_progress=False, max_token_length=LONGEST_PIECE
    )
    learner.train_from_iterator(_repeated(counts), trainer)
    joins = json.loads(learner.to_str())["model"]["merges"]
    pieces = {symbol: piece for piece, symbol in symbols.items()}
    return list(dict.fromkeys("".join(pieces.get(c, c) for part in join for c in part) for join in joins))


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Every word as often as it is counted, in batches: the trainer takes no counts."""
    batch: list[str] = []
    size = 0
    for word, count in words.items():
        most = max(1, BATCH // (len(word) + 1))
        for start in range(0, count, most):
            times = min(most, count - start)
            batch.append((word + " ") * times)
            size += times * (len(word) + 1)
            if size >= BATCH:
                yield "".join(batch)
                batch, size = [], 0
    yield "".join(batch)


def last_join(symbols: Sequence[str], rank: Mapping[str, int]) -> tuple[str, str] | None:
    """The two parts that become the whole when the adjacent pair whose joined piece has the lowest rank
    is joined, leftmost on ties, until one is left; None where the joins get stuck before that."""
    parts = list(symbols)
    joined = None
    while len(parts) > 1:
        ranks = [rank.get(parts[i] + parts[i + 1], len(rank)) for i in range(len(parts) - 1)]
        best = min(ranks)
        if best == len(rank):
            return None
        at = ranks.index(best)
        joined = (parts[at], parts[at + 1])
        parts[at : at + 2] = ["".join(joined)]
    return joined


def prune(
    pieces: Sequence[str],
    uses: Mapping[str, float],
    parts: Mapping[str, Sequence[str]],
    price: Mapping[str, int],
    floor: float = math.inf,
) -> list[str]:
    """The pieces whose loss costs less than `floor` tokens, in the order in which they go: so what is
    left at any moment holds the parts of all its pieces.

    The loss of a leaf costs `uses` x `price` tokens (`price`: the tokens that stand for it instead, less
    one; 1 where it is not given), and its uses go to its `parts`. What costs least goes first.
    """
    left = {piece: uses.get(piece, 0.0) for piece in pieces}
    position = {piece: index for index, piece in enumerate(pieces)}
    needed = Counter(part for piece in pieces for part in parts.get(piece, ()) if part in left)

    def entry(piece: str) -> tuple[float, int, str]:
        return left[piece] * price.get(piece, 1), -position[piece], piece

    leaves = [entry(piece) for piece in pieces if not needed[piece]]
    heapq.heapify(leaves)
    gone: list[str] = []
    while leaves and leaves[0][0] < floor:
        piece = heapq.heappop(leaves)[2]
        gone.append(piece)
        for part in parts.get(piece, ()):
            if part not in left:
                continue
            left[part] += left[piece]
            needed[part] -= 1
            if not needed[part]:
                heapq.heappush(leaves, entry(part))
    return gone
