"""A tokenizer, wherever it lies: whether its files can be read, say the same, and name what training needs.

What it makes of texts is looked at in readings.py, its special tokens in special.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from chinese_llama.doctor.finding import Finding, some
from chinese_llama.doctor.opened import (
    SETTINGS,
    Opened,
    guarded,
    open_tokenizer,
    sp_model,
    twice,
    vocabulary_of,
)
from chinese_llama.doctor.raw import json_object
from chinese_llama.doctor.readings import check_readings, check_vocabulary
from chinese_llama.doctor.special import check_special
from chinese_llama.doctor.template import check_template
from chinese_llama.doctor.things import Thing
from chinese_llama.vocab.proto import USER_DEFINED
from chinese_llama.vocab.readers import sp_reader
from chinese_llama.vocab.scripts import is_chinese

SLOW = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
FEWEST = 64  # pieces: a tokenizer with fewer was not read from its vocabulary
MANY = 3  # added tokens that are Chinese words


def check_tokenizer(thing: Thing) -> Iterator[Finding]:
    """What is wrong with the tokenizer in a thing; nothing where it holds none. Facts (pieces, characters per
    token) are put into those of the thing."""
    if thing.path.is_file() and thing.path.name not in ("tokenizer.json", "tokenizer.model"):
        yield from _bare(thing, thing.path)
        return
    place = thing.path.parent if thing.path.is_file() else thing.path
    names = ("tokenizer.model", "tokenizer.json", *SLOW)
    if not any((place / name).is_file() for name in (*names, *SETTINGS[:1])):
        bare = sorted(place.glob("*.model"))
        for file in bare:
            yield from _bare(thing, file)
        if not bare and thing.kind == "model":
            what = "There is no tokenizer beside the weights: by themselves nothing can be asked of them."
            remedy = (
                "Put the tokenizer there that the model was trained with (tokenizer.model, tokenizer.json)."
            )
            yield Finding("note", "no-tokenizer", str(place), what, [], remedy)
        return
    own_code = "auto_map" in json_object(place / SETTINGS[0], [])
    if not own_code and not any((place / name).is_file() for name in names):
        yield _no_vocabulary(place)
        return
    found: list[Finding] = []
    opened = open_tokenizer(place, found)
    yield from found
    if opened.reader is None:
        return
    last = max((index for index, _ in opened.tokens().values()), default=-1)
    thing.facts["pieces"] = max(len(opened.reader.pieces), last + 1)
    small = list(_small(opened))
    yield from small
    if small:
        return
    yield from _check_files(opened)
    yield from check_special(opened)
    yield from check_readings(opened, thing)
    yield from check_template(opened, thing)


def _no_vocabulary(place: Path) -> Finding:
    return Finding(
        "error", "no-vocabulary", str(place),
        "There is a tokenizer's configuration, but no file with its pieces.",
        [f"looked for tokenizer.json, tokenizer.model, {', '.join(SLOW)}"],
        "Put tokenizer.model and tokenizer.json of the same tokenizer there.",
    )  # fmt: skip


def _bare(thing: Thing, file: Path) -> Iterator[Finding]:
    """A SentencePiece model by itself, for `extend-vocab --chinese-sp`."""
    found: list[Finding] = []
    model = sp_model(file, found)
    yield from found
    if model is None:
        return
    thing.facts["pieces"] = len(model.pieces)
    duplicates = list(twice(file, model))
    yield from duplicates
    reader = None if duplicates else guarded(lambda: sp_reader(model), file, found)
    yield from found[len(found) - 1 :] if reader is None and not duplicates else ()
    if reader is not None:
        yield from check_vocabulary(file, model, reader)


def _check_files(opened: Opened) -> Iterator[Finding]:
    vocabulary = vocabulary_of(opened.content)
    if vocabulary:
        yield from _ids(opened, vocabulary)
    if vocabulary and opened.model is not None:
        yield from _same_pieces(opened, vocabulary)
    yield from _added(opened, vocabulary)


def _small(opened: Opened) -> Iterator[Finding]:
    assert opened.reader is not None
    sizes = {"tokenizer.model": len(opened.model.pieces)} if opened.model else {}
    if opened.content:
        sizes["tokenizer.json"] = len(vocabulary_of(opened.content))
    sizes["transformers"] = len(opened.auto) if opened.auto is not None else len(opened.reader.pieces)
    small = {name: size for name, size in sizes.items() if size < FEWEST}
    if small:
        yield Finding(
            "error", "no-pieces", str(opened.place),
            f"The tokenizer has {min(small.values())} pieces: its vocabulary was never read.",
            [f"{name}: {size:,} pieces" for name, size in sizes.items()],
            "LlamaTokenizer(vocab_file=...) of transformers 5 gives such a tokenizer without a word, and saves it: "
            "put the original tokenizer.model there, delete tokenizer.json, and load the directory.",
        )  # fmt: skip


def _ids(opened: Opened, vocabulary: dict[str, int]) -> Iterator[Finding]:
    """Ids that stand for two pieces, or for none."""
    file = str(opened.place / "tokenizer.json")
    every = vocabulary | {token: index for token, (index, _) in opened.tokens().items()}
    by_id: dict[int, list[str]] = {}
    for piece, index in every.items():
        by_id.setdefault(index, []).append(piece)
    shared = {index: pieces for index, pieces in sorted(by_id.items()) if len(pieces) > 1}
    if shared:
        yield Finding(
            "error", "duplicate-ids", file,
            f"{len(shared):,} ids stand for more than one piece.",
            some([f"id {index}: {', '.join(map(repr, pieces))}" for index, pieces in shared.items()]),
            "Use the tokenizer's files as they were made, all from one source.",
        )  # fmt: skip
    holes = [index for index in range(max(by_id) + 1) if index not in by_id]
    if holes:
        yield Finding(
            "warning", "holes-in-ids", file,
            f"{len(holes):,} ids have no piece, so len(tokenizer) is {len(by_id):,} and the last id {max(by_id):,}: "
            "a model grown to that length has too few rows.",
            [f"the first: {', '.join(map(str, holes[:8]))}"],
            "Give every id a piece (reserved tokens), or grow models to the last id + 1.",
        )  # fmt: skip


def _same_pieces(opened: Opened, vocabulary: dict[str, int]) -> Iterator[Finding]:
    """tokenizer.model and tokenizer.json of two tokenizers."""
    assert opened.model is not None
    tokens = opened.tokens()
    every = vocabulary | {token: index for token, (index, _) in tokens.items()}
    by_id = {index: piece for piece, index in every.items()}
    pieces = [piece.piece for piece in opened.model.pieces]
    wrong = [i for i, piece in enumerate(pieces) if by_id.get(i) != piece]
    more = sorted(i for i, piece in by_id.items() if i >= len(pieces) and piece not in tokens)
    if not wrong and not more:
        return
    lines = [f"id {i}: {pieces[i]!r} in tokenizer.model, {by_id.get(i)!r} in tokenizer.json" for i in wrong]
    lines += [f"id {i}: {by_id[i]!r} in tokenizer.json only" for i in more]
    yield Finding(
        "error", "two-tokenizers", str(opened.place),
        f"tokenizer.model ({len(pieces):,} pieces) and tokenizer.json ({len(by_id):,}) are two tokenizers: "
        f"{len(lines):,} ids differ, and programs differ in which file they read.",
        some(lines),
        "Keep the one that the model was made with, and delete or make again the other: extend-vocab writes both.",
    )  # fmt: skip


def _added(opened: Opened, vocabulary: dict[str, int]) -> Iterator[Finding]:
    """Chinese words as added tokens, and added tokens that only some programs see."""
    tokens = opened.tokens()
    own = opened.model.pieces if opened.model is not None else ()
    cut = [piece.piece for piece in own if piece.type == USER_DEFINED]  # SentencePiece's kind of them
    words = [token for token in dict.fromkeys([*tokens, *cut]) if is_chinese(token)]
    if words:
        special = sum(tokens[word][1] for word in words if word in tokens)
        yield Finding(
            "warning" if len(words) >= MANY or special else "note", "chinese-as-added-tokens", str(opened.place),
            f"{len(words):,} Chinese words are added tokens, not pieces: they are cut out of every text by longest "
            "match before anything else, which is slow, splits what stands around them, and loses or adds spaces"
            + (f"; {special:,} are special, and vanish when an answer is decoded." if special else "."),
            [f"such as {', '.join(map(repr, words[:8]))}", *_cut_out(opened, words)],
            "Make the tokenizer again with pieces instead: chinese-llama extend-vocab --base BASE --corpus TEXTS.",
        )  # fmt: skip
    if opened.model is not None and not vocabulary:
        pieces = {piece.piece for piece in opened.model.pieces}
        outside = [token for token in tokens if token not in pieces]
        if outside:
            yield Finding(
                "warning", "added-tokens-outside-model", str(opened.place),
                f"Tokens of the Hugging Face files ({len(outside):,}) are not in tokenizer.model, and there is no "
                "tokenizer.json with both: SentencePiece does not know them, and chinese-llama merge refuses them.",
                some([f"{token!r}: id {tokens[token][0]}" for token in outside]),
                "Save tokenizer.json beside it, with the tokens: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
            )  # fmt: skip


def _cut_out(opened: Opened, words: list[str]) -> list[str]:
    """What an added word does to a text."""
    if opened.auto is None:
        return []
    with contextlib.suppress(Exception):
        text = f"看{max(words, key=len)} 吗"
        ids = opened.auto(text, add_special_tokens=False)["input_ids"]
        pieces = json.dumps(opened.auto.convert_ids_to_tokens(ids), ensure_ascii=False)
        return [f"{text!r} becomes {pieces}, and comes back as {opened.auto.decode(ids)!r}"]
    return []
