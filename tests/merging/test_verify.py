"""What was written, read again: a merge that is right passes, one that lost or misplaced anything does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.errors import UserError
from chinese_llama.merging import stream
from chinese_llama.merging.merged import Merged
from chinese_llama.merging.plan import Adapter, Step
from chinese_llama.merging.stream import Options, Work
from chinese_llama.merging.verify import TOKENS, probe, told, verify
from chinese_llama.model.shards import EMBED, HEAD, Workers
from tests import tiny
from tests.merging.tensors import drawn, lora, write_adapter

ROWS, HIDDEN, INNER = 420, 32, 64
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
ALL = {f"model.layers.{i}.{part}.weight": shape for i in (0, 1) for part, shape in SHAPES.items()}
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
DTYPES = ("float32", "float16", "bfloat16")
NEAR = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
FAILED = r"^The merged model is not what it should be: {}; nothing is kept of it\.$"


def everywhere(size: float = 0.1, seed: int = 1, dora: bool = False) -> dict[str, torch.Tensor]:
    """Pairs for all projections; deltas of size 0.1 are about as large as half of the pico weights, 0.2."""
    found = {}
    for number, (name, shape) in enumerate(ALL.items()):
        found |= lora(name, shape, seed=seed + number, size=size / 4, dora=dora)
    return found


def steps(folder: Path, kind: str) -> list[Step]:
    """Adapters of a kind for the pico base."""
    pairs, more = everywhere(dora=kind == "dora"), {}
    if kind == "rslora":
        more = {"use_rslora": True}
    if kind == "rows":
        ids = [3, 419, 7, 300]
        pairs |= {f"{n}.trainable_tokens_delta": drawn(4, HIDDEN) for n in ("model.embed_tokens", "lm_head")}
        more = {"trainable_token_indices": ids}
    if kind == "whole":
        pairs |= {EMBED: drawn(431, HIDDEN, size=0.2), HEAD: drawn(431, HIDDEN, seed=2, size=0.2)}
        pairs |= {"model.norm.weight": drawn(HIDDEN).abs()} | lora(HEAD, (431, HIDDEN), seed=4)
    if kind == "tied":
        pairs |= lora(EMBED, (ROWS, HIDDEN))
        more = {"ensure_weight_tying": True}
    first = write_adapter(folder / "first", pairs, **more)
    if kind == "whole":
        model = tiny.base_tokenizer()
        for number in range(11):
            model.pieces.add(piece=f"<more{number}>", score=-1000.0)
        tiny.write_model(folder / "first" / "tokenizer.model", model)
    second = write_adapter(folder / "second", everywhere(seed=50), 0.7)
    if kind in ("linear", "ties", "dare_ties"):
        return [Step([first, second], kind, 0.5, 3)]
    return [Step([first]), Step([second])]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("tied") / "base", tiny.base_tokenizer(), tied=True)


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Adapter]]:
    """A merge in float16, and its two adapters."""
    folder = tmp_path_factory.mktemp("merged")
    plan = steps(folder, "plain")
    stream.merge(base, plan, folder / "out", Options(dtype="float16"))
    return folder / "out", [step.adapters[0] for step in plan]


def again(base: Path, plan: Sequence[Step], output: Path, dtype: str = "float16") -> dict[str, Any]:
    """Verify what lies in `output`."""
    with Workers(1) as workers:
        return Work(base, plan, Options(dtype=dtype)).verified(output, workers)


def changed(source: Path, output: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model with its tensors changed."""
    shutil.copytree(source, output)
    held = load_file(output / "model.safetensors")
    change(held)
    save_file(held, output / "model.safetensors")
    return output


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("plain", dtype) for dtype in DTYPES),
        *(("whole", dtype) for dtype in DTYPES),
        *((kind, "float16") for kind in ("rslora", "rows", "tied", "linear", "dare_ties")),
        *((kind, "bfloat16") for kind in ("dora", "ties")),
    ],
)
def test_a_merge_that_is_right_passes(base: Path, tied: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    source = tied if kind == "tied" else base
    plan = steps(tmp_path, kind)
    manifest = stream.merge(source, plan, tmp_path / "out", Options(dtype=dtype))
    figures = manifest.metrics["verified"]
    assert figures == again(source, plan, tmp_path / "out", dtype)
    assert figures["tensors"] == len(load_file(tmp_path / "out" / "model.safetensors"))
    found = figures["logits"]
    assert found["tokens"] == TOKENS
    assert found["difference"] < NEAR[dtype] and found["largest"] < 20 * NEAR[dtype]
    assert found["same_next_token"] >= TOKENS - {"float32": 0, "float16": 1, "bfloat16": 4}[dtype]
    if dtype != "float32":
        assert found["difference"] > 1e-5
    assert f"same next token at {found['same_next_token']} of {TOKENS} places" in told(figures)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
def test_an_adapter_that_was_left_out_of_one_matrix_is_noticed(
    base: Path, tmp_path: Path, dtype: str, share: float
) -> None:
    """Deltas of a tenth, a hundredth, a thousandth of the weights; bfloat16 keeps two or three digits."""
    large = write_adapter(tmp_path / "large", everywhere())
    small = lora(Q, ALL[Q], rank=4, seed=9, size=0.05 * share)
    plan = [Step([large]), Step([write_adapter(tmp_path / "small", small)])]
    stream.merge(base, plan[:1], tmp_path / "without", Options(dtype=dtype))
    with pytest.raises(UserError, match=FAILED.format(f"{Q} is further from what base and adapters give .*")):
        again(base, plan, tmp_path / "without", dtype)
    doubled = write_adapter(tmp_path / "doubled", small, 2.0)
    stream.merge(base, [plan[0], Step([doubled])], tmp_path / "double", Options(dtype=dtype))
    with pytest.raises(UserError, match=f"{Q} is further"):
        again(base, plan, tmp_path / "double", dtype)


def test_deltas_that_round_away_are_no_failure(base: Path, tmp_path: Path) -> None:
    """A merge in bfloat16 of a base in bfloat16 keeps nothing of a small delta, and that is right."""
    stream.merge(base, steps(tmp_path, "plain"), tmp_path / "base", Options(dtype="bfloat16"))
    plan = [Step([write_adapter(tmp_path / "tiny", everywhere(1e-5, seed=9))])]
    manifest = stream.merge(tmp_path / "base", plan, tmp_path / "out", Options())
    assert manifest.metrics["verified"]["logits"]["difference"] < 1e-3


def swapped(name: str, one: int, two: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[name][[one, two]] = held[name][[two, one]]

    return change


def exchanged(one: str, two: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[one], held[two] = held[two], held[one]

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (swapped(HEAD, 100, 317), HEAD),
        (swapped(EMBED, 100, 317), EMBED),  # rows that the probe does not read
        (swapped(Q, 3, 30), Q),
        (swapped(DOWN, 30, 31), DOWN),
        (swapped("model.norm.weight", 0, 0), None),
        (exchanged(Q, Q.replace("layers.1", "layers.0")), "model.layers.0.self_attn.q_proj.weight"),
        (exchanged(EMBED, HEAD), EMBED),
        (lambda held: held[DOWN].mul_(1.01), DOWN),
        (lambda held: held["model.norm.weight"].mul_(1.01), "model.norm.weight"),
        (lambda held: held.update({Q: held[Q].T.contiguous()}), Q),
        (lambda held: held[Q].__setitem__((9, 9), held[Q][9, 9] + 1), Q),
    ],
)  # fmt: skip
def test_numbers_in_other_places_are_noticed(
    base: Path,
    merged: tuple[Path, list[Adapter]],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    name: str | None,
) -> None:
    bad = changed(merged[0], tmp_path / "bad", change)
    plan = [Step([adapter]) for adapter in merged[1]]
    if name is None:
        assert again(base, plan, bad)["logits"]
        return
    with pytest.raises(UserError, match=FAILED.format(f"{name} is further from what .* than rounding is")):
        again(base, plan, bad)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (EMBED, (401, 5), float("nan")),  # a row that the probe does not read
        (HEAD, (7, 31), float("inf")),
        ("model.norm.weight", (4,), float("nan")),
        (Q, (31, 0), -float("inf")),
        (Q.replace("q_proj", "k_proj"), (5, 6), -float("inf")),
        (DOWN.replace("down", "gate"), (17, 3), -float("inf")),
    ],
)
def test_a_number_that_is_not_finite_is_noticed(
    base: Path,
    merged: tuple[Path, list[Adapter]],
    tmp_path: Path,
    name: str,
    place: tuple[int, ...],
    value: float,
) -> None:
    bad = changed(merged[0], tmp_path / "bad", lambda held: held[name].__setitem__(place, value))
    with pytest.raises(UserError, match=FAILED.format(f"{name} has values that are not finite")):
        again(base, [Step([adapter]) for adapter in merged[1]], bad)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda held: held.pop(Q), f"{Q} is missing"),
        (lambda held: held.update(more=torch.ones(2)), "more is too much"),
        (lambda held: held.update({Q: held[Q][:31]}), rf"{Q} is \(\(31, 32\), .*, not \(\(32, 32\), .*"),
        (lambda held: held.update({Q: held[Q].bfloat16()}), rf"{Q} is .*torch.bfloat16.*, not .*torch.float16.*"),
    ],
)  # fmt: skip
def test_tensors_are_those_of_the_model(
    base: Path,
    merged: tuple[Path, list[Adapter]],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    what: str,
) -> None:
    bad = changed(merged[0], tmp_path / "bad", change)
    with pytest.raises(UserError, match=FAILED.format(what)):
        again(base, [Step([adapter]) for adapter in merged[1]], bad)


