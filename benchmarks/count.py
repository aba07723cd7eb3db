"""What a training step costs, by count: operations, bytes and the limit that they give. Nothing is run.

    python -m benchmarks count                     # 7B on an H200
    python -m benchmarks count --hidden 5120 --inner 13824 --layers 40 --heads 40

Counted per token: products of matrices (a multiplication and an addition are two operations), and bytes that eager
kernels read and write beside them: a kernel that adds two tensors of n numbers of 2 bytes moves 6 n. What a product
reads and writes itself is taken to be hidden behind its arithmetic. The limit is the sum of both times; the backward
pass of what is no product counts twice its forward pass, and what is made again once more.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import markdown, options_of, record
from chinese_llama.train.estimate import Settings, estimate

QLORA = Settings(quantization="nf4", checkpointing=True, optim="paged_adamw_8bit")
LOGITS = Settings.logits  # that ours holds at once on a GPU

WAYS = {
    "new-rows": "ours, `embeddings: new-rows`",
    "full": "ours, `embeddings: full`",
    "token-indices": "PEFT, `trainable_token_indices`",
    "modules-to-save": "PEFT, `modules_to_save` in float32, logits whole",
}


@dataclass(frozen=True)
class Step:
    """A step of `tokens` in rows of `seq`, with LoRA of rank 8 on all seven projections of a LLaMA in bfloat16, dropout,
    and no recomputation of products."""

    hidden: int
    inner: int
    layers: int
    rows: int
    new: int
    tokens: int
    seq: int
    rank: int = 8

    @property
    def inputs(self) -> int:
        """Numbers that the projections of a layer are given of a token."""
        return 6 * self.hidden + self.inner

    @property
    def outputs(self) -> int:
        """And what they give."""
        return 5 * self.hidden + 2 * self.inner

    def trained(self, way: str) -> int:
        """Numbers that train in one vocabulary matrix."""
        return self.hidden * (self.rows if way in ("full", "modules-to-save") else self.new)

    def operations(self, way: str) -> dict[str, float]:
        """Of a token, by part. PEFT makes the gradient of the whole lm_head, whatever trains of it."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)
        matrix = self.rows * self.hidden
        gradient = self.trained(way) if way in ("new-rows", "full") else matrix
        lora = self.rank * (self.inputs + self.outputs) * self.layers
        attention = 2 * self.seq * self.hidden * self.layers  # causal: half of all pairs; scores, and sums
        return {
            "4N": 4.0 * (weights + matrix),
            "rows' gradient": 2.0 * gradient,
            "LoRA": 6.0 * lora,
            "attention": 3.5 * attention,  # the backward pass is 2.5 times the forward one
        }

    def layer_bytes(self, way: str) -> float:
        """That a token's way through the layers moves beside products, both ways."""
        h, i = self.hidden, self.inner
        rope, residual, product = 40 * h, 12 * h, 10 * i
        if way in ("new-rows", "full"):
            norms, lora = (
                2 * 4 * h,
                8 * self.inputs + 4 * self.outputs,
            )  # mask and its product; added in the product
            again = 5 * 4 * h + product + 8 * self.inputs
        else:  # norms in seven kernels; to float32, dropout, and back; scaled, added
            norms, lora, again = 2 * 36 * h, 21 * self.inputs + 12 * self.outputs, 0
        return self.layers * (3.0 * (norms + rope + residual + product + lora) + again)

    def vocabulary_bytes(self, way: str) -> float:
        """That the step moves for both matrices and the loss, the optimizer included, divided by its tokens."""
        trained, matrix = self.trained(way), self.rows * self.hidden
        optimizer = (
            2 * trained * (28 + 12)
        )  # AdamW: 4 read, 3 written; the norm of gradients, and their scaling
        if way in ("new-rows", "full"):
            chunks = max(1, self.tokens * self.rows // LOGITS)
            loss = 33 * self.tokens * self.rows + chunks * 12 * trained
            copies = trained * (6 + 8 + 8)  # to bfloat16; scaled, and those of the lookup added up
        else:
            loss = 38 * self.tokens * self.rows
            copies = matrix * 6 + 2 * matrix * (
                4 + 6
            )  # the head's copy; dense gradients, made and taken over
            if way == "token-indices":
                copies += 2 * matrix * 4 + 2 * trained * 6
        return (optimizer + loss + copies) / self.tokens

    def vocabulary_memory(self, way: str) -> float:
        """Bytes held for both matrices at the fullest moment, without the logits."""
        trained, matrix = self.trained(way), self.rows * self.hidden
        held = 2 * 2 * matrix + 2 * 16 * trained  # frozen; parameters, gradients, both moments
        if way in ("new-rows", "full"):
            return held + (4 + 2) * trained  # the gradient made ahead, the copy in bfloat16
        if way == "token-indices":
            return held + 2 * 4 * trained + 2 * 2 * matrix  # as they were; the copy, and its gradient
        return held + 2 * 2 * matrix

    def kept(self, way: str) -> float:
        """Bytes that the layers keep for the backward pass: what norms and attention are given and give, products of
        the MLP; PEFT's way also what each A is given after dropout, its mask, and float32 of what norms are given."""
        h, i = self.hidden, self.inner
        layer = 2 * 2 * h + 8 * h + 4 * i
        if way not in ("new-rows", "full"):
            layer += 2 * 2 * h + 2 * i + 3 * self.inputs
        return float(self.tokens * self.layers * layer)

    def logits_memory(self, way: str) -> float:
        """Bytes of logits: bfloat16, float32, their logarithms, and in PEFT's way their gradient."""
        whole = self.tokens * self.rows
        return 10.0 * min(LOGITS, whole) if way in ("new-rows", "full") else 14.0 * whole


def main(argv: Sequence[str]) -> None:
    """Count, and record the table."""
    options = parse(argv)
    sizes = ("hidden", "inner", "layers", "rows", "new", "tokens", "seq")
    step = Step(**{name: getattr(options, name) for name in sizes})
    notes = (
        f"{step.layers} layers, hidden {step.hidden}, vocabulary {step.rows:,} ({step.new:,} new), {step.tokens:,} tokens a step in "
        f"rows of {step.seq:,}; {options.tflops:g} TFLOP/s, {options.tbytes:g} TB/s. By the recipes' own estimate `new-rows` takes "
        f"{in_all(step, options.heads):.1f} GiB in all, QLoRA (nf4, activation checkpointing, 8-bit Adam) with one row "
        f"{in_all(step, options.heads, QLORA):.1f} GiB."
    )
    header = [
        "",
        "GFLOP a token: 4N, rows' gradient, LoRA, attention",
        "MB moved a token: layers, vocabulary",
        "vocabulary, GB held",
        "logits, GB",
        "layers keep, GB",
        "limit, tokens/s",
        "4N of the matrix rate",
    ]
    rows = [line(step, way, options.tflops * 1e12, options.tbytes * 1e12) for way in WAYS]
    record("count", markdown(header, rows), notes, options.results)


def in_all(step: Step, heads: int, more: Settings | None = None) -> float:
    """GiB of a step of ours, `more` or with all its rows, by chinese_llama.train.estimate."""
    config = {"hidden_size": step.hidden, "intermediate_size": step.inner, "num_hidden_layers": step.layers}
    config |= {"vocab_size": step.rows, "num_attention_heads": heads}
    batch = 1 if more else step.tokens // step.seq
    chosen = dataclasses.replace(more or Settings(), new_rows=step.new, batch=batch, block=step.seq)
    return estimate(config, chosen).total / 2**30


def line(step: Step, way: str, rate: float, bandwidth: float) -> list[str]:
    """A row of the table: `rate` in operations, `bandwidth` in bytes a second."""
    operations = step.operations(way)
    moved = (step.layer_bytes(way), step.vocabulary_bytes(way))
    seconds = sum(operations.values()) / rate + sum(moved) / bandwidth
    return [
        WAYS[way],
        ", ".join(f"{value / 1e9:.2f}" for value in operations.values()),
        ", ".join(f"{value / 1e6:.1f}" for value in moved),
        f"{step.vocabulary_memory(way) / 1e9:.2f}",
        f"{step.logits_memory(way) / 1e9:.2f}",
        f"{step.kept(way) / 1e9:.1f}",
        f"{1 / seconds:,.0f}",
        f"{operations['4N'] / seconds / rate:.0%}",
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options_of(__doc__)
    for name, value in (
        ("hidden", 4096),
        ("inner", 11008),
        ("layers", 32),
        ("rows", 49_953),
        ("new", 17_953),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro batch; default: %(default)s")
    parser.add_argument("--seq", type=int, default=2048, help="default: %(default)s")
    parser.add_argument(
        "--tflops", type=float, default=790, help="bfloat16 products; default: %(default)s, an H200"
    )
    parser.add_argument(
        "--tbytes", type=float, default=4.8, help="memory, TB/s; default: %(default)s, an H200"
    )
    return parser.parse_args(argv)
