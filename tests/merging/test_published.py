"""The published bases and adapters: their order, and by which of their files they are known."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from chinese_llama.artifacts import identity
from chinese_llama.merging import registry as known
from chinese_llama.merging.adapter import Step, load
from chinese_llama.merging.lineage import check_lineage
from tests.merging.making import (
    ALPACA_PLUS,
    LLAMA_7B,
    PLUS,
    PRO,
    final,
    loaded,
    make,
    merged,
    published,
    soft,
    write_base,
    write_tokenizer,
)


def test_the_published_order(llama: Path, tmp_path: Path) -> None:
    plus, alpaca, pro = (published(tmp_path, name) for name in (PLUS, ALPACA_PLUS, PRO))
    assert check_lineage(llama, [plus, alpaca]) == []
    assert check_lineage(llama, [plus, pro]) == []
    assert check_lineage(llama, [Step([plus]), Step([alpaca, pro], "ties", 0.5)]) == []
    soft(llama, [alpaca], f"'{ALPACA_PLUS}' must be merged after {PLUS}: --loras {PLUS},{ALPACA_PLUS}")
    soft(llama, [plus, alpaca, pro], f"'{PRO}' must be merged after {PLUS}: --loras {PLUS},{PRO}")
    final(
        llama,
        [alpaca, plus],
        f"'{PLUS}' has 49,953 .*49,954, and a .* never shrinks: --loras {PLUS},{ALPACA_PLUS}",
    )
    final(llama, [Step([plus, alpaca], "linear")], "49,953 rows .* 49,954: .* cannot be combined in one step")


def test_the_first_alpaca_goes_into_bare_llama(llama: Path, tmp_path: Path) -> None:
    old, alpaca = (published(tmp_path, name) for name in ("chinese-llama-7b", "chinese-alpaca-7b"))
    assert check_lineage(llama, [old]) == []
    assert check_lineage(llama, [alpaca]) == []
    soft(llama, [old, alpaca], r"'chinese-alpaca-7b' must be merged first: --loras chinese-alpaca-7b;?")
    final(llama, [alpaca, old], "never shrinks: --loras chinese-alpaca-7b.$")
    pro = published(tmp_path, PRO)
    soft(llama, [old, pro], f"'{PRO}' must be merged after {PLUS}: --loras {PLUS},{PRO}")


def test_a_name_stands_for_a_published_adapter_below(llama: Path, tmp_path: Path) -> None:
    """A copy as .safetensors has no published hash; its name in --loras NAME=directory is taken."""
    alpaca = published(tmp_path, ALPACA_PLUS)
    assert check_lineage(llama, [load(PLUS, make(tmp_path / "copy")), alpaca]) == []
    soft(llama, [load("plus", tmp_path / "copy"), alpaca], f"must be merged after {PLUS}")
    alpaca.name = "mine"
    assert check_lineage(llama, [published(tmp_path, PLUS), alpaca]) == []


def test_a_published_adapter_goes_on_a_base_with_its_parents_in_it(llama: Path, tmp_path: Path) -> None:
    plus, alpaca = published(tmp_path, PLUS), published(tmp_path, ALPACA_PLUS)
    once = merged(tmp_path / "once", llama, [plus])
    (once / "config.json").write_text(json.dumps({**LLAMA_7B, "vocab_size": 49953}))
    assert check_lineage(once, [alpaca]) == []
    stranger = write_base(tmp_path / "stranger", **{**LLAMA_7B, "vocab_size": 49953})
    soft(
        stranger,
        [alpaca],
        rf"{PLUS},{ALPACA_PLUS} \(unless {stranger}, with its 49,953 rows, has {PLUS} in it\)",
    )
    done = write_base(tmp_path / "done", **{**LLAMA_7B, "vocab_size": 49954})
    final(
        done,
        [plus, alpaca],
        f"{done} has 49,954 rows of vocabulary, the adapter '{PLUS}' 49,953, .*LLaMA-7B itself",
    )


@pytest.mark.parametrize(
    "names", [("hidden_size", "num_hidden_layers", "config.json"), ("dim", "n_layers", "params.json")]
)
def test_a_base_of_another_size_is_refused(tmp_path: Path, names: tuple[str, str, str]) -> None:
    hidden, layers, file = names
    adapter = published(tmp_path, "chinese-alpaca-13b")
    base = tmp_path / "base"
    base.mkdir()
    (base / file).write_text(json.dumps({hidden: 4096, layers: 32}))
    final(
        base,
        [adapter],
        rf"^chinese-alpaca-13b is for LLaMA-13B \(hidden size 5120, 40 layers\); {base} has 4096 and 32\.$",
    )
    (base / file).write_text(json.dumps({hidden: 5120, layers: 40, "vocab_size": -1}))
    assert check_lineage(base, [adapter]) == []


def test_adapters_of_two_sizes_do_not_go_together(llama: Path, tmp_path: Path) -> None:
    adapters = [published(tmp_path, PLUS), published(tmp_path, "chinese-alpaca-plus-13b")]
    final(llama, adapters, "chinese-alpaca-plus-13b is for LLaMA-13B")


def test_llama_2_is_no_llama(tmp_path: Path) -> None:
    base = write_base(tmp_path / "llama2", **{**LLAMA_7B, "rms_norm_eps": 1e-5})
    soft(
        base,
        [published(tmp_path, PLUS)],
        r"another model of that size \(rms_norm_eps 1e-05 instead of 1e-06: Llama 2\?\)",
    )


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("meta", ["consolidated.00.pth", "consolidated.01.pth"]),
        ("huggingface", ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
    ],
)
def test_the_base_is_told_by_its_published_files(tmp_path: Path, kind: str, files: list[str]) -> None:
    base, adapter = write_base(tmp_path / "base"), published(tmp_path, "chinese-llama-13b")
    assert adapter.published
    for file in files:
        (base / file).write_bytes(file.encode())
    hashes = tuple(identity(base / file) for file in files)
    bases = dataclasses.replace(adapter.published.base, **{kind: hashes})
    adapter.published = dataclasses.replace(adapter.published, base=bases)
    assert check_lineage(base, [adapter]) == []
    (base / files[1]).write_bytes(b"other bytes")
    soft(base, [adapter], rf"{base} is not LLaMA-13B as it is published: {files[1]} has another sha256")
    (base / files[0]).write_bytes(b"others still")
    soft(base, [adapter], rf"{files[0]}, {files[1]} have another sha256")
    (base / files[1]).unlink()  # another number of files: another conversion
    assert check_lineage(base, [adapter]) == []


def test_files_that_are_not_read_are_not_hashed(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), published(tmp_path, PLUS)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "model.safetensors"):
        (base / name).write_bytes(b"x")
    assert check_lineage(base, [adapter]) == []


def test_a_damaged_published_file_is_told(llama: Path, tmp_path: Path) -> None:
    adapter = published(tmp_path, PLUS)
    (adapter.path / "adapter_model.safetensors").rename(adapter.path / "adapter_model.bin")
    soft(
        llama,
        [adapter],
        r"adapter_model\.bin is not the published chinese-llama-plus-7b \(.*8c928db86b2a.*fetch it again",
    )
    assert adapter.published
    adapter.published = dataclasses.replace(adapter.published, sha256=identity(adapter.file))
    assert check_lineage(llama, [adapter]) == []


def test_a_published_file_under_another_name_is_checked(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is known by its hash."""
    place = make(tmp_path / "mine")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    entry = dataclasses.replace(known.registry().adapters[PRO], sha256=identity(place / "adapter_model.bin"))
    monkeypatch.setattr(
        "chinese_llama.merging.adapter.registry", lambda: known.Registry(adapters={PRO: entry})
    )
    soft(llama, loaded(place), f"'mine' must be merged after {PLUS}: --loras {PLUS},mine")


