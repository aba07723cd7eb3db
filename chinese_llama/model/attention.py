"""Attention of packed rows by the bounds of their parts: no mask, and nothing that is read back from the GPU.

transformers finds the parts of a packed batch in its position ids: it waits for the GPU to do so, and makes a mask
of [batch, 1, seq, seq] that shuts out the fast kernels. The collator knows the bounds. They reach attention as
transformers' FlashAttentionKwargs: cu_seq_lens_q and cu_seq_lens_k, int32 [parts + 1], where the parts begin in the
batch as one row, and its end; max_length_q and max_length_k, the tokens of the longest part.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chinese_llama.progress import say

NAME = "packed"
HALF = (torch.bfloat16, torch.float16)
NEAR = 0.02  # of the norm: bfloat16 rounds to 0.004, another mask gives a multiple of this


def use_packed(model: Any, device: torch.device, dtype: str) -> bool:
    """Give a model (or a PeftModel) packed attention where it trains in half precision on a CUDA `device` and the
    kernel there gives what SDPA gives; True if it has it now, and its batches need the bounds of their parts."""
    config = model.config
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return False
    if config.model_type != "llama" or config.attention_dropout:
        return False  # windows, caps and dropout are not the kernel's
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    why = probe(device, getattr(torch, dtype), config.num_attention_heads, config.num_key_value_heads, dim)
    if why:
        say(f"Attention of packed rows goes through a mask, which is slower: {why}.")
        return False
    put_on(model)
    return True


def put_on(model: Any) -> None:
    """Let a model (or a PeftModel) attend by `packed_attention`."""
    AttentionInterface.register(NAME, packed_attention)  # and no mask of this name: then none is made
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, as transformers calls it: query [batch, heads, seq, dim], key and value with as many heads
    or fewer; returns [batch, seq, heads, dim]. Without bounds a row is one part, as in evaluation, where filler is on
    the right and looked at by none."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    if torch.is_autocast_enabled(query.device.type):  # it does not know the kernel; rotations may be float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if q.is_cuda and q.dtype in HALF:
        out = _by_kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    else:
        out = by_parts(q, k, v, cu_seq_lens_q.tolist(), scaling)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
) -> torch.Tensor:
    """As `by_parts`, by FlashAttention-2 (arXiv 2307.08691) as torch has it."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )


def by_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float | None = None
) -> torch.Tensor:
    """Causal attention within each part: query [tokens, heads, dim], key and value with as many heads or fewer;
    returns [tokens, heads, dim]. One part at a time: what the kernel is held against, and what runs without it."""
    sizes = [end - start for start, end in pairwise(bounds)]
    parts = zip(*(states.transpose(0, 1).split(sizes, dim=1) for states in (query, key, value)), strict=True)
    found = [
        scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(found, dim=2)[0].transpose(0, 1)


def probe(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> str:
    """'' if the kernel gives what attention part by part in float32 gives, forward and backward, with `heads` of
    `dim` numbers in `groups`; else why not."""
    try:
        apart = _apart(device, dtype, heads, groups, dim)
    except Exception as error:  # torch's kernels raise many kinds
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return "" if apart < NEAR else f"the kernel for it is {apart:.1%} off here"


def _apart(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> float:
    """How far the kernel is off, as a share of the norm: the largest of the output's and the three gradients'."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0, 1, 6, 70, 256, 257, 400, 512]  # two rows of 256
    shapes = ((512, heads, dim), (512, groups, dim), (512, groups, dim), (512, heads, dim))
    q, k, v, gradient = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    states = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = _by_kernel(q, k, v, torch.tensor(bounds, dtype=torch.int32, device=device), 186, None)
    found = [out, *torch.autograd.grad(out, states, gradient)]
    wanted = by_parts(q.float(), k.float(), v.float(), bounds)
    right = [wanted, *torch.autograd.grad(wanted, states, gradient.float())]
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, right, strict=True))
