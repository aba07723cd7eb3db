"""Merge a Chinese SentencePiece model into the base's tokenizer: the stage `extend-vocab`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.artifacts import Keep, Manifest, input_record, stands, write_manifest
from chinese_llama.directories import check_output, new_directory, write_text
from chinese_llama.errors import UserError
from chinese_llama.vocab import audit
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import CONTROL, NORMAL, read_base, read_model, tokenizer_model
from chinese_llama.vocab.select import add_pieces, select

POLICIES = ("strict", "reference")
REPORT = "vocab_report.json"


def extend_vocab(
    base: Path,
    chinese_sp: Path,
    output: Path,
    policy: str = "strict",
    pad_token: str | None = None,
    force: bool = False,
    keep: Keep = False,
) -> dict[str, Any]:
    """Write the extended tokenizer to `output` and return its report.

    "strict" adds only pieces of Chinese characters, ranked below all merges of the base, each proven
    to be producible; "reference" appends every missing piece with score 0, as Chinese-LLaMA did,
    which gives its published files to the byte. Raises UserError if the strict contract does not
    hold for the built-in probe texts, naming the first that breaks it.
    """
    if policy not in POLICIES:
        raise UserError(f"--policy {policy!r}: known are {', '.join(POLICIES)}.")
    base_model, chinese = read_base(base), read_model(chinese_sp)
    if not keep:
        check_output(output, force)
    if pad_token is not None:
        _check_pad(pad_token, base_model, chinese)
    manifest = Manifest(
        "tokenizer",
        "extend-vocab",
        inputs={"base": input_record(tokenizer_model(base)), "chinese_sp": input_record(chinese_sp)},
        settings={"policy": policy, "pad_token": pad_token},
    )
    if keep and stands(output, manifest, force, keep):
        return json.loads((output / REPORT).read_text(encoding="utf-8"))
    report: dict[str, Any] = {"policy": policy, "base_vocab_size": len(base_model.pieces)}
    if policy == "strict":
        selection = select(base_model, chinese)
        model = add_pieces(base_model, selection.pieces)
        report |= {"repaired": selection.repaired, "dropped": selection.dropped}
    else:
        model = append_missing(base_model, chinese)
    if pad_token is not None:
        model.pieces.add(piece=pad_token, score=0.0)
        if policy == "strict":
            model.pieces[-1].type = CONTROL
    report["vocab_size"] = len(model.pieces)
    if report["vocab_size"] == report["base_vocab_size"]:
        raise UserError(f"{chinese_sp} adds no piece to {base}: is that tokenizer already extended?")
    report["new_pieces"] = report["vocab_size"] - report["base_vocab_size"]
    with new_directory(output, force) as partial:
        write_tokenizer(partial, model, pad_token)
        checks = audit.check_contract(base_model, model, partial)
        report["checks"] = checks
        if policy == "strict" and checks["broken"]:
            raise UserError(f"The extended tokenizer breaks its contract: {checks['broken'][0]}")
        write_text(partial / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        manifest.vocab_size = report["vocab_size"]
        manifest.metrics = {key: report[key] for key in ("base_vocab_size", "new_pieces")}
        write_manifest(partial, manifest)
    return report


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


def _check_pad(pad_token: str, *models: model_pb2.ModelProto) -> None:
    if not pad_token.strip():
        raise UserError("--pad-token is empty; give a text such as '[PAD]'.")
    for model in models:
        for index, piece in enumerate(model.pieces):
            if piece.piece == pad_token:
                kind = "a piece" if piece.type == NORMAL else "a special piece"
                raise UserError(f"--pad-token {pad_token!r} is {kind} already (id {index}).")
