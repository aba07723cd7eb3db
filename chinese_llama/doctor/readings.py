"""What a tokenizer makes of texts: the same in every reader, everything kept, Chinese spelt well, no dead piece."""

from __future__ import annotations

import contextlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.data.templates import text_ids
from chinese_llama.doctor.finding import Finding, some
from chinese_llama.doctor.opened import Opened, open_tokenizer, plain_auto
from chinese_llama.doctor.things import Thing
from chinese_llama.merging.registry import registry
from chinese_llama.vocab.audit import compare, dead_pieces, figures_of, probe_texts
from chinese_llama.vocab.proto import BPE, BYTE, NORMAL, SPACE, UNIGRAM, UNKNOWN, WHITESPACE_RUN_SCORE
from chinese_llama.vocab.readers import BYTE_PIECE, Reader
from chinese_llama.vocab.scripts import CHINESE, is_chinese

SHOWN = 6  # ids of an example
POOR = 0.7  # Chinese characters a token: bytes, mostly
OFTEN = 0.2  # of the Chinese characters unknown: what is left of a text is no text
MAKE_AGAIN = (
    "chinese-llama extend-vocab --base BASE makes one whose pieces all occur, read the same everywhere."
)


def check_readings(opened: Opened, thing: Thing) -> Iterator[Finding]:
    """All checks on the probe texts."""
    texts = list(probe_texts())
    yield from _differ(opened, texts)
    yield from _alone(opened, texts)
    yield from _kept(opened, texts)
    yield from _unknown(opened, texts)
    yield from _dead(opened)
    if opened.model is not None:
        yield from _tied(opened, opened.model)
    yield from _coverage(opened, thing, texts)


def _differ(opened: Opened, texts: list[str]) -> Iterator[Finding]:
    """Readers that give different ids. Those that read alike are told together."""
    read = {name: encode(texts) for name, encode in opened.readings.items()}
    if len(read) < 2:
        return
    (first, ids), *others = read.items()
    groups: list[tuple[list[str], list[list[int]]]] = []
    for name, other in others:
        same = next((group for group in groups if group[1] == other), None)
        if same:
            same[0].append(name)
        elif other != ids:
            groups.append(([name], other))
    for names, other in groups:
        wrong = [i for i in range(len(texts)) if ids[i] != other[i]]
        lines = [_example(opened, texts[i], (first, ids[i]), (names[0], other[i])) for i in wrong]
        yield Finding(
            "warning", "reads-differently", str(opened.place),
            f"{first} gives other ids than {' and '.join(names)} for {len(wrong)} of {len(texts)} probe texts: with one "
            "of them, a model sees tokens that it was not trained on.",
            some(lines),
            "Use everywhere the reader that the model was trained with; for a new model, " + MAKE_AGAIN,
        )  # fmt: skip


def _example(opened: Opened, text: str, one: tuple[str, list[int]], two: tuple[str, list[int]]) -> str:
    """A text, and where two encodings of it part."""
    pairs = zip(one[1], two[1], strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one[1]), len(two[1])))
    told = []
    for name, ids in (one, two):
        part = ids[max(0, at - 1) : at + SHOWN]
        dots = "..., " if at > 1 else ""
        told.append(f"{name} [{dots}{', '.join(map(str, part))}] {_pieces(opened, part)}")
    shown = text if len(text) <= 40 else text[:40] + "…"
    return f"{shown!r}: {'; '.join(told)}"


def _pieces(opened: Opened, ids: list[int]) -> str:
    pieces = opened.reader.pieces if opened.reader else []
    return "|".join(pieces[index] if index < len(pieces) else f"<{index}>" for index in ids)