def test_the_tokenizer_beside_a_published_adapter_is_its_own(llama: Path, tmp_path: Path) -> None:
    adapter = published(tmp_path, "chinese-alpaca-7b")
    write_tokenizer(adapter.path, 49953)
    final(
        llama,
        [adapter],
        rf"'chinese-alpaca-7b' is an adapter of 49,954 pieces, and the tokenizer in {adapter.path} has 49,953: put "
        "the tokenizer of Chinese-Alpaca there, of 49,954 pieces",
    )
    write_tokenizer(adapter.path, 49954)
    soft(
        llama,
        [adapter],
        r"tokenizer\.model is not the published tokenizer of Chinese-Alpaca \(another sha256\)",
    )
    words = dataclasses.replace(
        adapter.published.tokenizer, sha256=identity(adapter.path / "tokenizer.model")
    )
    adapter.published = dataclasses.replace(adapter.published, tokenizer=words)
    assert check_lineage(llama, [adapter]) == []


def test_a_tokenizer_json_beside_it_counts(llama: Path, tokenizer: Path, tmp_path: Path) -> None:
    adapter = published(tmp_path, "chinese-alpaca-7b")
    shutil.copy(tokenizer / "tokenizer.json", adapter.path)
    final(llama, [adapter], "the tokenizer in .* has [0-9]{3}: put")
    pieces = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    words = dataclasses.replace(adapter.published.tokenizer, pieces=pieces)
    adapter.published = dataclasses.replace(adapter.published, tokenizer=words)
    (llama / "config.json").write_text("{}")
    assert check_lineage(llama, [adapter]) == []
