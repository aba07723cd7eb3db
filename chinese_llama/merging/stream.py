"""The stage `merge`: base weights and adapters in, plain Hugging Face weights out, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from chinese_llama.artifacts import Manifest, identity, input_record, read_manifest, stands, write_manifest
from chinese_llama.data.templates import stop_ids
from chinese_llama.directories import new_directory, write_text
from chinese_llama.errors import DoesNotFit, UserError
from chinese_llama.merging.plan import Adapter, check_lineage
from chinese_llama.model.adapters import merged_changes, read_tensors
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.resize import copy_other_files, copy_tokenizer
from chinese_llama.model.shards import EMBED, Change, Weights, read_json, rewrite
from chinese_llama.vocab.readers import open_readers


def merge(
    base: Path, adapters: list[Adapter], output: Path, force: bool = False, keep: bool = False
) -> Manifest:
    """Write `base` with `adapters` baked in, in their order, to `output`; return its manifest.

    W + sum of scale * B @ A in float32, rounded once to the dtype of the base; vocabulary rows from
    the last adapter that has them; the tokenizer of the last adapter that brings one. Raises
    DoesNotFit where something does not belong together.
    """
    source = Weights(base)
    manifest = Manifest(
        "model",
        "merge",
        inputs={
            "base": input_record(base),
            **{
                f"adapter:{i}": {"path": str(adapter.path), "sha256": identity(adapter.path)}
                for i, adapter in enumerate(adapters)
            },
        },
        settings={"loras": [adapter.name for adapter in adapters]},
    )
    if keep and stands(output, manifest, force):
        return read_manifest(output) or manifest
    check_lineage(base, adapters)
    pairs = [(adapter, read_tensors(adapter)) for adapter in adapters]
    changes = merged_changes(source, pairs)
    rows = changes[EMBED].shape[0] if EMBED in changes else source.meta(EMBED)[0][0]
    tokenizer = next((a.tokenizer for a in reversed(adapters) if a.tokenizer), base)
    manifest.vocab_size = _vocabulary(tokenizer, rows)
    manifest.metrics = {"rows": rows, "changed_tensors": len(changes), "tensors": len(list(source))}
    base_manifest = read_manifest(base)
    if base_manifest and "base_vocab_size" in base_manifest.metrics:
        manifest.metrics["base_vocab_size"] = base_manifest.metrics["base_vocab_size"]
    with new_directory(output, force, manifest.places()) as partial:
        copy_other_files(base, partial)
        copy_tokenizer(tokenizer, partial)
        config = {**source.config(), "vocab_size": rows}
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        _write_ends(partial)
        rewrite(source, partial, {name: _checked(name, c) for name, c in changes.items()}, "merging")
        write_text(partial / "README.md", _card(base, adapters))
        write_manifest(partial, manifest)
    return manifest


def _write_ends(directory: Path) -> None:
    """Tell other programs (generation_config.json) which tokens end an answer of a model with a template."""
    template = directory / "chat_template.jinja"
    if not template.is_file():
        return
    tokenizer = load_tokenizer(directory)
    ends = stop_ids(tokenizer, template.read_text(encoding="utf-8"))
    file = directory / "generation_config.json"
    settings = read_json(file) if file.is_file() else {"bos_token_id": tokenizer.bos_token_id}
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_text(file, json.dumps(settings, indent=2) + "\n")


def _vocabulary(tokenizer: Path, rows: int) -> int | None:
    """Pieces of the merged model's tokenizer. Raises DoesNotFit if the rows do not reach."""
    if not any((tokenizer / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    pieces = len(open_readers(tokenizer)[0].pieces)
    if pieces > rows:
        raise DoesNotFit(
            f"The tokenizer in {tokenizer} has {pieces:,} pieces, the merged model {rows:,} rows."
        )
    return pieces


def _checked(name: str, change: Change) -> Change:
    """`change`, refusing values that its dtype cannot hold."""

    def make() -> torch.Tensor:
        merged = change.make()
        if not torch.isfinite(merged).all():
            raise UserError(
                f"{name} overflows {change.dtype} when merged; the base or an adapter is damaged."
            )
        return merged

    return Change(change.shape, change.dtype, make)


def _card(base: Path, adapters: list[Adapter]) -> str:
    lines: list[Any] = [f"# {base.name} + {' + '.join(a.name for a in adapters)}", ""]
    lines += ["Merged by `chinese-llama merge` from, in this order:", "", f"- base `{base}`"]
    lines += [
        f"- adapter `{a.name}` (r={a.config.get('r')}, lora_alpha={a.config.get('lora_alpha')})"
        for a in adapters
    ]
    return "\n".join([*lines, "", "Hashes: `chinese_llama.json`.", ""])
