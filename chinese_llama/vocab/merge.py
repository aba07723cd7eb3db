"""Extend a base's tokenizer with Chinese pieces: the stage `extend-vocab`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.artifacts import Keep, Manifest, input_record, read_manifest, stands, write_manifest
from chinese_llama.directories import check_apart, check_output, new_directory
from chinese_llama.errors import BadFile, UserError
from chinese_llama.resources import shipped
from chinese_llama.vocab import audit, report
from chinese_llama.vocab.bases import Base, SentencePieceBase, open_base
from chinese_llama.vocab.corpus import Corpus, read_corpus
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import NORMAL, read_chinese
from chinese_llama.vocab.readers import Reader, open_readers
from chinese_llama.vocab.select import Selection, select
from chinese_llama.vocab.train import LARGEST, MODEL

Readers = tuple[Reader, Reader, Reader | None]  # the base's, the new tokenizer's two
POLICIES = ("strict", "reference")
SHIPPED = ("20k", "8k")  # the Chinese models that come along; the first where none is named
POINTS = 8  # of the curve of length against size


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for cycles among hundreds of thousands of pieces, which have none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def extend_vocab(
    base: Path,
    chinese_sp: Path | None,
    output: Path,
    policy: str = "strict",
    pad_token: str | None = None,
    corpus: Sequence[Path] = (),
    size: int | None = None,
    min_count: int = 0,
    probe: Path | None = None,
    force: bool = False,
    keep: Keep = False,
) -> dict[str, Any]:
    """Write the extended tokenizer to `output` and return its report.

    "strict" adds only pieces of Chinese characters, ranked below all merges of the base, each proven
    to be producible; "reference" appends every missing piece with score 0, as Chinese-LLaMA did,
    which gives its published files to the byte. Without `chinese_sp`, the pieces that come with the
    package ("20k", or "8k" by name) are taken. With `corpus`, strict learns which pieces are worth
    their rows, leaving out those used fewer than `min_count` times there (other than parts of others);
    `size` is the most pieces that the finished tokenizer may have, the base's and the pad token included.

    Raises UserError if the strict contract does not hold on the built-in probe texts and those of
    `probe`, naming the first that breaks it.
    """
    if policy == "reference" and chinese_sp is None:
        raise UserError(
            "--policy reference needs --chinese-sp (published: Chinese-LLaMA's chinese_sp.model)."
        )
    opened, chinese_sp = open_base(base), chinese_model(chinese_sp)
    _check_extended(base)
    chinese = read_chinese(chinese_sp)
    settings: dict[str, Any] = {
        "policy": policy,
        "pad_token": pad_token,
        "size": size,
        "min_count": min_count,
    }
    _check_options(opened, corpus, **settings)
    _check_pad(pad_token, opened, chinese)
    if not keep:
        check_output(output, force)
    inputs = {"base": opened.file, "chinese_sp": chinese_sp, **({"probe": probe} if probe else {})}
    inputs |= {f"corpus:{index}": path for index, path in enumerate(corpus)}
    records = {role: input_record(path) for role, path in inputs.items()}
    manifest = Manifest("tokenizer", "extend-vocab", records, settings)
    check_apart(output, manifest.places())
    if keep and stands(output, manifest, force, keep):
        return report.read(output)
    counted = read_corpus(list(corpus)) if corpus else None
    with new_directory(output, force, manifest.places()) as partial:
        selection = None
        if policy == "strict":
            room = None if size is None else size - opened.size - bool(pad_token)
            selection = select(opened, chinese, counted.counts if counted else None, room, min_count)
            if pad_token in selection.pieces:
                raise UserError(f"--pad-token {pad_token!r} is a piece that enters; give another.")
            opened.write(partial, selection.pieces, pad_token)
        else:
            _write_reference(partial, opened, chinese, pad_token)
        readers = open_readers(base)[0], *open_readers(partial)
        told = {
            "policy": policy,
            "base": str(base),
            "chinese_sp": str(chinese_sp),
            "size": size,
            **_sizes(opened, readers[1], pad_token),
            "checks": _checks(readers, policy, pad_token, probe),
            **(_choice(opened, selection, counted) if selection else {}),
            **(_corpus(readers, corpus, counted) if counted else {}),
        }
        report.write(partial, told, report.hidden_size(base))
        manifest.vocab_size = told["vocab_size"]
        manifest.metrics = {key: told[key] for key in ("base_vocab_size", "new_pieces")}
        write_manifest(partial, manifest)
    return told


def chinese_model(given: Path | None) -> Path:
    """The file of a Chinese model: `given`, one that comes along ("20k", "8k"; None: the first), or what
    train-vocab wrote into a directory."""
    name = SHIPPED[0] if given is None else str(given)
    if name in SHIPPED and not Path(name).exists():
        return shipped("vocab") / f"chinese_{name}.model"
    path = Path(name)
    return path / MODEL if path.is_dir() else path


def append_missing(base: model_pb2.ModelProto, chinese: model_pb2.ModelProto) -> model_pb2.ModelProto:
    """A copy of `base` with the pieces of `chinese` that it lacks, in file order, score 0, type
    unset: the merge that Chinese-LLaMA published."""
    model = model_pb2.ModelProto()
    model.CopyFrom(base)
    known = {piece.piece for piece in base.pieces}
    for piece in chinese.pieces:
        if piece.piece not in known:
            model.pieces.add(piece=piece.piece, score=0.0)
    return model


def _write_reference(
    directory: Path, base: Base, chinese: model_pb2.ModelProto, pad_token: str | None
) -> None:
    if not isinstance(base, SentencePieceBase):
        raise UserError(f"--policy reference extends SentencePiece models, which {base.file} is not.")
    model = append_missing(base.model, chinese)
    if pad_token is not None:
        model.pieces.add(piece=pad_token, score=0.0)
    write_tokenizer(directory, model, pad_token)


def _sizes(base: Base, new: Reader, pad_token: str | None) -> dict[str, int]:
    size = len(new.pieces)
    if size - base.size == (pad_token is not None):
        what = "what the Chinese model offers is there already, or cannot be produced"
        raise UserError(f"Nothing can be added to {base.file}: {what}; is that tokenizer extended already?")
    return {"base_vocab_size": base.size, "new_pieces": size - base.size, "vocab_size": size}


def _checks(readers: Readers, policy: str, pad_token: str | None, probe: Path | None) -> dict[str, Any]:
    """What the finished tokenizer does on the probe texts; a strict one must break nothing."""
    own = [pad_token, f"a {pad_token} b"] if pad_token else []  # in a text, it must be text
    checks = audit.check_contract(*readers, chain(own, audit.probe_texts(probe)))
    if policy == "strict" and checks["broken"]:
        raise UserError(f"The extended tokenizer breaks its contract: {checks['broken'][0]}")
    return checks


def _choice(base: Base, selection: Selection, counted: Corpus | None) -> dict[str, Any]:
    """What became of the pieces, and how long texts would be with fewer of them."""
    measured = counted.held_out if counted and counted.held_out else list(audit.probe_texts())
    characters = sum(map(len, measured))
    curve = []
    for point in range(POINTS + 1):
        pieces = selection.first(len(selection.pieces) * point // POINTS)
        tokens = sum(map(len, base.encode_with(pieces, as_text=True)(measured)))
        curve.append({"size": base.size + len(pieces), "characters_per_token": characters / max(1, tokens)})
    where = "documents kept apart from the corpus" if counted and counted.held_out else "the probe texts"
    return {
        "repaired": selection.repaired,
        "dropped": selection.dropped,
        "curve": curve,
        "curve_on": where,
    }


def _corpus(readers: Readers, files: Sequence[Path], counted: Corpus) -> dict[str, Any]:
    """What the corpus was, and lengths on the documents of it that were kept apart (if it has enough)."""
    told: dict[str, Any] = {
        "corpus": {
            "files": [str(path) for path in files],
            "documents": counted.documents,
            "clauses": len(counted.counts),
            "one_document_in": counted.every,
        }
    }
    if counted.held_out:
        base, new, other = readers
        found = audit.compare(counted.held_out, new, other, base)
        told["held_out"] = audit.figures_of(found)
    return told


def _check_options(
    base: Base, corpus: Sequence[Path], policy: str, pad_token: str | None, size: int | None, min_count: int
) -> None:
    if policy not in POLICIES:
        raise UserError(f"--policy {policy!r}: known are {', '.join(POLICIES)}.")
    if policy == "reference" and (corpus or size is not None or min_count):
        raise UserError("--policy reference takes every piece: no --corpus, --size or --min-count with it.")
    if size is not None and size <= base.size + (pad_token is not None):
        raise UserError(f"--size {size}: {base.file} has {base.size:,} pieces already; give a larger size.")
    if size is not None and size > LARGEST:
        raise UserError(f"--size {size}: give at most {LARGEST:,}.")
    if len({path.resolve() for path in corpus}) < len(corpus):
        raise UserError("--corpus: a file is given twice.")
    if min_count < 0:
        raise UserError(f"--min-count {min_count}: give 0 or more.")
    if min_count and not corpus:
        raise UserError("--min-count counts pieces in a corpus; give one with --corpus.")


def _check_extended(base: Path) -> None:
    """Refuse what this tool has extended already: its pieces were chosen for its own base."""
    directory = base if base.is_dir() else base.parent
    manifest = read_manifest(directory)
    if manifest and manifest.command in ("extend-vocab", "extend-model", "merge"):
        origin = manifest.inputs.get("base", {}).get("path", "its base")
        raise BadFile(base, f"is extended already (by {manifest.command}); extend {origin} instead.")


def _check_pad(pad_token: str | None, base: Base, chinese: model_pb2.ModelProto) -> None:
    if pad_token is None:
        return
    if not pad_token.strip():
        raise UserError("--pad-token is empty; give a text such as '[PAD]'.")
    if pad_token in base.names:
        raise UserError(f"--pad-token {pad_token!r} is a piece of {base.file} already; give another.")
    for index, piece in enumerate(chinese.pieces):
        if piece.piece == pad_token:
            kind = "a piece" if piece.type == NORMAL else "a special piece"
            raise UserError(f"--pad-token {pad_token!r} is {kind} of the Chinese model (id {index}).")
