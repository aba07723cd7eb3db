"""Whether a base and adapters belong together: what is refused, in which words, and what --force overrules."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chinese_llama.artifacts import Manifest, input_record, write_manifest
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.adapter import Step
from chinese_llama.merging.lineage import check_base, check_lineage
from tests.merging.making import (
    PLUS,
    final,
    loaded,
    make,
    merged,
    published,
    soft,
    write_base,
)


@pytest.fixture
def chain(base: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three adapters, each trained on top of those before it."""
    plus = make(tmp_path / "plus", base)
    alpaca = make(tmp_path / "alpaca", base, [plus])
    return plus, alpaca, make(tmp_path / "pro", base, [plus, alpaca])


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