def _alone(opened: Opened, texts: list[str]) -> Iterator[Finding]:
    """A tokenizer.model by itself, as transformers converts it."""
    if opened.model is None or opened.reader is None or (opened.place / "tokenizer.json").is_file():
        return
    encode = plain_auto(opened.place)
    ids, other = opened.reader.encode(texts), encode(texts) if encode else None
    if other is None:
        lines = ["transformers' own conversion fails"]
    else:
        wrong = [i for i in range(len(texts)) if ids[i] != other[i]]
        pair = ("SentencePiece", "transformers")
        lines = [_example(opened, texts[i], (pair[0], ids[i]), (pair[1], other[i])) for i in wrong[:3]]
        if not wrong:
            return
        lines = [f"other ids for {len(wrong)} of {len(texts)} probe texts", *lines]
    yield Finding(
        "warning" if opened.config else "note", "no-tokenizer-json", str(opened.place),
        "There is no tokenizer.json; this toolkit reads tokenizer.model as SentencePiece does, transformers by "
        "itself does not.",
        lines,
        "Outside this toolkit, use the tokenizer that extend-vocab, extend-model or merge write: it has both files.",
    )  # fmt: skip


def _kept(opened: Opened, texts: list[str]) -> Iterator[Finding]:
    """Texts that do not come back when they are encoded and decoded."""
    assert opened.reader is not None
    unknown = unknown_ids(opened)
    ways: dict[str, tuple[Any, Any]] = {
        next(iter(opened.readings), "the tokenizer"): (opened.reader.encode, opened.reader.decode)
    }
    if opened.auto is not None:
        auto = opened.auto
        ways["transformers"] = (partial(text_ids, auto), lambda rows: [auto.decode(ids) for ids in rows])
    lost: dict[str, str] = {}
    normalised: list[str] = []
    for name, (encode, decode) in ways.items():
        rows = encode(texts)
        for text, ids, back in zip(texts, rows, decode(rows), strict=True):
            if back == text or SPACE in text or unknown & {*ids}:
                continue
            line = f"{name}: {_around(text, back)}"
            if unicodedata.normalize("NFKC", back) == unicodedata.normalize("NFKC", text):
                normalised.append(line)
            else:
                lost.setdefault(text, line)
    if lost:
        clean = opened.config.get("clean_up_tokenization_spaces")
        remedy = (
            ""
            if clean is False
            else "Set clean_up_tokenization_spaces to false in tokenizer_config.json; else "
        )
        yield Finding(
            "warning", "text-is-changed", str(opened.place),
            f"{len(lost)} of {len(texts)} probe texts do not come back when they are encoded and decoded: white space "
            "or marks are lost or added.",
            some([*lost.values()]),
            remedy + MAKE_AGAIN,
        )  # fmt: skip
    if normalised:
        yield Finding(
            "note", "text-is-normalised", str(opened.place),
            "The tokenizer writes some characters in another form (Unicode normalisation, such as full-width to "
            "ASCII): answers will never hold them.",
            some(normalised),
        )  # fmt: skip


