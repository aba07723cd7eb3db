"""Write the Hugging Face form of a SentencePiece-BPE model, so that both give the same ids.

The conversion in transformers ranks merges by id and adds a pre-tokenizer of its own. Here
tokenizer.json is written directly: merges from every split of every piece in order of the piece's
score, spaces marked by the normaliser, no pre-tokenizer, byte fallback.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab.proto import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def tokenizer_json(model: model_pb2.ModelProto) -> dict[str, Any]:
    """The content of tokenizer.json for a SentencePiece-BPE model like LLaMA's."""
    names = _special_names(model)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, p) for i, p in enumerate(model.pieces) if _is_special(p)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers(model.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": _post_processor(model, names["bos_token"]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *_strip(model.normalizer_spec),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": merges(model),
        },
    }


def _strip(spec: model_pb2.NormalizerSpec) -> list[dict[str, Any]]:
    """What SentencePiece takes off the beginning of a decoded text: the space of the dummy prefix, or
    all spaces."""
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        return []
    spaces = 1_000_000 if spec.remove_extra_whitespaces else 1
    return [{"type": "Strip", "content": " ", "start": spaces, "stop": 0}]


def normalizers(spec: model_pb2.NormalizerSpec) -> list[dict[str, Any]]:
    """What SentencePiece does to a text before it looks for pieces, in its order."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "\\A +|[ \u2581]+\\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def merges(model: model_pb2.ModelProto) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, in the order in which SentencePiece prefers them."""
    ids = {p.piece: i for i, p in enumerate(model.pieces) if p.type in (NORMAL, USER_DEFINED)}
    ranked = sorted(ids, key=lambda piece: (-model.pieces[ids[piece]].score, ids[piece]))
    pairs: list[tuple[str, str]] = []
    for piece in ranked:
        cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
        splits = [(piece[:cut], piece[cut:]) for cut in cuts]
        if len(splits) > 1:
            splits.sort(key=lambda split: (ids[split[0]], ids[split[1]]))
        pairs += splits
    return pairs


def tokenizer_config(model: model_pb2.ModelProto, pad_token: str | None) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    `split_special_tokens`: literal `<s>` or `</s>` in a text is text, as SentencePiece has it (a
    tokenizer with a chat template is different, see model.resize.save_chat_template).
    Padding uses `<unk>` where there is no pad token, never the end of text, which must be learnt.
    """
    names = _special_names(model)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "pad_token": pad_token or names["unk_token"],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "model_max_length": int(1e30),
    }


def write_tokenizer(directory: Path, model: model_pb2.ModelProto, pad_token: str | None) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into `directory`."""
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    for name, content in (
        ("tokenizer.json", tokenizer_json(model)),
        ("tokenizer_config.json", tokenizer_config(model, pad_token)),
    ):
        indent = None if name == "tokenizer.json" else 1  # large, and much faster to write without
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _is_special(piece: Any) -> bool:
    return piece.type in (UNKNOWN, CONTROL)


def _special_names(model: model_pb2.ModelProto) -> dict[str, str]:
    spec = model.trainer_spec
    known = {piece.piece for piece in model.pieces}
    names = {"unk_token": spec.unk_piece, "bos_token": spec.bos_piece, "eos_token": spec.eos_piece}
    return {role: name for role, name in names.items() if name in known}


def _added_token(index: int, piece: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": piece.piece, **flags, "special": True}


def _post_processor(model: model_pb2.ModelProto, bos: str) -> dict[str, Any]:
    """Puts the beginning-of-text token before a text, as LLaMA's tokenizer does."""
    index = next(i for i, piece in enumerate(model.pieces) if piece.piece == bos)
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, *second],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
