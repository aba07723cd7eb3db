"""Weights with adapters in them: the same bits however they are asked for, rounded once, against float64."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from chinese_llama.errors import UserError
from chinese_llama.merging import merged as module
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.merged import InMemory, Merged
from chinese_llama.merging.plan import Adapter, Step
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.shards import EMBED, HEAD, Changed, Weights, save_shards
from tests.merging.tensors import delta, drawn, lora, write_adapter

BITS = {torch.float16: 11, torch.bfloat16: 8}  # of a number's significand
W = "model.layers.0.mlp.up_proj.weight"


def total(base: torch.Tensor, *steps: Step, name: str = W) -> torch.Tensor:
    """A weight as the steps make it, in the dtype of the base."""
    made = Merged(InMemory({name: base}), load_steps(steps))
    return made.rows(name, tuple(base.shape), base.dtype, 0, len(base))


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """float64 numbers rounded to the nearest, even at ties, of a kind of `BITS`; and the last place of each."""
    _, exponents = np.frexp(exact.numpy())
    least = -13 if dtype == torch.float16 else -125
    place = np.ldexp(1.0, np.maximum(exponents, least) - BITS[dtype])
    return np.rint(exact.numpy() / place) * place, place


def make(folder: Path, kind: str, shape: tuple[int, int]) -> list[Step]:
    """Steps of every sort on the one weight `W` of that shape."""
    first, second = lora(W, shape), lora(W, shape, rank=3, seed=7)
    if kind == "dora":
        second = lora(W, shape, seed=7, dora=True)
    if kind == "rows":
        ids = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))[: 1 + shape[0] // 2]
        key = W.replace("weight", "trainable_tokens_delta")
        rows = {key: drawn(len(ids), shape[1], seed=5)}
        second_adapter = write_adapter(folder / "second", rows, trainable_token_indices=ids.tolist())
    else:
        second_adapter = write_adapter(folder / "second", second, 0.7)
    first_adapter = write_adapter(folder / "first", first)
    if kind in ("linear", "ties", "dare_linear", "dare_ties"):
        return [Step([first_adapter, second_adapter], kind, 0.5, 3)]
    return [Step([first_adapter]), Step([second_adapter])]


KINDS = ("sequence", "dora", "rows", "linear", "ties", "dare_linear", "dare_ties")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.one_of(st.just(1), st.integers(1, 90)), st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.data(),
)  # fmt: skip
def test_rows_are_the_same_bits_however_they_are_asked_for(
    rows: int, columns: int, kind: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Tiles of 64 numbers, so that a weight has many, rows longer than a tile among them."""
    with tempfile.TemporaryDirectory() as folder, patch.object(module, "TILE", 64):
        base = drawn(rows, columns).to(dtype)
        made = Merged(InMemory({W: base}), load_steps(make(Path(folder), kind, (rows, columns))))

        def ask(start: int, stop: int) -> torch.Tensor:
            return made.rows(W, (rows, columns), dtype, start, stop)

        whole = ask(0, rows)
        assert whole.shape == base.shape and whole.dtype == dtype
        cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=6)) | {0, rows})
        parts = [ask(start, stop) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        assert torch.equal(ask(start, stop), whole[start:stop])


def test_the_files_are_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    """Several blocks and tiles a weight; new rows, a sum, DoRA, TIES and DARE in one model."""
    shape, square = (9001, 64), (700, 500)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    state = {EMBED: drawn(9000, 64).half(), HEAD: drawn(9000, 64, seed=1).half()}
    state |= {name: drawn(*square, seed=i).half() for i, name in enumerate(names)}
    base = write_base(tmp_path / "base", state)
    whole = {EMBED: drawn(*shape, seed=2), HEAD: drawn(*shape, seed=3)}
    first = write_adapter(tmp_path / "a", {**lora(HEAD, shape, seed=4), **lora(names[0], square), **whole})
    second = write_adapter(tmp_path / "b", lora(HEAD, shape, seed=5))
    third = write_adapter(tmp_path / "c", lora(names[1], square, dora=True))
    pairs = [
        [write_adapter(tmp_path / f"{n}{i}", lora(n, square, seed=10 * i), 0.6) for i in (1, 2)]
        for n in names[2:]
    ]
    steps = [Step([first]), Step([second]), Step([third])]
    steps += [Step(found, method, 0.4, 5) for found, method in zip(pairs, ("ties", "dare_ties"), strict=True)]
    written = []
    for workers in (1, 2, 5):
        source = Weights(base)
        loaded = load_steps(steps)
        made = Merged(source, loaded).changes(check_fit(source, base, loaded))
        output = tmp_path / f"out{workers}"
        output.mkdir()
        (output / "config.json").write_text("{}")
        save_shards(Changed(source, made), output, "merging", workers)
        written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    merged = Weights(tmp_path / "out1")
    for name in state:
        assert merged.load(name).shape == (shape if name in (EMBED, HEAD) else square)
        assert not torch.equal(merged.load(name)[:700], state[name][:700]), name


def write_base(place: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    place.mkdir()
    save_file(state, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"vocab_size": len(state[EMBED]), **config}))
    return place


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_numbers_are_the_nearest_to_float64_but_where_two_are_as_near(
    tmp_path: Path, dtype: torch.dtype, dora: bool
) -> None:
    """Weights around 0.02, deltas around 0.001, of ranks 8 and then 64. A sum in float32 has 13 bits more than
    float16, so one in some ten thousand falls on the other side of the middle."""
    shape = (600, 1000)
    base = drawn(*shape, size=0.02).to(dtype)
    pairs = [lora(W, shape, rank, seed=rank, size=5e-4 / rank**0.5) for rank in (8, 64)]
    exact = base.double() + delta(pairs[0], W) + delta(pairs[1], W)
    if dora:
        key = W.replace("weight", "lora_magnitude_vector")
        pairs[1][key] = drawn(600, seed=9, size=0.1) + 0.6
        exact *= (pairs[1][key].double() / exact.norm(dim=1))[:, None]
    steps = [Step([write_adapter(tmp_path / str(i), pair)]) for i, pair in enumerate(pairs)]
    found = total(base, *steps).double().numpy()
    nearest, place = rounded(exact, dtype)
    assert (np.abs(found - exact.numpy()) <= 0.501 * place + 1e-9).all()
    assert (found != nearest).mean() <= (2e-4 if dtype == torch.float16 else 5e-5)
    assert (base.double().numpy() != nearest).mean() > 0.5


