"""Rebuild the shipped Chinese pieces from the data that they were learnt on, to the byte.

    python vocab/build.py --data ../shared/data             # compares with the files here
    python vocab/build.py --data ../shared/data --write     # replaces them

`--data` is a folder with tokenizers/llama/tokenizer.model, tokenizers/chinese_sp.model,
zh_pretrain.jsonl.gz, alpaca_zh.jsonl.gz and preference_zh.jsonl.gz. One to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import report
from chinese_llama.vocab.bases import Base, open_base
from chinese_llama.vocab.corpus import read_corpus
from chinese_llama.vocab.proto import CONTROL, NORMAL, UNIGRAM, UNKNOWN, read_chinese
from chinese_llama.vocab.scripts import is_chinese
from chinese_llama.vocab.select import Selection, as_text, candidates, select, uses_of

HERE = Path(__file__).parent
CORPUS = ("zh_pretrain.jsonl.gz", "alpaca_zh.jsonl.gz", "preference_zh.jsonl.gz")
SIZES = {"chinese_20k": 49_920, "chinese_8k": 39_936}  # of LLaMA's tokenizer with them; multiples of 128


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="replace the files beside this script")
    options = parser.parse_args(argv)
    files = build(options.data)
    for name, content in files.items():
        if options.write:
            (HERE / name).write_bytes(content)
    differ = [name for name, content in files.items() if (HERE / name).read_bytes() != content]
    print(f"differ: {', '.join(differ)}" if differ else f"{', '.join(files)}: equal to the byte")
    sys.exit(1 if differ else 0)


def build(data: Path) -> dict[str, bytes]:
    """Name -> content of the files that are shipped."""
    base = open_base(data / "tokenizers" / "llama")
    chinese = read_chinese(data / "tokenizers" / "chinese_sp.model")
    counts = read_corpus([data / name for name in CORPUS], held_out=0).counts
    files = {}
    for name, size in SIZES.items():
        pieces, uses = choose(base, chinese, counts, size - base.size)
        files[f"{name}.model"] = model_of(pieces, uses).SerializeToString()
        lines = [f"{piece}\t{uses[piece]:.0f}" for piece in pieces]
        files[f"{name}.txt"] = ("\n".join(lines) + "\n").encode()
    return files


def choose(
    base: Base, chinese: model_pb2.ModelProto, counts: Counter[str], most: int
) -> tuple[list[str], dict[str, float]]:
    """Pieces of which `base` takes `most` new ones when they are ranked by use, and how often each is
    used. The base's own Chinese characters are among them: another base may lack those."""
    text = as_text(candidates(chinese, Selection([])))
    text.update(counts)
    room = most
    while True:
        learnt = select(base, chinese, counts, room).pieces
        closed = select(base, model_of(*_by_use(base, learnt, text))).pieces  # with what ranking needs
        if len(closed) <= most:
            return _by_use(base, closed, text)
        room -= len(closed) - most


def _by_use(base: Base, pieces: list[str], text: Counter[str]) -> tuple[list[str], dict[str, float]]:
    counts = uses_of(base, pieces, text).tolist()
    uses = {base.text(index): count for index, count in enumerate(counts[: base.size])}
    uses = {piece: count for piece, count in uses.items() if is_chinese(piece) and count}
    uses |= dict(zip(pieces, counts[base.size :], strict=True))
    return sorted(uses, key=lambda piece: (-uses[piece], piece)), uses


def model_of(pieces: list[str], uses: dict[str, float]) -> model_pb2.ModelProto:
    """A SentencePiece unigram model of `pieces`, scored by the logarithm of their share of all uses."""
    model = model_pb2.ModelProto()
    for name, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        model.pieces.add(piece=name, score=0.0, type=kind)
    total = sum(uses[piece] for piece in pieces)
    for piece in pieces:
        score = round(math.log(max(uses[piece], 0.5) / total), 4)
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    spec.model_type = UNIGRAM
    spec.vocab_size = len(model.pieces)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    return model


if __name__ == "__main__":
    sys.exit(report(main, sys.argv[1:]))
