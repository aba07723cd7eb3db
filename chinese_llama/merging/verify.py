"""What was written, read again: is it whole, and does it do what base and adapters do?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from chinese_llama.errors import BadFile, UserError
from chinese_llama.merging.forward import knows, logits, sized
from chinese_llama.merging.merged import Add, Merged, Operation, Rows, Whole
from chinese_llama.model.shards import EMBED, Block, Changed, Model, Workers, block_of, blocks
from chinese_llama.progress import track
from chinese_llama.vocab.proto import encoder, read_model

PROBE = "The capital of China is Beijing. 中国的首都是北京，那里住着两千多万人。"
TOKENS = 16  # of the probe that are read
BLOCK = 1 << 19  # numbers in a block: larger than when they are written, for more is done to each
SAMPLE = 32  # one row in so many is compared number by number,
SAMPLED = 8  # in one block in so many
# What a row times probe tokens may be off, in units of what rounding does if it is random: it is not where small
# deltas round away. A row of another place is some hundred (bfloat16) or thousand (float16) times off.
ROUNDING = 32
FLOAT = 2.0**-20  # of float32, after sums of thousands of products


class Beside:
    """The source of `logits` for two models at once: the first half of the tokens goes through base and adapters,
    W x + B (A x), nothing added to a weight and nothing rounded (DoRA and combined adapters, which are no sums,
    as weights in float32); the second half goes through what was written.

    On the way each weight is compared: every row by what it makes of the tokens of the first half, one row in
    `SAMPLE` number by number, which must be within half a unit of the last place. Raises UserError naming the weight.
    """

    def __init__(self, written: Model, merged: Merged, model: Changed, workers: Workers) -> None:
        self.written, self.merged, self.model, self.workers = written, merged, model, workers
        self.seen: set[str] = set()

    def embed(self, ids: list[int]) -> torch.Tensor:
        wanted = torch.cat([self._exact((EMBED, i, i + 1)) for i in ids])
        found = torch.cat([self.written.rows(EMBED, i, i + 1) for i in ids])
        self._compare(EMBED, found, wanted)
        self.count = len(ids)
        return torch.cat([wanted, found.float()])

    def vector(self, name: str) -> torch.Tensor:
        return torch.stack(self._both(name)).repeat_interleave(self.count, 0)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        half, bias = len(x) // 2, name.removesuffix("weight") + "bias"
        y = self._products(name, x[:half], x)
        return y + self.vector(bias) if bias in self.model else y

    def rest(self, names: Iterable[str]) -> None:
        """Compare weights that `logits` has not seen: matrices by what they make of random tokens."""
        draw = torch.Generator().manual_seed(0)
        for name in names:
            shape, dtype = self.model.meta(name)
            if name in self.seen:
                continue
            if len(shape) < 2 or 0 in shape or not dtype.is_floating_point:
                self._both(name)
            else:
                x = torch.randn(TOKENS, torch.Size(shape[1:]).numel(), generator=draw)
                self._products(name, x, x[:0])

    def _exact(self, block: Block) -> torch.Tensor:
        """Rows as they are to be, in float32, made by a thread like those that made what was written: methods that
        leave out the smallest numbers may take others where a product is rounded otherwise."""
        name, start, stop = block
        shape = self.model.meta(name)[0]
        return next(self.workers.each(lambda _: self.merged.exact(name, shape, start, stop), [0]))

    def _both(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A small tensor as it is to be and as it was written, compared."""
        self.seen.add(name)
        shape, dtype = self.model.meta(name)
        fractions = shape and dtype.is_floating_point
        wanted = self._exact((name, 0, shape[0])) if fractions else self.model.load(name)
        found = self.written.load(name)
        self._compare(name, found, wanted)
        return wanted.float(), found.float()

    def _products(self, name: str, x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """A weight as it is to be times x [tokens, in], and as it was written times the second half of `others`:
        [tokens, out], one behind the other."""
        self.seen.add(name)
        dtype, count = self.written.meta(name)[1], len(x)
        operations = self.merged.operations(name)
        inner = {id(o): o.pair.right @ x.T for o in operations if isinstance(o, Add)}
        # Weight times x, not the other way: several times faster for few tokens
        turned, all_turned = x.T.contiguous(), torch.cat([x, others[count:]]).T.contiguous()
        energy = float(x.square().mean())
        # in place: small results that lie between large ones that come and go would keep the memory of those
        y = torch.empty(self.model.meta(name)[0][0], count + len(others[count:]))

        def part(block: Block) -> None:
            _, start, stop = block
            stored = block_of(self.written, block)
            if start // (stop - start) % SAMPLED == 0:
                last = start + -(-(stop - start) * SAMPLED // SAMPLE)
                sample = self.merged.exact(name, self.model.meta(name)[0], start, min(stop, last))
                self._compare(name, stored[: len(sample)], sample)
            weight = stored.flatten(1).float()
            wanted, found = self._wanted(operations, inner, turned, block), weight @ all_turned
            if not _near(found[:, :count], wanted, weight, energy, dtype):
                raise self._differs(name, stored)
            y[start:stop, :count], y[start:stop, count:] = wanted, found[:, count:]

        for _ in self.workers.each(part, blocks(self.model, [name], BLOCK)):
            pass
        return y.T

    def _wanted(
        self, operations: Sequence[Operation], inner: dict[int, torch.Tensor], x: torch.Tensor, block: Block
    ) -> torch.Tensor:
        """Rows of the weight as it is to be, times x [in, tokens]: [rows, tokens]."""
        name, start, stop = block
        shape = self.model.meta(name)[0]
        if not all(isinstance(operation, (Add, Whole, Rows)) for operation in operations):
            return self.merged.exact(name, shape, start, stop) @ x
        weight = self.merged.below(name, shape, start, stop)
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
        return weight.flatten(1) @ x + added

    def _compare(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Whether `found` is `wanted`, rounded."""
        if not found.is_floating_point() or not found.numel():
            fine = torch.equal(found, wanted.to(found.dtype))
        else:
            kind, sizes = torch.finfo(found.dtype), wanted.abs()
            off = (found.float() - wanted).abs_().sub_(sizes, alpha=kind.eps / 2)
            fine = bool(off.max() <= kind.smallest_normal * kind.eps + FLOAT * sizes.max())
        if not fine:
            raise self._differs(name, found)

    def _differs(self, name: str, found: torch.Tensor) -> UserError:
        if found.is_floating_point() and not torch.isfinite(found).all():
            return _failed(f"{name} has values that are not finite")
        return _failed(f"{name} is further from what base and adapters give than rounding is")


def _near(
    found: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, energy: float, dtype: torch.dtype
) -> bool:
    """Whether rows of a weight, rounded to `dtype`, times tokens are what they are to be, [rows, tokens]; `energy` is
    the mean square of the tokens' numbers.

    Random rounding makes errors of a mean square that follows from the row's numbers and, for tokens of which few
    numbers are large, from the product itself. Most often the latter alone is enough to tell.
    """
    kind = torch.finfo(dtype)
    off, sizes = (found - wanted).square().mean(1), wanted.square().mean(1)
    if (off <= sizes * (ROUNDING * kind.eps) ** 2 / 12).all():
        return True
    if not torch.isfinite(off).all():
        return False
    squares = torch.linalg.vector_norm(weight, dim=1).square() * energy + sizes
    least = (kind.smallest_normal * kind.eps) ** 2 * weight.shape[1] * energy
    noise = (squares * kind.eps**2 + least) / 12 + FLOAT**2 * (squares + squares.mean())
    return bool((off <= ROUNDING**2 * (noise + torch.finfo(noise.dtype).tiny)).all())


def verify(
    written: Model, merged: Merged, model: Changed, ids: list[int], workers: Workers
) -> dict[str, Any]:
    """Compare what was written with what was to be (`model`, made by `merged`), tensor by tensor in name,
    shape, dtype and numbers, and in the logits of the tokens `ids`; return the figures.

    Raises UserError for what differs by more than rounding does.
    """
    _check_shapes(written, model)
    config, names = written.config(), list(written)
    if config["vocab_size"] != model.meta(EMBED)[0][0]:
        raise _failed(f"config.json says vocab_size {config['vocab_size']:,}")
    beside, figures = Beside(written, merged, model, workers), None
    if knows(config) and sized(config):
        bar = track(range(config["num_hidden_layers"]), "verifying", config["num_hidden_layers"], "layers")
        steps = iter(bar)
        both = logits(beside, config, ids, lambda: next(steps))
        figures = _figures(*both.split(len(ids)))
    beside.rest(names if figures else track(names, "verifying", len(names), "tensors"))
    return {"tensors": len(names), "logits": figures}


def probe(directory: Path, rows: int) -> list[int]:
    """The first ids of the probe text for the tokenizer of a model; ids from all over its vocabulary where it
    has none."""
    with contextlib.suppress(BadFile):  # some call other formats tokenizer.model
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


def _figures(wanted: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """How far logits [tokens, vocab] are apart; the difference as a share of their spread."""
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean().sqrt()
    return {
        "tokens": len(wanted),
        "difference": float((found - wanted).square().mean().sqrt() / spread) if spread > 0 else 0.0,
        "largest": float((found - wanted).abs().max()),
        "same_next_token": int((found.argmax(1) == wanted.argmax(1)).sum()),
    }


def _failed(what: str) -> UserError:
    return UserError(f"The merged model is not what it should be: {what}; nothing is kept of it.")


def told(figures: dict[str, Any] | None) -> str:
    """One line about the figures of `verify`."""
    if figures is None:
        return "Not verified."
    if figures["logits"] is None:
        return f"Verified: {figures['tensors']} tensors are base + adapters, rounded; logits are not compared for this kind of model."
    found = figures["logits"]
    return (
        f"Verified: {figures['tensors']} tensors are base + adapters, rounded; logits differ by "
        f"{100 * found['difference']:.2g} % of their spread (rounding), same next token at "
        f"{found['same_next_token']} of {found['tokens']} places."
    )