def test_weights_scale_what_is_added(tmp_path: Path) -> None:
    shape = (20, 30)
    base, pairs = drawn(*shape), [lora(W, shape), lora(W, shape, seed=5)]
    for weights in ((1.0, 0.7), (-0.5, 2.0)):
        adapters = [
            write_adapter(tmp_path / str(i), *given)
            for i, given in enumerate(zip(pairs, weights, strict=True))
        ]
        exact = base + sum(w * delta(pair, W) for w, pair in zip(weights, pairs, strict=True))
        found = total(base, *(Step([adapter]) for adapter in adapters))
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
        assert torch.equal(found, total(base, Step(adapters, "linear")))


def test_dora_at_half_weight_lies_half_way(tmp_path: Path) -> None:
    base, pair = drawn(20, 30), lora(W, (20, 30), dora=True)
    halves = [total(base, Step([write_adapter(tmp_path / str(w), pair, w)])) for w in (1.0, 0.5, -1.0)]
    torch.testing.assert_close(halves[1], (base + halves[0]) / 2)
    torch.testing.assert_close(halves[2], 2 * base - halves[0])


def test_whole_matrices_and_rows_are_final_whatever_the_weight(tmp_path: Path) -> None:
    base, whole, rows = drawn(20, 30), drawn(20, 30, seed=1), drawn(2, 30, seed=2)
    below = Step([write_adapter(tmp_path / "below", lora(W, (20, 30)))])
    matrix = Step([write_adapter(tmp_path / "whole", {W: whole}, 0.3)])
    assert torch.equal(total(base, below, matrix), whole)
    key, ids = W.replace("weight", "trainable_tokens_delta"), {"trainable_token_indices": [17, 4]}
    single = Step([write_adapter(tmp_path / "rows", {key: rows}, 0.3, **ids)])
    found = total(base, matrix, single)
    assert torch.equal(found[[17, 4]], rows)
    kept = [i for i in range(20) if i not in (17, 4)]
    assert torch.equal(found[kept], whole[kept])
    after = total(base, matrix, below)
    pair = lora(W, (20, 30))
    torch.testing.assert_close(after.double(), whole + delta(pair, W), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True), st.sampled_from([8, 50, 1 << 18]))
def test_rows_in_any_order_land_where_they_belong(ids: list[int], tile: int) -> None:
    """With gaps, and over the ends of tiles."""
    rows, base = drawn(len(ids), 8, seed=4), drawn(40, 8)
    wanted = base.clone()
    for place, row in enumerate(ids):
        wanted[row] = rows[place]
    key = W.replace("weight", "trainable_tokens_delta")
    with tempfile.TemporaryDirectory() as folder, patch.object(module, "TILE", tile):
        adapter = write_adapter(Path(folder), {key: rows}, trainable_token_indices=ids)
        assert torch.equal(total(base, Step([adapter])), wanted)


