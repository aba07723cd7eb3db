"""Whether a base and adapters belong together: what is refused, in which words, and what --force overrules."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chinese_llama.artifacts import Manifest, identity, input_record, write_manifest
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging import registry as known
from chinese_llama.merging.adapter import Adapter, Step, load
from chinese_llama.merging.lineage import FORCE, check_base, check_lineage
from tests.merging.making import loaded, make, published, write_base, write_tokenizer

LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000}
PLUS, ALPACA_PLUS, PRO = "chinese-llama-plus-7b", "chinese-alpaca-plus-7b", "chinese-alpaca-pro-7b"


@pytest.fixture
def chain(base: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three adapters, each trained on top of those before it."""
    plus = make(tmp_path / "plus", base)
    alpaca = make(tmp_path / "alpaca", base, [plus])
    return plus, alpaca, make(tmp_path / "pro", base, [plus, alpaca])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_base(tmp_path / "llama", **LLAMA_7B)


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


def test_the_order_of_training_is_accepted(base: Path, chain: tuple[Path, Path, Path]) -> None:
    for count in (1, 2, 3):
        assert check_lineage(base, loaded(*chain[:count])) == []
        assert check_lineage(base, [Step([adapter]) for adapter in loaded(*chain[:count])], True) == []


def test_ten_parents_keep_their_order(base: Path, tmp_path: Path) -> None:
    places: list[Path] = []
    for number in range(12):
        places.append(make(tmp_path / f"a{number}", base, list(places)))
    assert check_lineage(base, loaded(*places)) == []
    once = merged(tmp_path / "once", base, loaded(*places[:-1]))
    assert check_lineage(once, loaded(places[-1])) == []


def test_another_order_names_the_right_one(base: Path, chain: tuple[Path, Path, Path]) -> None:
    plus, alpaca, pro = chain
    bare = "'plus' was trained on the bare base; it must come first in --loras, or be combined"
    soft(base, loaded(alpaca, plus), r"'alpaca' was trained on top of plus, .*--loras plus,alpaca", bare)
    soft(base, loaded(alpaca), r"'alpaca' was trained on top of .*plus, and must be merged right after: ")
    soft(base, loaded(plus, pro), r"'pro' was trained on top of plus, .*alpaca, .*--loras plus,.*alpaca,pro")
    other = make(plus.parent / "other", base, tag=1.0)
    soft(base, loaded(plus, other), "'other' was trained on the bare base; it must come first")


def test_only_the_beginning_of_the_order_is_accepted(base: Path, chain: tuple[Path, Path, Path]) -> None:
    """Of all lists of a chain's adapters, those are accepted that are its beginning."""
    for count in (1, 2, 3):
        for chosen in itertools.permutations(chain, count):
            findings = check_lineage(base, loaded(*chosen), True)
            assert (findings == []) == (chosen == chain[:count]), chosen


