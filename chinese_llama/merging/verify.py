"""What was written, read again: is it whole, and does it do what base and adapters do?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from chinese_llama.errors import UserError
from chinese_llama.merging.forward import knows, logits
from chinese_llama.merging.merged import Add, Merged, Operation, Rows, Whole
from chinese_llama.model.shards import EMBED, Block, Changed, Model, Named, Workers, block_of, blocks
from chinese_llama.progress import track
from chinese_llama.vocab.proto import encoder, read_model

PROBE = "The capital of China is Beijing. 中国的首都是北京，那里住着两千多万人。"
TOKENS = 16  # of the probe that are read
# How far logits may be from those of base + adapters, as a share of their spread: some ten times what rounding does
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


def _filled(
    model: Named,
    workers: Workers,
    name: str,
    x: torch.Tensor,
    part: Callable[[Block, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[tokens, out], put together from what `part` gives for each block and x [in, tokens], plus the bias.

    Weight times x, not the other way: several times faster for few tokens. In place: small results that lie
    between large ones that come and go would keep the memory of those."""
    y, turned = torch.empty(model.meta(name)[0][0], len(x)), x.T.contiguous()

    def fill(block: Block) -> None:
        y[block[1] : block[2]] = part(block, turned)

    for _ in workers.each(fill, blocks(model, [name])):
        pass
    bias = name.removesuffix("weight") + "bias"
    return y.T + model.load(bias).float() if bias in model else y.T


class Written:
    """The written weights. Every number of a matrix takes part in what `linear` gives, and must be finite."""

    def __init__(self, model: Model, workers: Workers) -> None:
        self.model, self.workers = model, workers

    def embed(self, ids: list[int]) -> torch.Tensor:
        return torch.cat([self.model.rows(EMBED, i, i + 1) for i in ids]).float()

    def vector(self, name: str) -> torch.Tensor:
        return self.model.load(name).float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        def part(block: Block, x: torch.Tensor) -> torch.Tensor:
            return block_of(self.model, block).float() @ x

        return _filled(self.model, self.workers, name, x, part)


class Unmerged:
    """The base with the adapters beside it: W x + B (A x) scale for each, nothing added to a weight and nothing
    rounded. DoRA and combined adapters, which are no sums, are computed as weights in float32."""

    def __init__(self, merged: Merged, model: Changed, workers: Workers) -> None:
        self.merged, self.model, self.workers = merged, model, workers

    def embed(self, ids: list[int]) -> torch.Tensor:
        return torch.cat([self._rows(EMBED, i, i + 1) for i in ids])

    def vector(self, name: str) -> torch.Tensor:
        return self._rows(name, 0, self.model.meta(name)[0][0])

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        operations = self.merged.operations(name)
        inner = {id(o): o.pair.right @ x.T for o in operations if isinstance(o, Add)}

        def part(block: Block, x: torch.Tensor) -> torch.Tensor:
            return self._part(operations, inner, x, block)

        return _filled(self.model, self.workers, name, x, part)

    def _part(
        self, operations: Sequence[Operation], inner: dict[int, torch.Tensor], x: torch.Tensor, block: Block
    ) -> torch.Tensor:
        name, start, stop = block
        if not all(isinstance(operation, (Add, Whole, Rows)) for operation in operations):
            return self._rows(name, start, stop) @ x
        weight = self.merged.below(name, self.model.meta(name)[0], start, stop)
        added = torch.zeros(stop - start, x.shape[1])
        for operation in operations:
            if isinstance(operation, Add):
                left = operation.pair.left[start:stop]
                added[: len(left)] += left @ inner[id(operation)]
            elif isinstance(operation, Whole) and operation.count >= stop:
                operation.apply(weight, start)
                added.zero_()
            else:  # final values: what was added to these rows goes
                marked = torch.full_like(weight, torch.nan)
                operation.apply(marked, start)
                new = ~marked[:, 0].isnan()
                weight[new], added[new] = marked[new], 0.0
        return weight @ x + added

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.merged.total(name, self.model.meta(name)[0], start, stop)


