"""Special tokens: whether they are named, are in the vocabulary, and stand where they belong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from chinese_llama.doctor.finding import Finding, some
from chinese_llama.doctor.opened import Opened, vocabulary_of
from chinese_llama.doctor.raw import json_object
from chinese_llama.vocab.bytelevel import BETWEEN_DOCUMENTS

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
CONFIG = "tokenizer_config.json"


def check_special(opened: Opened) -> Iterator[Finding]:
    """All checks of special tokens."""
    unknown = _unknown_names(opened)
    yield from _outside(opened, unknown)
    yield from _two_names(opened)
    if opened.auto is not None:
        yield from _ends(opened)
        yield from _pad(opened)
        yield from _beyond(opened, unknown)
        yield from _generation(opened)
        yield from _prompts(opened)


def named(content: dict[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json or special_tokens_map.json names, by role."""
    found = {}
    for role in ROLES:
        token = content.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            found[role] = token
    return found


def _unknown_names(opened: Opened) -> dict[str, str]:
    """Named special tokens that no file gives an id, and what names them."""
    pieces = {
        *vocabulary_of(opened.content),
        *opened.tokens(),
        *(opened.reader.pieces if opened.reader else []),
    }
    found = {}
    for file, content in (("special_tokens_map.json", opened.names), (CONFIG, opened.config)):
        several = content.get("additional_special_tokens") or content.get("extra_special_tokens") or []
        listed = (
            [t.get("content") if isinstance(t, dict) else t for t in several]
            if isinstance(several, list)
            else []
        )
        for token in [*named(content).values(), *listed]:
            if isinstance(token, str) and token not in pieces:
                found[token] = file
    return found


def _rows(opened: Opened) -> int | None:
    """The rows of the model that lies beside the tokenizer."""
    rows = json_object(opened.place / "config.json", []).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _outside(opened: Opened, unknown: dict[str, str]) -> Iterator[Finding]:
    for token, file in unknown.items():
        index = opened.auto.convert_tokens_to_ids(token) if opened.auto is not None else None
        rows = _rows(opened)
        room = rows is not None and index is not None and index < rows
        given = f" as id {index:,}" if index is not None else ""
        yield Finding(
            "warning" if room else "error", "special-token-not-in-vocabulary", str(opened.place / file),
            f"{token!r} is named, but is no piece: transformers adds it{given} without a word, "
            + ("a row that was never trained." if room else "and a model without a row for it fails or reads another."),
            [f"the vocabulary has {len(opened.reader.pieces) if opened.reader else 0:,} pieces"],
            "Name a token that is in the vocabulary in its place"
            + (f"; for a pad token of its own, make the tokenizer with extend-vocab --pad-token {token!r}, and grow "
               "the model with extend-model." if "pad" in token.lower() else ' (LLaMA: "<s>", "</s>", "<unk>").'),
        )  # fmt: skip


def _two_names(opened: Opened) -> Iterator[Finding]:
    one, two = named(opened.config), named(opened.names)
    lines = [
        f"{role}: {one[role]!r} in {CONFIG}, {two[role]!r} in special_tokens_map.json"
        for role in ROLES
        if role in one and role in two and one[role] != two[role]
    ]
    if lines:
        yield Finding(
            "warning", "special-tokens-differ", str(opened.place),
            "tokenizer_config.json and special_tokens_map.json name different special tokens; programs differ in "
            "which they believe.",
            lines,
            "Correct special_tokens_map.json, or delete it: tokenizer_config.json is enough.",
        )  # fmt: skip


def _ends(opened: Opened) -> Iterator[Finding]:
    auto = opened.auto
    if auto.eos_token_id is None:
        yield Finding(
            "error", "no-eos", str(opened.place),
            "No end-of-text token (eos) is named: nothing that is trained with it learns to stop, and this toolkit's "
            "recipes refuse it.",
            [f"{CONFIG}: {json.dumps(opened.config.get('eos_token'))}"],
            f'Add "eos_token" to {CONFIG}: the token that ends a text in the vocabulary (LLaMA: "</s>").',
        )  # fmt: skip
    if auto.bos_token_id is None and BETWEEN_DOCUMENTS not in auto.get_vocab():
        yield Finding(
            "warning", "no-bos", str(opened.place),
            "No beginning-of-text token (bos) is named; this toolkit's recipes put one before every text, and refuse a "
            "tokenizer without.",
            [f"{CONFIG}: {json.dumps(opened.config.get('bos_token'))}"],
            f'Add "bos_token" to {CONFIG} (LLaMA: "<s>"; where the base has none, its end-of-text token serves).',
        )  # fmt: skip