def test_an_adapter_given_twice_is_refused(
    base: Path, chain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(chain[0], tmp_path / "copy")
    final(base, loaded(chain[0], copy), "The adapters 'plus' and 'copy' are the same one")
    final(base, [Step(loaded(chain[0], copy), "linear")], "'plus' and 'copy' are the same one")
    same = loaded(chain[0])[0]
    final(base, [Step([same]), Step([same])], "'plus' and 'plus' are the same one")


def test_another_base_is_refused(base: Path, extended: Path, chain: tuple[Path, Path, Path]) -> None:
    soft(extended, loaded(chain[0]), f"'plus' was trained on another base \\({base}\\), not on {extended}")
    soft(extended, loaded(chain[1]), "'alpaca' was trained on another base", "'alpaca' was trained on top of")


def test_what_lies_below_must_be_the_very_adapter(base: Path, chain: tuple[Path, Path, Path]) -> None:
    plus, alpaca, _ = chain
    save_file({"x": torch.ones(1)}, plus / "adapter_model.safetensors")
    soft(base, loaded(plus, alpaca), "'alpaca' was trained on top of")


def test_without_manifests_any_order_is_taken(base: Path, tmp_path: Path) -> None:
    assert check_lineage(base, loaded(make(tmp_path / "b", tag=1.0), make(tmp_path / "a"))) == []


def test_a_base_that_was_given_as_a_hub_id_is_not_held_against_the_adapter(
    base: Path, tmp_path: Path
) -> None:
    """The recipes record such a base without a hash; then its hash is unknown, not different."""
    place = make(tmp_path / "plus")
    inputs = {"base": {"path": "someone/base", "sha256": ""}, "tokenizer": {"path": "t", "sha256": ""}}
    write_manifest(place, Manifest("adapter", "pt_lora", inputs))
    assert check_lineage(base, loaded(place)) == []
    above = make(tmp_path / "above")
    inputs = {"parent:0": input_record(place)}
    write_manifest(above, Manifest("adapter", "sft_lora", inputs))
    assert check_lineage(base, loaded(place, above)) == [], "no base is recorded at all"


def test_siblings_share_what_lies_below_their_step(
    base: Path, chain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plus, alpaca, pro = chain
    other = make(tmp_path / "other", base, [plus], tag=1.0)
    first, *pair = loaded(plus, alpaca, other)
    assert check_lineage(base, [Step([first]), Step(pair, "linear")]) == []
    soft(base, loaded(plus, alpaca, other), r"'other' was trained on top of plus, .*--loras plus,other")
    soft(
        base,
        [Step([first]), Step(loaded(alpaca, pro), "ties", 0.5)],
        r"'pro' was trained on top of plus, alpaca, and cannot be combined with 'alpaca' in one step: "
        "--loras plus,alpaca,pro",
    )
    bare = loaded(plus, make(tmp_path / "bare", base, tag=2.0))
    assert check_lineage(base, [Step(bare, "dare_linear", 0.5)]) == []


def test_a_base_that_merge_made_counts_with_what_is_in_it(
    base: Path, chain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plus, alpaca, pro = loaded(*chain)
    once = merged(tmp_path / "once", base, [plus])
    assert check_lineage(once, [alpaca, pro]) == []
    soft(once, [pro], "'pro' was trained on top of")
    final(once, [plus, alpaca], f"'plus' is merged into {once} already \\(as 'plus'\\)")
    twice = merged(tmp_path / "twice", once, [alpaca], 8.0)
    assert check_lineage(twice, [pro]) == []
    final(twice, [plus], "'plus' is merged into .*twice already")
    beside = make(tmp_path / "beside", base, tag=3.0)
    soft(once, loaded(beside), "'beside' was trained on the bare base; it must come first")
    on_top = make(tmp_path / "on_top", once)  # trained on the merged model itself
    assert check_lineage(once, loaded(on_top)) == []
    save_file({"x": torch.ones(1)}, once / "model.safetensors")  # no longer what twice was made from
    soft(twice, [pro], "'pro' was trained on another base", "'pro' was trained on top of")


def test_names_of_a_merged_base_are_optional(base: Path, tmp_path: Path) -> None:
    """Another version of the tool may have recorded its plan in another way."""
    (plus,) = loaded(make(tmp_path / "plus"))
    once = merged(tmp_path / "once", base, [plus])
    manifest = json.loads((once / "chinese_llama.json").read_text())
    manifest["settings"] = {}
    (once / "chinese_llama.json").write_text(json.dumps(manifest))
    final(once, [plus], r"already \(as 'plus'\)")


def test_a_vocabulary_never_shrinks(base: Path, tmp_path: Path) -> None:
    small, large, unknown = loaded(
        make(tmp_path / "small", base, vocab_size=500),
        make(tmp_path / "large", base, vocab_size=501, tag=1.0),
        make(tmp_path / "unknown", tag=2.0),
    )
    final(
        base,
        [large, unknown, small],
        "'small' has 500 rows of vocabulary, 'large' below it 501, and a vocabulary never shrinks: "
        "--loras small,large",
    )
    final(
        base, [Step([small, large], "linear")], "'small' has 500 rows .* 'large' 501: .* cannot be combined"
    )
    assert all("vocabulary" not in told for told in check_lineage(base, [small, unknown, large], True))


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


def test_what_is_final_comes_before_what_may_be_forced(llama: Path, tmp_path: Path) -> None:
    """Nobody is sent to --force in vain."""
    plus, alpaca = published(tmp_path, PLUS), published(tmp_path, "chinese-alpaca-plus-13b")
    final(llama, [alpaca, plus], "never shrinks|is for LLaMA-13B")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"is quantised \(gptq in its config\.json\), and",
        ),
        ({"quantization_config": {"bits": 4}}, r"is quantised \(quantization_config in its config\.json\)"),
        (
            {"quantization_config": "awq"},
            r"is quantised \(quantization_config in .*give the model that it was",
        ),
    ],
)
def test_a_quantised_base_is_refused(tmp_path: Path, config: dict[str, object], told: str) -> None:
    with pytest.raises(DoesNotFit, match=told):
        check_base(write_base(tmp_path / "base", **config))


def test_plain_bases_are_taken(base: Path, tmp_path: Path) -> None:
    check_base(base)
    check_base(write_base(tmp_path / "plain", quantization_config=None))
    check_base(tmp_path)  # no configuration at all: whoever reads the weights will say so


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_configuration_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadFile, match=r"config\.json: (is not valid JSON|must hold a JSON object)"):
        check_base(tmp_path)