@pytest.mark.parametrize("rows", [419, 421])
def test_the_configuration_must_know_the_rows(
    base: Path, merged: tuple[Path, list[Adapter]], tmp_path: Path, rows: int
) -> None:
    bad = shutil.copytree(merged[0], tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    with pytest.raises(UserError, match=FAILED.format(f"config.json says vocab_size {rows}")):
        again(base, [Step([adapter]) for adapter in merged[1]], bad)


def odd_base(base: Path, place: Path) -> Path:
    """A model that `logits` does not know, with tensors of every sort."""
    shutil.copytree(base, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "new"}))
    held = load_file(place / "model.safetensors")
    held |= {
        "experts.weight": drawn(3, 8, 4),
        "steps": torch.arange(6).view(2, 3),
        "scale": torch.tensor(2.0),
    }
    save_file(
        held | {"a.rotary_emb.inv_freq": drawn(8), "none.weight": torch.ones(2, 0)},
        place / "model.safetensors",
    )
    return place


def test_a_model_of_another_kind_is_compared_matrix_by_matrix(base: Path, tmp_path: Path) -> None:
    odd = odd_base(base, tmp_path / "odd")
    plan = steps(tmp_path, "plain")
    manifest = stream.merge(odd, plan, tmp_path / "out", Options(dtype="bfloat16"))
    assert manifest.metrics["verified"] == {"tensors": 26, "logits": None}
    assert "26 tensors" in told(manifest.metrics["verified"])
    cases: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        Q: swapped(Q, 3, 30),
        "experts.weight": swapped("experts.weight", 0, 2),
        "steps": lambda held: held["steps"].add_(1),
        "scale": lambda held: held["scale"].add_(1),
        "a.rotary_emb.inv_freq": lambda held: held["a.rotary_emb.inv_freq"].mul_(1.001),
    }
    for name, change in cases.items():
        bad = changed(tmp_path / "out", tmp_path / name, change)
        with pytest.raises(UserError, match=f"{name} is further"):
            again(odd, plan, bad, "bfloat16")
    bad = changed(tmp_path / "out", tmp_path / "nan", lambda held: held[DOWN].fill_(torch.nan))
    with pytest.raises(UserError, match=f"{DOWN} has values that are not finite"):
        again(odd, plan, bad, "bfloat16")


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_methods_that_look_at_whole_weights_are_compared_as_such(tmp_path: Path, method: str) -> None:
    """The head is of several blocks, each of which would be combined otherwise by itself."""
    base = tiny.write_llama(tmp_path / "base", 9001)
    pairs = [everywhere(seed=seed) | lora(HEAD, (9001, HIDDEN), seed=seed + 70) for seed in (1, 30)]
    step = Step([write_adapter(tmp_path / str(i), pair) for i, pair in enumerate(pairs)], method, 0.4, 1)
    figures = stream.merge(base, [step], tmp_path / "out", Options(workers=2)).metrics["verified"]
    assert figures["logits"]["difference"] < 1e-5


