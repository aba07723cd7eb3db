"""What does not fit is refused before anything is computed, and the sentence says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.plan import Adapter, Step
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.shards import EMBED, HEAD, Weights
from tests.merging.tensors import lora, write_adapter

ROWS, HIDDEN = 10, 8
Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
DELTA = ".trainable_tokens_delta"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tensors of a LLaMA of two layers; `tied`: without a head of its own."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for kind in ("plain", "tied"):
        state = {EMBED: torch.ones(ROWS, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
        for layer in (0, 1):
            state |= {Q.format(layer): torch.ones(HIDDEN, HIDDEN), UP.format(layer): torch.ones(16, HIDDEN)}
        if kind == "plain":
            state[HEAD] = torch.ones(ROWS, HIDDEN)
        found[kind] = folder / kind
        found[kind].mkdir()
        save_file(state, found[kind] / "model.safetensors")
        (found[kind] / "config.json").write_text(json.dumps({"tie_word_embeddings": kind == "tied"}))
    return found


def fit(base: Path, *steps: Step | Adapter) -> int:
    plan = [step if isinstance(step, Step) else Step([step]) for step in steps]
    return check_fit(Weights(base), base, load_steps(plan))


def whole(rows: int, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(rows, HIDDEN) for name in names or (EMBED, HEAD)}


def single(ids: list[int], *names: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stems = [name.removesuffix(".weight") for name in names or (EMBED, HEAD)]
    tensors = {stem + DELTA: torch.ones(len(ids), HIDDEN) for stem in stems}
    return tensors, {"trainable_token_indices": {stem.rpartition(".")[2]: ids for stem in stems}}


def both(weight: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return lora(weight, (rows, columns))


def test_what_fits_tells_the_rows_of_the_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["plain"]
    grown = write_adapter(tmp_path / "grown", whole(14) | both(HEAD, 14, HIDDEN))
    rows, config = single([13, 2])
    assert fit(base, write_adapter(tmp_path / "q", both(Q.format(0), HIDDEN, HIDDEN))) == ROWS
    assert fit(base, grown) == 14
    assert fit(base, grown, write_adapter(tmp_path / "rows", rows, **config)) == 14
    assert fit(base, write_adapter(tmp_path / "r", *[single([2, 9])[0]], **single([2, 9])[1])) == ROWS
    small = write_adapter(tmp_path / "small", both(HEAD, ROWS, HIDDEN))
    assert fit(base, small, grown) == 14
    assert fit(base, Step([grown, write_adapter(tmp_path / "g", whole(14))], "linear")) == 14
    assert fit(bases["tied"], write_adapter(tmp_path / "t", whole(12, EMBED), ensure_weight_tying=True)) == 12


def test_a_vocabulary_that_shrinks_and_the_order_that_is_right(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    sizes = {"tiny": 11, "small": 12, "large": 15}
    given = {name: write_adapter(tmp_path / name, whole(rows)) for name, rows in sizes.items()}
    plain = write_adapter(tmp_path / "plain", both(Q.format(0), HIDDEN, HIDDEN))
    with pytest.raises(
        DoesNotFit,
        match=r"^The adapter 'tiny' has 11 embedding rows, what lies below it 15: a vocabulary never shrinks; "
        r"the order is --loras plain,tiny,small,large\.$",
    ):
        fit(bases["plain"], given["large"], given["tiny"], plain, given["small"])
    lone = write_adapter(tmp_path / "lone", whole(9))
    with pytest.raises(
        DoesNotFit,
        match=r"'lone' has 9 embedding rows, what lies below it 10: a vocabulary never shrinks; merge it into the "
        r"base that it was trained on\.$",
    ):
        fit(bases["plain"], lone)
    assert fit(bases["plain"], *(given[name] for name in sizes)) == 15


def test_siblings_must_all_bring_the_new_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    grown = write_adapter(tmp_path / "grown", whole(14))
    told = r"must all bring the 14 rows of the larger vocabulary, and 'other' does not; merge the one that grows it first"
    rows, config = single([13])
    for number, (tensors, more) in enumerate(
        [
            (both(Q.format(0), HIDDEN, HIDDEN), {}),
            (whole(12), {}),
            (whole(14, EMBED), {}),
            (whole(14, EMBED) | whole(12, HEAD), {}),
            (rows, config),
        ]
    ):
        other = write_adapter(tmp_path / str(number) / "other", tensors, **more)
        for method in ("linear", "ties"):
            with pytest.raises(DoesNotFit, match=told):
                fit(bases["plain"], Step([grown, other], method, 0.5))
    late = write_adapter(tmp_path / "late", both(Q.format(0), HIDDEN, HIDDEN))
    assert fit(bases["plain"], grown, Step([late, other], "ties", 0.5)) == 14


def test_siblings_of_a_tied_base_bring_the_embeddings(bases: dict[str, Path], tmp_path: Path) -> None:
    pair = [write_adapter(tmp_path / name, whole(12, EMBED), ensure_weight_tying=True) for name in "ab"]
    assert fit(bases["tied"], Step(pair, "linear")) == 12


@pytest.mark.parametrize(("weights", "fine"), [((1, -1), False), ((0.5, -1), False), ((2, -1), True)])
def test_new_rows_need_a_mean(
    bases: dict[str, Path], tmp_path: Path, weights: tuple[float, float], fine: bool
) -> None:
    step = Step([write_adapter(tmp_path / str(w), whole(12), w) for w in weights], "linear")
    old = Step([write_adapter(tmp_path / f"old{w}", whole(ROWS), w) for w in weights], "linear")
    assert fit(bases["plain"], old) == ROWS
    if fine:
        assert fit(bases["plain"], step) == 12
        return
    with pytest.raises(DoesNotFit, match=r"combined and bring new rows must add up to more than 0"):
        fit(bases["plain"], step)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model.layers.4.x.weight": torch.ones(2)}, "'bad' changes model.layers.4.x.weight, which .*plain does"),
        (both(UP.format(0), 16, 9), r"has \(16, 9\) for model.layers.0.mlp.up_proj.weight, the base \(16, 8\)"),
        (both(UP.format(0), 17, 8), r"has \(17, 8\) for model.layers.0.mlp.up_proj.weight, the base \(16, 8\)"),
        (both("model.norm.weight", 8, 8), r"has \(8, 8\) for model.norm.weight, the base \(8,\)"),
        (both(HEAD, 9, 8), r"has \(9, 8\) for lm_head.weight, the base \(10, 8\)"),
        # rows that nothing gives the model: they would be left out
        (both(HEAD, 12, 8), r"has \(12, 8\) for lm_head.weight, the base \(10, 8\)"),
        (both(EMBED, 12, 8), r"has \(12, 8\) for model.embed_tokens.weight, the base \(10, 8\)"),
        ({"model.norm.weight": torch.ones(9)}, r"another shape for model.norm.weight \(\(9,\)\) than .*\(\(8,\)\)"),
        ({UP.format(1): torch.ones(17, 8)}, r"another shape for model.layers.1.mlp.up_proj.weight"),
        ({HEAD: torch.ones(10, 7)}, "has 7 columns in lm_head.weight, the base 8"),
        ({EMBED: torch.ones(80)}, r"another shape for model.embed_tokens.weight \(\(80,\)\)"),
        ({HEAD: torch.ones(10, 8, 1)}, r"another shape for lm_head.weight"),
        ({EMBED: torch.ones(12, 8)}, "lm_head.weight must grow to 12 rows, but no adapter has 2 of them"),
        ({HEAD: torch.ones(12, 8)}, "model.embed_tokens.weight must grow to 12 rows, but no .* has 2 of them"),
    ],
)  # fmt: skip
def test_a_tensor_without_its_place(
    bases: dict[str, Path], tmp_path: Path, tensors: dict[str, torch.Tensor], told: str
) -> None:
    with pytest.raises(DoesNotFit, match=told):
        fit(bases["plain"], write_adapter(tmp_path / "bad", tensors))


@pytest.mark.parametrize(
    ("tensor", "ids", "told"),
    [
        (torch.ones(3, HIDDEN), [1, 2], "'bad': the rows for model.embed_tokens.weight do not fit the base"),
        (torch.ones(2, HIDDEN + 1), [1, 2], "'bad': the rows for model.embed_tokens.weight do not fit"),
        (
            torch.ones(1, HIDDEN),
            [12],
            "model.embed_tokens.weight must grow to 13 rows, but no adapter has 2 of",
        ),
    ],
)
def test_single_rows_that_do_not_fit(
    bases: dict[str, Path], tmp_path: Path, tensor: torch.Tensor, ids: list[int], told: str
) -> None:
    key = EMBED.removesuffix(".weight") + DELTA
    with pytest.raises(DoesNotFit, match=told):
        fit(bases["plain"], write_adapter(tmp_path / "bad", {key: tensor}, trainable_token_indices=ids))


@pytest.mark.parametrize(
    ("tensors", "config", "fine"),
    [
        (whole(ROWS), {}, True),
        ({EMBED: torch.ones(ROWS, HIDDEN), HEAD: torch.zeros(ROWS, HIDDEN)}, {}, False),
        (whole(ROWS, HEAD), {}, False),
        (both(HEAD, ROWS, HIDDEN), {}, False),
        (*single([3, 1]), True),
        (*single([3, 1], HEAD), False),
        (single([3])[0], {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [2]}}, False),
        (
            {k: v * (2 if "head" in k else 1) for k, v in single([3])[0].items()},
            {"trainable_token_indices": [3]},
            False,
        ),
    ],
)
def test_on_a_tied_base_the_head_must_be_the_embeddings(
    bases: dict[str, Path],
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    fine: bool,
) -> None:
    adapter = write_adapter(tmp_path / "a", tensors, **config)
    if fine:
        assert fit(bases["tied"], adapter) == ROWS
        return
    with pytest.raises(
        DoesNotFit, match=r"'a' has an lm_head of its own, but .*tied ties it to the embeddings"
    ):
        fit(bases["tied"], adapter)


def test_a_file_that_lost_tensors_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """A merge of it would go through and babble."""
    base, one = bases["plain"], both(Q.format(0), HIDDEN, HIDDEN)
    two = one | both(Q.format(1), HIDDEN, HIDDEN)
    listed = {"target_modules": ["q_proj"]}
    assert fit(base, write_adapter(tmp_path / "fine", two, **listed)) == ROWS
    with pytest.raises(BadFile, match=r"no tensors for model.layers.1.self_attn.q_proj, which .* target_mod"):
        fit(base, write_adapter(tmp_path / "layer", one, **listed))
    for number, config in enumerate(({"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.q_proj"]})):
        assert fit(base, write_adapter(tmp_path / f"ok{number}", one, **listed, **config)) == ROWS
    with pytest.raises(
        BadFile, match=r"no tensors for up_proj, which .* lists in target_modules; the file is"
    ):
        fit(base, write_adapter(tmp_path / "module", two, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(BadFile, match=r"no tensors for embed_tokens, which .* lists in modules_to_save"):
        fit(base, write_adapter(tmp_path / "saved", two, modules_to_save=["embed_tokens"]))
    with pytest.raises(BadFile, match=r"has no rows for trainable_token_indices of adapter_config.json"):
        fit(base, write_adapter(tmp_path / "rows", two, trainable_token_indices=[3]))
    assert fit(base, write_adapter(tmp_path / "regex", one, target_modules=".*q_proj")) == ROWS
    assert fit(base, write_adapter(tmp_path / "none", two, target_modules=["q_proj", "nowhere"])) == ROWS


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_embeddings_trained_apart_do_not_go_into_a_tied_base(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """PEFT trains them beside the old output, which a tied model has no place for."""
    tensors = whole(ROWS, EMBED) if kind == "whole" else both(EMBED, ROWS, HIDDEN)
    with pytest.raises(DoesNotFit, match=r"changes the embeddings and not lm_head, but .* ties them"):
        fit(bases["tied"], write_adapter(tmp_path / "a", tensors))
    assert fit(bases["tied"], write_adapter(tmp_path / "b", tensors, ensure_weight_tying=True)) == ROWS


def test_a_base_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "gpt"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"transformer.wte.weight": torch.ones(4, 4)}, base / "model.safetensors")
    with pytest.raises(DoesNotFit, match=r"gpt has no tensor model.embed_tokens.weight; adapters are merged"):
        fit(base, write_adapter(tmp_path / "a", both(Q.format(0), HIDDEN, HIDDEN)))


def test_a_quantised_weight_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["plain"], tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held[Q.format(0)] = held[Q.format(0)].to(torch.int8)
    save_file(held, base / "model.safetensors")
    with pytest.raises(DoesNotFit, match=r"q_proj.weight, which is torch.int8 in .*; give the model before"):
        fit(base, write_adapter(tmp_path / "a", both(Q.format(0), HIDDEN, HIDDEN)))


def test_a_base_that_lacks_layers_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["plain"], tmp_path / "base")
    (base / "config.json").write_text('{"num_hidden_layers": 3}')
    with pytest.raises(
        DoesNotFit, match=r"config.json says 3 layers, and the weights are of 2; the copy is not whole"
    ):
        fit(base, write_adapter(tmp_path / "a", both(Q.format(0), HIDDEN, HIDDEN)))
