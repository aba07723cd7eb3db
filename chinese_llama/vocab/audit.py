"""Check a tokenizer: against its base, against itself in other readers, and on a corpus.

Nothing here imports torch or transformers: SentencePiece reads tokenizer.model, the tokenizers
library reads tokenizer.json, which is what `AutoTokenizer` uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.data.formats import documents
from chinese_llama.errors import BadFile
from chinese_llama.progress import track
from chinese_llama.vocab.proto import NORMAL, SPACE, encoder, read_model, tokenizer_model
from chinese_llama.vocab.scripts import CHINESE

BATCH = 256  # documents
EXAMPLES = 5

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
)


def fast_reader(directory: Path) -> tokenizers.Tokenizer:
    """tokenizer.json of `directory`, reading literal control tokens as text."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise BadFile(directory, "has no tokenizer.json.")
    try:
        reader = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadFile(file, f"is not a tokenizer ({error}).") from error
    reader.encode_special_tokens = True
    return reader


def fast_ids(reader: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text without a beginning-of-text token."""
    return [encoding.ids for encoding in reader.encode_batch_fast(texts, add_special_tokens=False)]


def dead_pieces(model: model_pb2.ModelProto, first: int = 0) -> list[str]:
    """The normal pieces with an id of at least `first` that the encoder never makes of their own text.

    A piece whose text the encoder splits is split in every context: joins depend on the characters
    inside a piece only.
    """
    processor = encoder(model, dummy_prefix=False)
    pieces = [p.piece for p in model.pieces[first:] if p.type == NORMAL]
    encoded = processor.encode([piece.replace(SPACE, " ") for piece in pieces], out_type=str)
    return [piece for piece, got in zip(pieces, encoded, strict=True) if got != [piece]]


def check_contract(
    base: model_pb2.ModelProto,
    model: model_pb2.ModelProto,
    directory: Path,
    texts: Iterable[str] = PROBES,
) -> dict[str, Any]:
    """What breaks the contract of an extended tokenizer, each in a sentence under "broken".

    Old ids keep their pieces; no new piece is dead; SentencePiece and tokenizer.json give the same
    ids; text without Chinese is tokenised as by the base; no text gets longer.
    """
    size = len(base.pieces)
    broken = [
        f"id {i} was {old.piece!r} and is {new.piece!r}."
        for i, (old, new) in enumerate(zip(base.pieces, model.pieces[:size], strict=True))
        if old.piece != new.piece
    ]
    dead = dead_pieces(model, size)
    broken += [f"the piece {piece!r} cannot be produced." for piece in dead]
    counts = dict.fromkeys(("disagreements", "changed", "longer"), 0)
    for problem, text in _differences(base, model, directory, texts):
        counts[problem] += 1
        broken.append(f"{_PROBLEMS[problem]}: {text[:200]!r}.")
    return {"dead": dead, **counts, "broken": broken}


_PROBLEMS = {
    "disagreements": "SentencePiece and tokenizer.json give different ids for",
    "changed": "text without Chinese is tokenised differently than by the base",
    "longer": "more tokens than under the base for",
}


def _differences(
    base: model_pb2.ModelProto, model: model_pb2.ModelProto, directory: Path, texts: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """(problem, text) for each text that breaks the contract."""
    old, new, reader = encoder(base), encoder(model), fast_reader(directory)
    for batch in _batches(texts):
        before, after, fast = old.encode(batch), new.encode(batch), fast_ids(reader, batch)
        for text, a, b, c in zip(batch, before, after, fast, strict=True):
            if b != c:
                yield "disagreements", text
            if a != b and not CHINESE.search(text):
                yield "changed", text
            if len(b) > len(a):
                yield "longer", text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def audit_vocab(directory: Path, corpus: list[Path], base: Path | None = None) -> dict[str, Any]:
    """What `audit-vocab` reports of the tokenizer in `directory` on the documents of `corpus`.

    Per file: documents, characters, bytes, tokens, characters and bytes per token (and the base's),
    documents without Chinese that changed, documents on which the readers disagree. Over all: sizes,
    dead pieces, pieces that the corpus never uses, first examples.
    """
    model = read_model(tokenizer_model(directory))
    base_model = read_model(tokenizer_model(base)) if base else None
    size = len(base_model.pieces) if base_model else 0
    used = [False] * len(model.pieces)
    files: dict[str, Any] = {}
    examples: dict[str, list[str]] = {}
    for path in corpus:
        files[str(path)] = _audit_file(path, directory, model, base_model, used, examples)
    new = [i for i in range(size, len(used)) if model.pieces[i].type == NORMAL]
    return {
        "vocab_size": len(model.pieces),
        "base_vocab_size": size or None,
        "dead": dead_pieces(model, size),
        "unused": [model.pieces[i].piece for i in new if not used[i]],
        "files": files,
        "examples": examples,
    }


def _audit_file(
    path: Path,
    directory: Path,
    model: model_pb2.ModelProto,
    base: model_pb2.ModelProto | None,
    used: list[bool],
    examples: dict[str, list[str]],
) -> dict[str, Any]:
    processor, reader = encoder(model), fast_reader(directory)
    old = encoder(base) if base else None
    counts = dict.fromkeys(("documents", "characters", "bytes", "tokens", "disagreements"), 0)
    if old:
        counts |= dict.fromkeys(("base_tokens", "changed", "longer"), 0)

    def note(problem: str, text: str) -> None:
        counts[problem] += 1
        if len(examples.setdefault(problem, [])) < EXAMPLES:
            examples[problem].append(text[:200])

    for batch in _batches(track(documents(path), path.name, unit="documents")):
        fast = fast_ids(reader, batch)
        before = old.encode(batch) if old else [None] * len(batch)
        for text, ids, other, base_ids in zip(batch, processor.encode(batch), fast, before, strict=True):
            counts["documents"] += 1
            counts["characters"] += len(text)
            counts["bytes"] += len(text.encode())
            counts["tokens"] += len(ids)
            for index in ids:
                used[index] = True
            if ids != other:
                note("disagreements", text)
            if base_ids is not None:
                counts["base_tokens"] += len(base_ids)
                if ids != base_ids and not CHINESE.search(text):
                    note("changed", text)
                if len(ids) > len(base_ids):
                    note("longer", text)
    result: dict[str, Any] = dict(counts)
    for prefix in ["", "base_"] if old else [""]:
        tokens = max(1, counts[f"{prefix}tokens"])
        result[f"{prefix}characters_per_token"] = counts["characters"] / tokens
        result[f"{prefix}bytes_per_token"] = counts["bytes"] / tokens
    return result