def _pad(opened: Opened) -> Iterator[Finding]:
    auto, where = opened.auto, str(opened.place)
    if auto.pad_token_id is None:
        yield Finding(
            "warning", "no-pad", where,
            "No padding token is named: other programs refuse to make batches of texts of different lengths, or take "
            "eos for it.",
            [f"{CONFIG}: {json.dumps(opened.config.get('pad_token'))}"],
            f'Add "pad_token" to {CONFIG}: the unknown token, which byte fallback never writes, or a reserved one; '
            "not eos. (This toolkit's recipes pad by themselves.)",
        )  # fmt: skip
    elif auto.pad_token_id == auto.eos_token_id:
        yield Finding(
            "warning", "pad-is-eos", where,
            "The padding token is the end-of-text token: trainers that take padding out of the loss take the end out "
            "too, and the model never learns to stop.",
            [f"pad = eos = {auto.eos_token!r}, id {auto.eos_token_id}"],
            f'Give "pad_token" another token in {CONFIG}: the unknown token, or a reserved one.',
        )  # fmt: skip
    elif auto.pad_token_id == auto.unk_token_id:
        yield Finding(
            "note", "pad-is-unk", where,
            "The padding token is the unknown token, which texts hold only where there is no byte fallback.",
            [f"pad = unk = {auto.unk_token!r}, id {auto.unk_token_id}"],
        )  # fmt: skip


def _beyond(opened: Opened, unknown: dict[str, str]) -> Iterator[Finding]:
    """Ids that the model beside the tokenizer has no rows for."""
    rows = _rows(opened)
    ids = {role: getattr(opened.auto, f"{role}_id", None) for role in ROLES}
    wrong = [
        f"{role}: {getattr(opened.auto, role)!r}, id {index:,}"
        for role, index in ids.items()
        if rows is not None
        and index is not None
        and index >= rows
        and getattr(opened.auto, role) not in unknown
    ]
    if wrong:
        yield Finding(
            "error", "special-token-beyond-rows", str(opened.place),
            f"The model beside the tokenizer has {rows:,} rows, too few for its special tokens: the first batch that "
            "holds one fails.",
            wrong,
            "Grow the model with chinese-llama extend-model, or use the tokenizer that it was made with.",
        )  # fmt: skip


def _generation(opened: Opened) -> Iterator[Finding]:
    """Whether the model beside the tokenizer begins and ends texts with the tokenizer's tokens; there may be several
    ends. What generation_config.json says goes before config.json."""
    lines = {}
    contents = {
        file: json_object(opened.place / file, []) for file in ("generation_config.json", "config.json")
    }
    for role in ("eos_token", "bos_token"):
        key, own = f"{role}_id", getattr(opened.auto, f"{role}_id")
        file = next((file for file, content in contents.items() if content.get(key) is not None), None)
        said = contents[file][key] if file else own
        if own is not None and own not in (said if isinstance(said, list) else [said]):
            lines[role] = f"{file}: {key} {said}; the tokenizer's {getattr(opened.auto, role)!r} is {own}"
    if lines:
        yield Finding(
            "warning", "special-ids-differ", str(opened.place),
            "The model names other control tokens than the tokenizer: "
            + ("generation does not stop, or stops at once." if "eos_token" in lines
               else "texts may begin with another token than in training."),
            [*lines.values()],
            "Set the ids in config.json and generation_config.json to the tokenizer's (several ends as a list).",
        )  # fmt: skip


def _prompts(opened: Opened) -> Iterator[Finding]:
    """What is put around a prompt."""
    auto = opened.auto
    ids = auto("中文")["input_ids"]
    said = [
        f"{name}: {opened.config[name]}"
        for name in ("add_bos_token", "add_eos_token")
        if name in opened.config
    ]
    if not ids:
        return
    if auto.eos_token_id is not None and ids[-1] == auto.eos_token_id:
        yield Finding(
            "warning", "eos-after-prompts", str(opened.place),
            "The end-of-text token is put after every text, prompts too: a model that is asked so has ended already.",
            some([f"'中文' becomes {ids}", *said]),
            f'Set "add_eos_token" to false in {CONFIG} (and correct the post_processor of tokenizer.json); training '
            "adds the end itself.",
        )  # fmt: skip
    declined = opened.config.get("add_bos_token") is False or opened.model is not None
    if auto.bos_token_id is not None and declined and ids[0] != auto.bos_token_id:
        yield Finding(
            "warning", "no-bos-before-prompts", str(opened.place),
            "The beginning-of-text token is not put before a text; a LLaMA that is asked without it answers worse.",
            some([f"'中文' becomes {ids}", *said]),
            f'Set "add_bos_token" to true in {CONFIG}, or make the tokenizer again with extend-vocab.',
        )  # fmt: skip
