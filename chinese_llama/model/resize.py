"""Grow a base model's two vocabulary matrices for an extended tokenizer: the stage `extend-model`.

Only the two matrices are rewritten; old rows keep their bits, everything else is copied.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from chinese_llama.artifacts import (
    Keep,
    Manifest,
    hash_ahead,
    identity,
    input_record,
    read_manifest,
    stands,
    write_manifest,
)
from chinese_llama.directories import MANIFEST, new_directory, write_text
from chinese_llama.errors import DoesNotFit, UserError
from chinese_llama.model.initialise import METHODS, Side, new_rows
from chinese_llama.model.shards import (
    EMBED,
    HEAD,
    Change,
    Changed,
    Weights,
    blocks,
    copy_unchanged,
    read_json,
    save_shards,
)
from chinese_llama.vocab.bases import before_extension
from chinese_llama.vocab.fast import FILES as TOKENIZER_FILES
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import read_model
from chinese_llama.vocab.readers import Reader, open_readers

WEIGHTS = (
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot"),
    ".onnx_data",
)
DEFAULT, DISTILL = "asymmetric", "distill"


def extend_model(
    base: Path,
    tokenizer: Path,
    output: Path,
    init: str = DEFAULT,
    pad_to_multiple_of: int = 1,
    corpus: Sequence[Path] = (),
    force: bool = False,
    keep: Keep = False,
) -> Manifest:
    """Write `base` with rows for the new pieces of `tokenizer` to `output`; return its manifest.

    `init` is a method of `initialise`, or "distill", which starts from the default one, then trains the
    input rows on snippets of `corpus` (see `distill`) and has the model in memory for it.

    Raises DoesNotFit if the tokenizer does not extend the base's, UserError for unknown settings.
    """
    _check_settings(init, pad_to_multiple_of, corpus)
    source = Weights(base)
    hash_ahead([base, tokenizer, *corpus])
    reader = open_readers(tokenizer)[0]
    old_size = base_vocab_size(base, tokenizer, reader)
    _check_rows(source, base, old_size)
    rows = -(-len(reader.pieces) // pad_to_multiple_of) * pad_to_multiple_of
    inputs = {"base": base, "tokenizer": tokenizer}
    inputs |= {f"corpus:{index}": path for index, path in enumerate(corpus)}
    manifest = Manifest(
        "model",
        "extend-model",
        settings={"init": init, "pad_to_multiple_of": pad_to_multiple_of},
        vocab_size=len(reader.pieces),
        metrics={"base_vocab_size": old_size, "rows": rows},
    )
    if keep:
        manifest.inputs = _records(inputs)
        if stands(output, manifest, force, keep):
            return read_manifest(output) or manifest
    parts = decompose(tokenizer, reader, old_size, rows)
    changes = {
        name: _initialised(source, name, old_size, DEFAULT if init == DISTILL else init, parts)
        for name in (EMBED, HEAD)
        if name in source
    }
    if init == DISTILL:
        manifest.metrics |= _distilled(source, changes, tokenizer, corpus, old_size, parts)
    with new_directory(output, force, inputs.values()) as partial:
        copy_other_files(base, partial)
        copy_tokenizer(tokenizer, partial)
        config = {**source.config(), "vocab_size": rows}
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        model = Changed(source, changes)
        copied = copy_unchanged(model, source, partial)
        known = save_shards(model, partial, "extending", done={name: {} for name in copied})
        known |= {name: {"sha256": identity(file)} for name, file in copied.items()}  # hashed in the meantime
        manifest.inputs = _records(inputs)
        write_manifest(partial, manifest, known)
    return manifest


def _records(inputs: dict[str, Path]) -> dict[str, dict[str, str]]:
    return {role: input_record(path) for role, path in inputs.items()}


def _check_settings(init: str, pad_to_multiple_of: int, corpus: Sequence[Path]) -> None:
    known = (*METHODS, DISTILL)
    if init not in known:
        raise UserError(f"--init {init!r}: known are {', '.join(known)}.")
    if pad_to_multiple_of < 1:
        raise UserError("--pad-to-multiple-of must be at least 1.")
    if init == DISTILL and not corpus:
        raise UserError("--init distill reads the new pieces in texts; give some with --corpus.")
    if init != DISTILL and corpus:
        raise UserError(f"--corpus is for --init distill; {init} reads none.")


def base_vocab_size(base: Path, tokenizer: Path, reader: Reader) -> int:
    """How many of the tokenizer's first ids are the base's: all from there on are new.

    Raises DoesNotFit if the tokenizer beside the base is not the beginning of the extended one.
    """
    if any((base / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        old, new = open_readers(base)[0].pieces, reader.pieces
        for index, piece in enumerate(old):
            if index >= len(new) or new[index] != piece:
                raise DoesNotFit(
                    f"{tokenizer} does not extend the tokenizer of {base}: id {index} is {piece!r} "
                    "there; run chinese-llama extend-vocab on this base."
                )
        if len(old) == len(new):
            raise DoesNotFit(f"{tokenizer} has no more pieces than {base}; there is nothing to extend.")
        return len(old)
    manifest = read_manifest(tokenizer)
    if manifest and "base_vocab_size" in manifest.metrics:
        return int(manifest.metrics["base_vocab_size"])
    raise DoesNotFit(
        f"{base} has no tokenizer and {tokenizer} no manifest, so it is unknown which pieces are new; put "
        "the base's tokenizer.model (or tokenizer.json) into it."
    )


def _check_rows(source: Weights, base: Path, old_size: int) -> None:
    if EMBED not in source:
        raise DoesNotFit(f"{base} has no tensor {EMBED}; only LLaMA-family models can be extended.")
    for name in (EMBED, HEAD):
        if name in source and source.meta(name)[0][0] < old_size:
            raise DoesNotFit(
                f"{base}: {name} has {source.meta(name)[0][0]:,} rows, its tokenizer {old_size:,} pieces."
            )
    if HEAD not in source and not source.config().get("tie_word_embeddings"):
        raise DoesNotFit(f"{base} has no {HEAD} and config.json does not tie it to the embeddings.")


def decompose(tokenizer: Path, reader: Reader, old_size: int, rows: int) -> list[list[int]]:
    """For each row from `old_size` on, the old ids that its piece was tokenised into before.

    Without the dummy prefix: no row gets a stray space. Control pieces and padding rows: [].
    """
    parts: list[list[int]] = [[] for _ in range(rows - old_size)]
    new = [index for index in reader.normal if index >= old_size]
    texts = reader.texts(new)
    for index, ids in zip(new, before_extension(tokenizer, old_size)(texts), strict=True):
        parts[index - old_size] = ids
    return parts


def _initialised(source: Weights, name: str, old_size: int, init: str, parts: list[list[int]]) -> Change:
    side: Side = "tied" if HEAD not in source else "output" if name == HEAD else "input"

    def make() -> torch.Tensor:
        old = torch.empty(old_size, source.meta(name)[0][1])
        for _, start, stop in blocks(source, [name]):
            old[start:stop] = source.rows(name, start, min(stop, old_size))
        return new_rows(init, old, parts, side)

    return _grown(source, name, old_size, len(parts), make)


def _grown(source: Weights, name: str, old_size: int, count: int, make: Callable[[], torch.Tensor]) -> Change:
    """The first `old_size` rows as they are, and below them the `count` that `make` gives (once)."""
    (_, hidden), dtype = source.meta(name)
    kept: list[torch.Tensor] = []
    lock = threading.Lock()

    def rows(start: int, stop: int) -> torch.Tensor:
        old = source.rows(name, start, min(stop, old_size))
        if stop <= old_size:
            return old
        with lock:
            if not kept:
                kept.append(make().to(dtype))
        return torch.cat([old, kept[0][max(start - old_size, 0) : stop - old_size]])

    return Change((old_size + count, hidden), dtype, rows)


def _distilled(
    source: Weights,
    changes: dict[str, Change],
    tokenizer: Path,
    corpus: Sequence[Path],
    old_size: int,
    parts: list[list[int]],
) -> dict[str, Any]:
    """Replace the new input rows of `changes` by distilled ones; return figures for the manifest."""
    from chinese_llama.model.distill import distill

    start = changes[EMBED].rows(old_size, old_size + len(parts)).float()
    rows, figures = distill(source.directory, tokenizer, corpus, start, parts, old_size)
    changes[EMBED] = _grown(source, EMBED, old_size, len(parts), lambda: rows)
    return figures


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: no weights, no tokenizer, no manifest, no card."""
    old = ("added_tokens.json", "vocab.json", "merges.txt")  # of the tokenizer that is replaced
    skip = {MANIFEST, "README.md", "config.json", *old, *TOKENIZER_FILES}
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in WEIGHTS or file.name.endswith(".index.json")
        is_weights = is_weights or file.name.startswith("adapter_")  # transformers would look for an adapter
        if file.is_file() and file.name not in skip and not is_weights and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one directory (or tokenizer.model) to another.

    A tokenizer.model without tokenizer.json beside it gets ours, with the same ids.
    """
    directory = source.parent if source.is_file() else source
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        write_tokenizer(target, read_model(directory / "tokenizer.model"), _pad_token(directory))
        if (directory / "chat_template.jinja").is_file():
            shutil.copyfile(directory / "chat_template.jinja", target / "chat_template.jinja")
        elif template := _old_template(directory):
            save_chat_template(target, template)
        return
    source = directory
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def save_chat_template(directory: Path, template: str) -> None:
    """Put a chat template beside the tokenizer of `directory`.

    Control tokens that the template writes must be read as such by other programs, so the tokenizer no
    longer splits them; this toolkit asks for splitting itself wherever it tokenises a user's text.
    """
    write_text(directory / "chat_template.jinja", template)
    config = {**read_json(directory / "tokenizer_config.json"), "split_special_tokens": False}
    write_text(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1) + "\n")


def _old_template(directory: Path) -> str | None:
    """The chat template that older versions keep in tokenizer_config.json; of several, the default one."""
    file = directory / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):
        found = next(
            (t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def _pad_token(directory: Path) -> str | None:
    """The pad token that the Hugging Face files of a tokenizer name."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            token = read_json(directory / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return str(token)
    return None