def test_a_dtype_is_for_what_holds_fractions(tmp_path: Path) -> None:
    """Buffers that transformers recomputes in float32, counters and scalars stay."""
    state = {
        EMBED: drawn(10, 8).half(),
        W: drawn(6, 8).half(),
        "model.norm.weight": torch.ones(8).half(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": drawn(4),
        "model.steps": torch.arange(3),
        "model.scale": torch.tensor(2.0).half(),
    }
    pair = lora(W, (6, 8))
    steps = load_steps([Step([write_adapter(tmp_path / "a", pair)])])
    for dtype in (torch.bfloat16, torch.float32):
        made = Merged(InMemory(state), steps).changes(10, dtype)
        assert set(made) == {EMBED, W, "model.norm.weight"}
        assert all(change.dtype == dtype == change.rows(0, 6).dtype for change in made.values())
        assert torch.equal(made[EMBED].rows(2, 5), state[EMBED][2:5].to(dtype))
        exact = state[W].double() + delta(pair, W)
        found = made[W].rows(0, 6).double()
        assert ((found - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    assert set(Merged(InMemory(state), steps).changes(10)) == {W}
    assert set(Merged(InMemory(state), steps).changes(10, torch.float16)) == {W}


def ties(deltas: list[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Yadav 2023 by hand: the largest of each, the sign that weighs more, the mean of those that have it."""
    count = deltas[0].numel()
    kept = []
    for one in deltas:
        order = one.abs().flatten().argsort(descending=True)[: int(density * count)]
        kept.append(torch.zeros(count, dtype=one.dtype).scatter(0, order, one.flatten()[order]))
    found = torch.zeros(count, dtype=torch.float64)
    for i in range(count):
        sign = 1.0 if sum(float(one[i]) for one in kept) >= 0 else -1.0
        agree = [w * float(one[i]) for w, one in zip(weights, kept, strict=True) if one[i] * sign > 0]
        found[i] = sum(agree) / max(1, len(agree))
    return found.view(deltas[0].shape)


def siblings(
    folder: Path, weights: Sequence[float]
) -> tuple[list[Adapter], list[torch.Tensor], torch.Tensor]:
    """A plain pair, DoRA, a whole matrix, single rows and an adapter of something else: those, what each alone
    makes of the base less the base (float64), and the base."""
    shape, rows_of = (12, 10), W.replace("weight", "trainable_tokens_delta")
    base, plain, other = drawn(*shape), lora(W, shape), lora(W, shape, seed=4, dora=True)
    whole, rows = drawn(*shape, seed=8), drawn(3, 10, seed=9)
    stem = W.removesuffix(".weight")
    summed = base + delta({k: v for k, v in other.items() if "magn" not in k}, W)
    summed *= (other[f"{stem}.lora_magnitude_vector"] / summed.norm(dim=1))[:, None]
    single = base.double().clone()
    single[[7, 0, 11]] = rows.double()
    given: list[tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]] = [
        (plain, delta(plain, W), {}),
        (other, summed - base, {}),
        ({W: whole}, whole.double() - base, {}),
        ({rows_of: rows}, single - base, {"trainable_token_indices": [7, 0, 11]}),
        (lora("model.layers.1.mlp.up_proj.weight", shape), torch.zeros(shape, dtype=torch.float64), {}),
    ]
    adapters = [
        write_adapter(folder / str(i), tensors, weight, **config)
        for i, ((tensors, _, config), weight) in enumerate(zip(given, weights, strict=True))
    ]
    return adapters, [alone for _, alone, _ in given], base


WEIGHTS = (1.0, 0.5, 0.25, -0.5, 2.0)


def test_siblings_add_up_linearly(tmp_path: Path) -> None:
    adapters, deltas, base = siblings(tmp_path, WEIGHTS)
    exact = base + sum(w * one for w, one in zip(WEIGHTS, deltas, strict=True))
    found = total(base, Step(adapters, "linear"))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_siblings_by_ties(tmp_path: Path, density: float) -> None:
    adapters, deltas, base = siblings(tmp_path, WEIGHTS)
    below = Step([write_adapter(tmp_path / "below", lora(W, (12, 10), seed=20))])
    exact = base + ties(deltas, WEIGHTS, density)
    torch.testing.assert_close(
        total(base, Step(adapters, "ties", density)).double(), exact, rtol=0, atol=1e-5
    )
    # what lies below is what they share
    found = total(base, below, Step(adapters[:1] + adapters[4:], "ties", density))
    shared = base + delta(lora(W, (12, 10), seed=20), W)
    exact = shared + ties([deltas[0], deltas[4]], (WEIGHTS[0], WEIGHTS[4]), density)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_siblings_by_dare_are_there_whole_or_not_at_all(tmp_path: Path, method: str) -> None:
    """Each number is one of those that dropping the one, the other, both or none gives."""
    shape, weights = (60, 70), (1.0, 0.5)
    base, pairs = drawn(*shape), [lora(W, shape, seed=1), lora(W, shape, seed=2)]
    steps = [
        Step(
            [
                write_adapter(tmp_path / str(i), *one)
                for i, one in enumerate(zip(pairs, weights, strict=True))
            ],
            method,
            0.4,
            seed,
        )
        for seed in (3, 3, 4)
    ]
    first, again, other = (total(base, step) for step in steps)
    assert torch.equal(first, again) and not torch.equal(first, other)
    scaled = [delta(pair, W) / 0.4 for pair in pairs]
    choices, shares = [], []
    for one in (0, 1):
        for two in (0, 1):
            kept = [one * scaled[0], two * scaled[1]]
            weighed = [w * d for w, d in zip(weights, kept, strict=True)]
            choice = weighed[0] + weighed[1]
            if method == "dare_ties":
                sign = torch.where(kept[0] + kept[1] >= 0, 1, -1)
                agree = [k.sign() == sign for k in kept]
                number = (agree[0].int() + agree[1].int()).clamp(min=1)
                choice = (weighed[0] * agree[0] + weighed[1] * agree[1]) / number
            choices.append(choice)
            shares.append((0.4 if one else 0.6) * (0.4 if two else 0.6))
    off = torch.stack([(first - base - choice).abs() for choice in choices])
    assert float(off.min(0).values.max()) < 1e-5
    found = torch.bincount(off.argmin(0).flatten(), minlength=4) / off[0].numel()
    if method == "dare_linear":
        torch.testing.assert_close(found, torch.tensor(shares), rtol=0, atol=0.03)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_new_rows_of_siblings_are_their_weighted_mean(tmp_path: Path, method: str) -> None:
    """Nothing below has them, so there is nothing of which they are the difference."""
    state = {EMBED: drawn(10, 8), HEAD: drawn(10, 8, seed=1)}
    base = write_base(tmp_path / "base", state)
    whole = [{EMBED: drawn(14, 8, seed=i), HEAD: drawn(14, 8, seed=i + 1)} for i in (3, 5)]
    whole[0] |= lora(HEAD, (14, 8), seed=7)
    weights = (0.5, 1.5)
    adapters = [
        write_adapter(tmp_path / str(i), *one) for i, one in enumerate(zip(whole, weights, strict=True))
    ]
    source, loaded = Weights(base), load_steps([Step(adapters, method, 0.5, 1)])
    model = Changed(source, Merged(source, loaded).changes(check_fit(source, base, loaded)))
    final = [{name: one[name].double() for name in (EMBED, HEAD)} for one in whole]
    final[0][HEAD] += delta(whole[0], HEAD)
    for name in (EMBED, HEAD):
        mean = (0.5 * final[0][name] + 1.5 * final[1][name]) / 2
        found = model.load(name)
        torch.testing.assert_close(found[10:].double(), mean[10:], rtol=0, atol=1e-6)
        assert torch.equal(model.rows(name, 9, 12), found[9:12])
        if method == "linear":
            old = state[name] + sum(
                w * (f[name][:10] - state[name]) for w, f in zip(weights, final, strict=True)
            )
            torch.testing.assert_close(found[:10].double(), old, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("added", "fine"), [(15.0, True), (16.0, False), (-131023.0, True), (-131024.0, False)]
)
def test_what_still_rounds_to_the_largest_number_is_no_overflow(
    tmp_path: Path, added: float, fine: bool
) -> None:
    """65519 rounds to float16's largest number, 65504; 65520 to infinity. Among others that are large too."""
    base = torch.full((3, 4), 60000.0).half()
    base[1, 2] = 65504
    column = torch.zeros(1, 4)
    column[0, 2] = 1
    row = torch.zeros(3, 1)
    row[1, 0] = added / 2
    pair = {W.replace("weight", "lora_A.weight"): column, W.replace("weight", "lora_B.weight"): row}
    step = Step([write_adapter(tmp_path / "a", pair)])
    if fine:
        assert abs(float(total(base, step)[1, 2])) == 65504
        return
    with pytest.raises(UserError, match=f"{W} overflows torch.float16 when merged"):
        total(base, step)


def test_a_base_that_does_not_fit_another_dtype_is_named(tmp_path: Path) -> None:
    state = {EMBED: drawn(4, 8), W: torch.full((4, 8), 1e6).bfloat16(), "a.weight": torch.ones(2).bfloat16()}
    steps = load_steps([Step([write_adapter(tmp_path / "a", lora(W, (4, 8)))])])
    made = Merged(InMemory(state), steps).changes(4, torch.float16)
    assert made["a.weight"].rows(0, 2).tolist() == [1, 1]
    with pytest.raises(UserError, match=f"{W} overflows torch.float16"):
        made[W].rows(0, 4)
    assert Merged(InMemory(state), steps).changes(4)[W].rows(0, 4).dtype == torch.bfloat16