def test_rows_of_which_few_are_large_pass(base: Path, tmp_path: Path) -> None:
    """Real models have rows of zeros, and channels a hundred times larger than others."""

    def uneven(held: dict[str, torch.Tensor]) -> None:
        for tensor in held.values():
            if tensor.ndim == 2:
                tensor[::3] = 0.0
                tensor[1] *= 100
                tensor[:, 2] *= 100

    odd = changed(base, tmp_path / "odd", uneven)
    for dtype in DTYPES[1:]:
        manifest = stream.merge(odd, steps(tmp_path, "plain"), tmp_path / dtype, Options(dtype=dtype))
        assert manifest.metrics["verified"]["logits"]["tokens"] == TOKENS


def test_the_probe_is_text_where_there_is_a_tokenizer(base: Path, tmp_path: Path) -> None:
    ids = probe(base, ROWS)
    assert len(ids) == TOKENS and max(ids) < ROWS
    (tmp_path / "json").mkdir()
    (tmp_path / "none").mkdir()
    tiny.write_byte_level(tmp_path / "json", tiny.byte_level())
    assert len(probe(tmp_path / "json", ROWS)) == TOKENS
    spread = probe(tmp_path / "none", 32)
    assert spread == list(range(0, 32, 2))


def test_the_embedding_of_the_probe_is_read_where_it_is_said(base: Path, tmp_path: Path) -> None:
    """One token, the last of the vocabulary."""
    plan = steps(tmp_path, "rows")
    stream.merge(base, plan, tmp_path / "out", Options(dtype="float16"))
    work = Work(base, plan, Options(dtype="float16"))
    with Workers(2) as workers:
        figures = verify(stream.open_model(tmp_path / "out"), work.merged, work.model, [419], workers)
    assert figures["logits"]["tokens"] == 1
    assert isinstance(work.merged, Merged)


def test_what_is_told() -> None:
    assert told(None) == "Not verified."
    figures = {"tokens": 16, "difference": 0.00123, "largest": 0.1, "same_next_token": 15}
    line = told({"tensors": 9, "logits": figures})
    assert "9 tensors" in line and "0.12 %" in line and "15 of 16" in line