def verify(
    written: Model, merged: Merged, model: Changed, ids: list[int], workers: Workers
) -> dict[str, Any]:
    """Compare what was written with what was to be (`model`, made by `merged`), tensor by tensor in name,
    shape and dtype, all numbers finite, and in the logits of the tokens `ids`; return the figures.

    Raises UserError for what differs.
    """
    _check_shapes(written, model)
    config = written.config()
    if config["vocab_size"] != model.meta(EMBED)[0][0]:
        raise _failed(f"config.json says vocab_size {config['vocab_size']:,}")
    if not knows(config):
        _check_finite(written, list(written), workers)
        return {"tensors": len(list(written)), "logits": None}
    _check_finite(written, [EMBED, *(n for n in written if len(written.meta(n)[0]) != 2)], workers)
    bar = track(
        range(2 * config["num_hidden_layers"]), "verifying", 2 * config["num_hidden_layers"], "layers"
    )
    steps = iter(bar)
    found = logits(Written(written, workers), config, ids, lambda: next(steps))
    wanted = logits(Unmerged(merged, model, workers), config, ids, lambda: next(steps))
    return {"tensors": len(list(written)), **_compared(found, wanted, written.meta(EMBED)[1])}


def probe(directory: Path, rows: int) -> list[int]:
    """The first ids of the probe text for the tokenizer of a model; ids from all over its vocabulary where it
    has none."""
    if (directory / "tokenizer.model").is_file():
        return encoder(read_model(directory / "tokenizer.model")).encode(PROBE)[:TOKENS]
    if (directory / "tokenizer.json").is_file():
        from chinese_llama.vocab.readers import fast_reader

        return fast_reader(directory / "tokenizer.json").encode([PROBE])[0][:TOKENS]
    return [index * rows // TOKENS for index in range(TOKENS)]


def _check_shapes(written: Model, model: Changed) -> None:
    for name in {*written, *model}:
        if name not in written or name not in model:
            raise _failed(f"{name} is {'missing' if name in model else 'too much'}")
        if written.meta(name) != model.meta(name):
            raise _failed(f"{name} is {written.meta(name)}, not {model.meta(name)}")


def _check_finite(written: Model, names: Sequence[str], workers: Workers) -> None:
    def bad(block: Block) -> str | None:
        numbers = block_of(written, block)
        fine = not numbers.is_floating_point() or torch.isfinite(numbers.float().sum())
        return None if fine or torch.isfinite(numbers).all() else block[0]

    for name in workers.each(bad, blocks(written, names)):
        if name:
            raise _failed(f"{name} has values that are not finite")


def _compared(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    if not torch.isfinite(found).all():
        raise _failed("its logits are not finite")
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean().sqrt()
    off = float((found - wanted).square().mean().sqrt() / spread)
    same = int((found.argmax(1) == wanted.argmax(1)).sum())
    if off > TOLERANCE.get(dtype, 1e-3):
        raise _failed(
            f"its logits are {100 * off:.2g} % of their spread away from those of base + adapters, more than rounding "
            f"to {dtype} does"
        )
    return {
        "logits": {
            "tokens": len(wanted),
            "difference": off,
            "largest": float((found - wanted).abs().max()),
            "same_next_token": same,
        }
    }


def _failed(what: str) -> UserError:
    return UserError(f"The merged model is not what it should be: {what}; nothing is kept of it.")


def told(figures: dict[str, Any] | None) -> str:
    """One line about the figures of `verify`."""
    if figures is None:
        return "Not verified."
    if figures["logits"] is None:
        return f"Verified: {figures['tensors']} tensors, all finite; logits are not compared for this kind of model."
    found = figures["logits"]
    return (
        f"Verified: {figures['tensors']} tensors, all finite; logits differ from base + adapters by "
        f"{100 * found['difference']:.2g} % of their spread (rounding), same next token at "
        f"{found['same_next_token']} of {found['tokens']} places."
    )
