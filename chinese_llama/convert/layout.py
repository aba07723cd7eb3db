"""How Meta's LLaMA 1 and 2 checkpoints name, divide and order what Hugging Face models hold.

Facts: the model code of https://github.com/meta-llama/llama (names; which dimension of a matrix its
model-parallel layers divide over the shards), and the conversion script of transformers (the order of
the rotary rows).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from chinese_llama.model.shards import EMBED, HEAD

TOKENS, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
ROPE = "rope.freqs"
# buffers that Meta's files may hold; its code computes them anew
ROPES = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
SHARDS = {5120: 2, 6656: 4, 8192: 8}  # hidden size -> shards of the published checkpoints; others have 1
Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What fixes the shapes of a LLaMA: `ffn` is the width inside the feed-forward, `vocab` the rows of
    the two vocabulary matrices."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Slot:
    """One tensor: its two names, its whole shape, the dimension that Meta divides over the shards (None:
    every shard has it whole), and whether its rows are those of rotary heads."""

    meta: str
    hf: str
    shape: tuple[int, ...]
    divided: int | None
    rotary: bool = False


def slots(sizes: Sizes) -> list[Slot]:
    """All tensors of a model, in the order of Meta's files."""
    dim, vocab = sizes.dim, sizes.vocab
    found = [
        Slot(TOKENS, EMBED, (vocab, dim), 1),
        Slot(NORM, "model.norm.weight", (dim,), None),
        Slot(OUTPUT, HEAD, (vocab, dim), 0),
    ]
    for layer in range(sizes.layers):
        found += _layer(sizes, f"layers.{layer}.", f"model.layers.{layer}.")
    return found


def _layer(sizes: Sizes, meta: str, hf: str) -> list[Slot]:
    dim, ffn, kv = sizes.dim, sizes.ffn, sizes.kv_heads * sizes.head_dim
    attention, forward = f"{meta}attention.", f"{meta}feed_forward."
    return [
        Slot(f"{attention}wq.weight", f"{hf}self_attn.q_proj.weight", (dim, dim), 0, rotary=True),
        Slot(f"{attention}wk.weight", f"{hf}self_attn.k_proj.weight", (kv, dim), 0, rotary=True),
        Slot(f"{attention}wv.weight", f"{hf}self_attn.v_proj.weight", (kv, dim), 0),
        Slot(f"{attention}wo.weight", f"{hf}self_attn.o_proj.weight", (dim, dim), 1),
        Slot(f"{forward}w1.weight", f"{hf}mlp.gate_proj.weight", (ffn, dim), 0),
        Slot(f"{forward}w2.weight", f"{hf}mlp.down_proj.weight", (dim, ffn), 1),
        Slot(f"{forward}w3.weight", f"{hf}mlp.up_proj.weight", (ffn, dim), 0),
        Slot(f"{meta}attention_norm.weight", f"{hf}input_layernorm.weight", (dim,), None),
        Slot(f"{meta}ffn_norm.weight", f"{hf}post_attention_layernorm.weight", (dim,), None),
    ]


def hf_order(found: list[Slot]) -> list[Slot]:
    """`slots` in the order in which a model uses them."""
    return found[:1] + found[3:] + found[1:3]


def to_halves(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads, [heads * head_dim, columns], from Meta's order to Hugging Face's.

    Meta rotates rows 2i and 2i + 1 of a head together; Hugging Face rows i and i + head_dim / 2.
    """
    return heads.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_halves`."""
    return heads.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def by_heads(
    read: Rows, reorder: Callable[[torch.Tensor, int], torch.Tensor], head_dim: int, start: int, stop: int
) -> torch.Tensor:
    """Rows [start, stop) in the order that `reorder` gives to the rows that `read` reads: the heads that
    they lie in are read whole."""
    first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
    return reorder(read(first, last), head_dim)[start - first : stop - first]


def even(total: int, shards: int) -> list[int]:
    """How many rows or columns each shard gets; what does not divide goes to the last."""
    return [total // shards] * (shards - 1) + [total - total // shards * (shards - 1)]