def _around(text: str, back: str) -> str:
    """What stands where a text and what comes back part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
    )
    start = max(0, at - 8)
    return f"{text[start : at + 16]!r} comes back as {back[start : at + 16]!r}"


def unknown_ids(opened: Opened) -> set[int]:
    """The ids that stand for what the tokenizer cannot spell."""
    if opened.model is not None:
        return {i for i, piece in enumerate(opened.model.pieces) if piece.type == UNKNOWN}
    name = (opened.content.get("model") or {}).get("unk_token") if opened.content else None
    pieces = opened.reader.pieces if opened.reader else []
    if name in pieces:
        return {pieces.index(name)}
    found = getattr(opened.auto, "unk_token_id", None)
    return set() if found is None else {found}


def _unknown(opened: Opened, texts: list[str]) -> Iterator[Finding]:
    """Chinese characters that the tokenizer cannot spell."""
    assert opened.reader is not None
    lost, every = _lost_characters(opened.reader, unknown_ids(opened), texts)
    if lost:
        share = len(lost) / len(every)
        yield Finding(
            "error" if share > OFTEN else "warning", "unknown-characters", str(opened.place),
            f"The tokenizer has no byte fallback, and cannot spell {len(lost)} of the {len(every)} Chinese characters "
            f"of the probe texts ({share:.1%}): they are lost.",
            [f"such as {' '.join(lost[:20])}"],
            "Use a base with byte fallback (LLaMA's) or a byte-level one (Llama 3's), extended with extend-vocab.",
        )  # fmt: skip


def _lost_characters(reader: Reader, unknown: set[int], texts: list[str]) -> tuple[list[str], list[str]]:
    """The Chinese characters of the texts that become the unknown token or nothing; and all of them."""
    every = sorted({character for text in texts for character in CHINESE.findall(text)})
    encoded = reader.plain(every)
    lost = [c for c, ids in zip(every, encoded, strict=True) if not ids or unknown & {*ids}]
    return lost, every


def _dead(opened: Opened) -> Iterator[Finding]:
    """Pieces that no text is ever spelt with."""
    reader = opened.reader
    assert reader is not None
    ids = {piece: index for index, piece in enumerate(reader.pieces)}
    apart = {*opened.tokens(), "[PAD]", "<pad>", "[MASK]", "[CLS]", "[SEP]", "[UNK]"}
    dead = [p for p in dead_pieces(reader) if p not in apart and not BYTE_PIECE.fullmatch(p)]
    if not dead:
        return
    known = registry().tokenizers.get(opened.published or "")
    first = registry().tokenizers["LLaMA"].pieces if known else len(reader.pieces)
    chinese = [piece for piece in dead if is_chinese(reader.texts([ids[piece]])[0].strip())]
    other = [piece for piece in dead if piece not in {*chinese}]
    what = f"{len(dead):,} of {len(reader.pieces):,} pieces are dead: no text is ever spelt with them."
    if known:
        new = sum(ids[piece] >= first for piece in dead)
        what = (
            f"{new:,} of the {known.pieces - first:,} pieces that {known.name} adds are dead, as is known of it, and so "
            f"are {len(dead) - new:,} of LLaMA's own, which its score-0 pieces forestall."
        )
    lines = [f"Chinese, {len(chinese):,}: {' '.join(chinese[:12])}"] if chinese else []
    lines += [f"other, {len(other):,}: {' '.join(other[:12])}"] if other else []
    waste = bool(chinese) or opened.model is not None
    yield Finding(
        "warning" if waste and not known else "note", "dead-pieces", str(opened.place), what, lines,
        "Their rows are never trained and cost memory only; " + MAKE_AGAIN,
    )  # fmt: skip


def _tied(opened: Opened, model: model_pb2.ModelProto) -> Iterator[Finding]:
    """Equal scores in a BPE model: which join comes first is then left to the reader."""
    if model.trainer_spec.model_type != BPE:
        return
    scores = [p.score for p in model.pieces if p.type == NORMAL and p.score > WHITESPACE_RUN_SCORE]
    ties = {score: count for score, count in Counter(scores).most_common() if count > 1}
    if ties:
        tied = sum(ties.values())
        yield Finding(
            "note" if opened.published else "warning", "tied-scores", str(opened.place / "tokenizer.model"),
            f"{tied:,} pieces share their scores with others, so SentencePiece (leftmost first) and merge lists (in "
            "order) join text differently.",
            some([f"score {score + 0.0:g}: {count:,} pieces" for score, count in ties.items()]),
            "Pieces that were appended with score 0 do this; " + MAKE_AGAIN,
        )  # fmt: skip


def _coverage(opened: Opened, thing: Thing, texts: list[str]) -> Iterator[Finding]:
    """How many Chinese characters a token holds."""
    assert opened.reader is not None
    ratio = _han_per_token(opened.reader, texts)
    if ratio is None:
        return
    thing.facts["chinese_characters_per_token"] = round(ratio, 3)
    if ratio < POOR:
        yield Finding(
            "note", "poor-chinese", str(opened.place),
            f"A token holds {ratio:.2f} Chinese characters on the probe texts: Chinese costs {1 / ratio:.1f} tokens a "
            "character.",
            [],
            "Give the base more Chinese pieces with chinese-llama extend-vocab (about 1.5 characters a token).",
        )  # fmt: skip


def _han_per_token(reader: Reader, texts: list[str]) -> float | None:
    with contextlib.suppress(IndexError, ValueError):  # ids that the reader's pieces do not have
        found = figures_of(compare((t for t in texts if CHINESE.search(t)), reader, None, None))
        scripts = found["scripts"].get("Han and kana")
        if scripts and scripts["tokens"]:
            return float(scripts["characters"] / scripts["tokens"])
        return float(found["characters_per_token"]) or None
    return None


def check_vocabulary(file: Path, model: model_pb2.ModelProto, reader: Reader) -> Iterator[Finding]:
    """What a bare SentencePiece model is, and is not."""
    texts = [text for text in probe_texts() if CHINESE.search(text)]
    spec, kind = (
        model.normalizer_spec,
        {UNIGRAM: "unigram", BPE: "BPE"}.get(model.trainer_spec.model_type, "other"),
    )
    byte = any(piece.type == BYTE for piece in model.pieces)
    unknown = {i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN}
    lost, every = _lost_characters(reader, unknown, texts)
    lines = [f"kind {kind}, {'with' if byte else 'without'} byte fallback, normaliser {spec.name or 'none'}"]
    if spec.precompiled_charsmap:
        lines.append(
            _around("（全角），！？ＡＢＣ", reader.decode(reader.encode(["（全角），！？ＡＢＣ"]))[0])
        )
    if lost:
        lines.append(f"{len(lost)} of {len(every)} Chinese characters of the probe texts are unknown to it")
    whole = byte and kind == "BPE" and not spec.precompiled_charsmap
    yield Finding(
        "note", "bare-vocabulary", str(file),
        f"A SentencePiece model of {len(model.pieces):,} pieces "
        + ("that could be a base's tokenizer, under another name." if whole else
           "to take Chinese pieces from; by itself it is no model's tokenizer."),
        lines,
        "Name it tokenizer.model where it belongs to a model." if whole else
        f"chinese-llama extend-vocab --base BASE --chinese-sp {file}",
    )  # fmt: skip
    yield from _tied(Opened(file.parent, model=model), model)


def check_extension(places: list[Path]) -> Iterator[Finding]:
    """Tokenizers that are given together, of which one extends another: what that does to text without Chinese."""
    readers: list[tuple[Path, Reader]] = []
    for place in places:
        reader = open_tokenizer(place, [], auto=False).reader
        if reader is not None and all(reader.pieces != known.pieces for _, known in readers):
            readers.append((place, reader))
    readers.sort(key=lambda pair: len(pair[1].pieces))
    for number, (place, base) in enumerate(readers):
        for other, new in readers[number + 1 :]:
            if len(base.pieces) >= 2 and new.pieces[: len(base.pieces)] == base.pieces:
                yield from _extended(place, base, other, new)


def _extended(place: Path, base: Reader, other: Path, new: Reader) -> Iterator[Finding]:
    found = compare(probe_texts(), new, None, base)
    for problem, check, what in (
        ("changed", "english-is-changed", "texts without Chinese are tokenised differently than by"),
        ("longer", "longer-than-base", "texts take more tokens than under"),
    ):
        if found.counts[problem]:
            yield Finding(
                "warning", check, str(other),
                f"{found.counts[problem]} of the {found.lengths.documents} probe {what} {place}, which it extends.",
                [repr(text) for text in found.examples[problem]],
                MAKE_AGAIN[0].lower() + MAKE_AGAIN[1:],
            )  # fmt: skip
