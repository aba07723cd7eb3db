"""What is published: every adapter, its base, and hashes that can be hashes."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from chinese_llama.config import load_yaml
from chinese_llama.hub import HUB_ID
from chinese_llama.merging.registry import Base, Published, registry
from chinese_llama.resources import shipped

SIZES = ("7b", "13b", "33b")
SHA256 = re.compile("[0-9a-f]{64}")


def test_the_families_are_whole() -> None:
    """Base, Plus and Pro at each size: what goes below them, and how many pieces they have."""
    after = {
        "chinese-llama": None,
        "chinese-alpaca": None,
        "chinese-llama-plus": None,
        "chinese-alpaca-plus": "chinese-llama-plus",
        "chinese-alpaca-pro": "chinese-llama-plus",
    }
    assert set(registry().adapters) == {f"{family}-{size}" for family in after for size in SIZES}
    for family, below in after.items():
        for size in SIZES:
            entry = registry().adapters[f"{family}-{size}"]
            assert entry.hub == f"hfl/{family}-lora-{size}"
            assert HUB_ID.fullmatch(entry.hub)
            assert entry.base.name == f"LLaMA-{size.upper()}"
            assert entry.after == ((f"{below}-{size}",) if below else ())
            assert entry.tokenizer.pieces == (49953 if "llama" in family else 49954)


def test_the_bases_are_those_of_the_paper() -> None:
    """Hidden size, layers, and the files that Meta published (Touvron et al. 2023, arXiv 2302.13971)."""
    told = {name: (b.hidden_size, b.layers, len(b.meta)) for name, b in registry().bases.items()}
    assert told == {"LLaMA-7B": (4096, 32, 1), "LLaMA-13B": (5120, 40, 2), "LLaMA-33B": (6656, 60, 4)}
    assert {base.tokenizer.pieces for base in registry().bases.values()} == {32000}


def test_each_hash_stands_once() -> None:
    hashes = [entry.sha256 for entry in registry().adapters.values()]
    hashes += [entry.sha256 for entry in registry().tokenizers.values()]
    hashes += [sha for base in registry().bases.values() for sha in (*base.meta, *base.huggingface)]
    assert len(hashes) == 15 + 3 + 7 + 12
    assert len(set(hashes)) == len(hashes)
    assert all(SHA256.fullmatch(sha) for sha in hashes)


def test_an_adapter_is_found_by_name_hub_id_and_hash() -> None:
    entry = registry().adapters["chinese-alpaca-pro-13b"]
    assert registry().adapter("chinese-alpaca-pro-13b") is entry
    assert registry().adapter("hfl/chinese-alpaca-pro-lora-13b") is entry
    assert registry().by_sha256(entry.sha256) is entry
    assert registry().adapter("chinese-llama-pro-13b") is None
    assert registry().by_sha256("0" * 64) is None


@pytest.mark.parametrize(("section", "kind"), [("bases", Base), ("adapters", Published)])
def test_nothing_in_the_file_is_left_unread(section: str, kind: type) -> None:
    content = load_yaml(shipped("merge") / "adapters.yaml")
    assert set(content) == {"bases", "tokenizers", "adapters"}
    names = {field.name for field in fields(kind)} - {"name"}
    assert all(set(entry) == names for entry in content[section].values())
