"""Pico checkpoints in Meta's form, written by torch itself, and Meta's model from its equations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-05, "vocab_size": -1}
Tensors = dict[str, torch.Tensor]


def whole(
    params: dict[str, Any], vocab: int = 421, ffn: int = 96, dtype: torch.dtype = torch.float16
) -> Tensors:
    """Random tensors of a model, undivided, by Meta's names."""
    generator = torch.Generator().manual_seed(0)
    dim, kv = params["dim"], params.get("n_kv_heads", params["n_heads"]) * params["dim"] // params["n_heads"]
    shapes = {"tok_embeddings": (vocab, dim), "norm": (dim,), "output": (vocab, dim)}
    for layer in range(params["n_layers"]):
        matrices = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
        shapes |= {f"layers.{layer}.attention.{name}": shape for name, shape in matrices.items()}
        matrices = {"w1": (ffn, dim), "w2": (dim, ffn), "w3": (ffn, dim)}
        shapes |= {f"layers.{layer}.feed_forward.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"layers.{layer}.attention_norm": (dim,), f"layers.{layer}.ffn_norm": (dim,)}
    return {
        f"{name}.weight": (torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1)).to(dtype)
        for name, shape in shapes.items()
    }


def divided(tensors: Tensors, shards: int, embedding: int = 1) -> list[Tensors]:
    """The tensors of each shard."""
    columns = ("attention.wo.weight", "feed_forward.w2.weight") + ("tok_embeddings.weight",) * embedding
    found: list[Tensors] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(columns) else 0
        step = tensor.shape[axis] // shards
        for number, shard in enumerate(found):
            size = step if number < shards - 1 else tensor.shape[axis] - number * step
            part = tensor if tensor.dim() == 1 else tensor.narrow(axis, number * step, size)
            shard[name] = part.clone()
    return found


def write_checkpoint(
    directory: Path, shards: Sequence[Tensors], params: dict[str, Any] | None = None
) -> Path:
    """The files of a checkpoint."""
    directory.mkdir(parents=True)
    for number, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{number:02d}.pth")
    (directory / "params.json").write_text(json.dumps(PARAMS if params is None else params))
    return directory


def checkpoint(
    directory: Path,
    shards: int = 1,
    vocab: int = 421,
    dtype: torch.dtype = torch.float16,
    ropes: Sequence[str] = ("rope.freqs",),
    embedding: int = 1,
    **changes: Any,
) -> Path:
    """A checkpoint of `PARAMS` with `changes`."""
    params = {**PARAMS, **changes}
    tensors = divided(whole(params, vocab, dtype=dtype), shards, embedding)
    half = params["dim"] // params["n_heads"] // 2
    for shard in tensors:
        shard |= {name: torch.linspace(1, 0.001, half).to(torch.float16) for name in ropes}
    return write_checkpoint(directory, tensors, params)


def read_checkpoint(directory: Path) -> tuple[list[Tensors], dict[str, Any]]:
    """What torch reads from each shard, and params.json."""
    files = sorted(directory.glob("consolidated.*.pth"))
    return [torch.load(f, weights_only=True) for f in files], json.loads(
        (directory / "params.json").read_text()
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def assert_same(found: Sequence[Tensors], wanted: Sequence[Tensors]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert set(one) == set(other)
        for name, tensor in other.items():
            assert same_bits(one[name], tensor), name


def assert_same_checkpoint(found: Path, wanted: Path) -> None:
    (tensors, params), (other, expected) = read_checkpoint(found), read_checkpoint(wanted)
    assert_same(tensors, other)
    assert params == expected


def logits(weights: Tensors, params: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Meta's LLaMA in float64, from undivided tensors: ids [length] -> logits [length, vocab].

    Rows 2i and 2i + 1 of a head of wq and wk are the real and the imaginary part of a number that is turned
    by position * theta^(-2i / head_dim).
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    heads, length = params["n_heads"], len(ids)
    groups = heads // params.get("n_kv_heads", heads)
    size = params["dim"] // heads
    speed = params.get("rope_theta", 10000.0) ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.exp(1j * torch.outer(torch.arange(length).double(), speed))[:, None]  # [length, 1, size / 2]
    future = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
        return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    for layer in (f"layers.{index}" for index in range(params["n_layers"])):
        y = norm(x, f"{layer}.attention_norm")
        q, k, v = (
            (y @ weights[f"{layer}.attention.{w}.weight"].T).unflatten(-1, (-1, size))
            for w in ("wq", "wk", "wv")
        )
        q, k, v = turned(q), turned(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + future
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ weights[f"{layer}.attention.wo.weight"].T
        y = norm(x, f"{layer}.ffn_norm")
        w1, w2, w3 = (weights[f"{layer}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        x = x + (torch.nn.functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    return norm(x, "norm") @ weights["output.weight"].T
