"""Adapter directories for the tests of what is settled before a tensor is read."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from chinese_llama.artifacts import Manifest, input_record, write_manifest
from chinese_llama.errors import DoesNotFit
from chinese_llama.merging.adapter import Adapter, Step, load
from chinese_llama.merging.lineage import FORCE, check_lineage
from chinese_llama.merging.registry import registry


def make(
    place: Path,
    base: Path | None = None,
    below: list[Path] | None = None,
    tag: float = 0.0,
    vocab_size: int | None = None,
    **config: Any,
) -> Path:
    """An adapter directory; with `base`, as the recipes write its manifest."""
    place.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "name": place.name, **config}
    (place / "adapter_config.json").write_text(json.dumps(content))
    save_file({"x": torch.full((1,), tag)}, place / "adapter_model.safetensors")
    if base is not None:
        inputs = {"base": input_record(base), "tokenizer": {"path": "t", "sha256": ""}}
        inputs |= {f"parent:{i}": input_record(path) for i, path in enumerate(below or [])}
        write_manifest(place, Manifest("adapter", "pt_lora", inputs, vocab_size=vocab_size))
    return place


def loaded(*places: Path) -> list[Adapter]:
    return [load(place.name, place) for place in places]


def published(place: Path, name: str) -> Adapter:
    """A small adapter that is said to be the published one called `name`."""
    adapter = load(name, make(place / name, tag=len(name) + sum(map(ord, name))))
    adapter.published = registry().adapters[name]
    return adapter


def write_base(place: Path, **config: Any) -> Path:
    """A base of which only the configuration is there."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


def write_tokenizer(place: Path, pieces: int) -> Path:
    """A tokenizer.model of so many pieces."""
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=16,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    proto = model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    for number in range(len(proto.pieces), pieces):
        proto.pieces.add(piece=f"piece{number}", score=-float(number))
    (place / "tokenizer.model").write_bytes(proto.SerializeToString())
    return place


LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000}
PLUS, ALPACA_PLUS, PRO = "chinese-llama-plus-7b", "chinese-alpaca-plus-7b", "chinese-alpaca-pro-7b"


def merged(place: Path, base: Path, adapters: list[Adapter], tag: float = 9.0) -> Path:
    """What `merge` leaves, as far as the lineage goes."""
    place.mkdir()
    save_file({"x": torch.full((1,), tag)}, place / "model.safetensors")
    inputs = {"base": input_record(base)}
    inputs |= {f"adapter:{i}": input_record(adapter.path) for i, adapter in enumerate(adapters)}
    made = Manifest("model", "merge", inputs, {"loras": [adapter.name for adapter in adapters]})
    write_manifest(place, made)
    return place


def final(base: Path, adapters: list[Adapter] | list[Step], told: str) -> None:
    """It is refused in these words, whatever --force says."""
    for forced in (False, True):
        with pytest.raises(DoesNotFit, match=told) as caught:
            check_lineage(base, adapters, forced)
        assert FORCE not in str(caught.value)
        assert str(caught.value).endswith(".")


def soft(base: Path, adapters: list[Adapter] | list[Step], *told: str) -> None:
    """It is refused in the first of these words, and all of them are told if --force overrules them."""
    with pytest.raises(DoesNotFit, match=told[0]) as caught:
        check_lineage(base, adapters)
    assert str(caught.value).endswith(f"; {FORCE}")
    sentences = check_lineage(base, adapters, True)
    assert len(sentences) == len(told), sentences
    for sentence, words in zip(sentences, told, strict=True):
        assert re.search(words, sentence), (words, sentence)
        assert sentence.endswith(".")
        assert FORCE not in sentence
