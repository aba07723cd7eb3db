"""What a training run needs of a device's memory, by part: arithmetic on config.json and the settings.

Counted are the tensors of one process at the fullest moment of a step. A GPU also holds what no
arithmetic knows (the CUDA context, half a GiB or more; fragmentation; buffers of NCCL and DeepSpeed):
leave a tenth of it free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chinese_llama.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARDED: dict[str, tuple[str, ...]] = {  # parts that are divided among the processes; a quantised base is not
    "none": (),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("frozen weights", "trainable parameters", "gradients", "optimizer"),
    "fsdp": ("frozen weights", "trainable parameters", "gradients", "optimizer"),
}
STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}  # numbers; AdamW: 2


@dataclass(frozen=True)
class Settings:
    """What a run is, as far as memory is concerned.

    With `checkpointing`, one of `every` layers keeps only its input; with `offload`, on the host.
    `dtype`: of the frozen weights that are not quantised; `half`: whether the forward pass runs under
    autocast in 16 bits. `batch`: sequences in a micro batch, `block`: tokens of each.
    `sharding`: none (also data parallel), zero2, zero3 or fsdp, over `processes`. `logits`: how many of them are
    there at once (chinese_llama.model.rows.LOGITS).
    """

    dtype: str = "bfloat16"
    half: bool = True
    quantization: str = "none"
    embeddings: str = "new-rows"
    new_rows: int = 0
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    dropout: bool = True
    dora: bool = False
    batch: int = 8
    block: int = 512
    checkpointing: bool = False
    every: int = 1
    offload: bool = False
    optim: str = "adamw_torch_fused"
    processes: int = 1
    sharding: str = "none"
    logits: int = 1 << 26


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment, by part, in order."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def table(self) -> str:
        """The parts in GiB (small models: MiB) as aligned lines, the total last."""
        unit, scale = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
        rows = [*self.parts.items(), ("together", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / scale:8.2f} {unit}" for name, size in rows)


def settings_of(fields: Any, training: Mapping[str, Any], new_rows: int) -> Settings:
    """The settings of a resolved recipe (its `fields` and `training`), for this process.

    `new_rows` are the rows that `embeddings: new-rows` trains in each matrix.
    """
    processes, sharding = _launched()
    checkpointing = (
        training.get("activation_checkpointing_kwargs") or training.get("gradient_checkpointing_kwargs") or {}
    )
    dtype = "bfloat16" if fields.dtype == "auto" else fields.dtype
    return Settings(
        dtype=dtype,
        half=dtype != "float32" or bool(training.get("bf16") or training.get("fp16")),
        quantization=fields.quantization,
        embeddings=fields.embeddings,
        new_rows=new_rows,
        rank=fields.lora_r,
        targets=tuple(fields.lora_target_modules),
        dropout=fields.lora_dropout > 0,
        dora=fields.use_dora,
        batch=training["per_device_train_batch_size"],
        block=fields.length,
        checkpointing=any(training.get(f"{what}_checkpointing") for what in ("gradient", "activation")),
        every=checkpointing.get("every_n_layers", 1),
        offload=bool(checkpointing.get("offload")),
        optim=str(training.get("optim", Settings.optim)),
        processes=processes,
        sharding=sharding,
    )


def _launched() -> tuple[int, str]:
    """Processes and sharding, as `accelerate launch` tells its processes."""
    sharding = "none"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        sharding = "fsdp"
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        sharding = {"2": "zero2", "3": "zero3"}.get(
            os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", ""), "none"
        )
    return int(os.environ.get("WORLD_SIZE", "1")), sharding


def estimate(config: Mapping[str, Any], settings: Settings) -> Estimate:
    """The memory of a training step of the model that `config` (its config.json, LLaMA's fields) describes.

    Gradients are counted throughout, as from the second micro batch of a step on. Of the moments that can
    be the fullest - the loss, the backward pass of one layer - the larger is counted.
    """
    model = _Model(config, settings)
    sizes = model.trainable()
    trainable = sum(sizes)
    parts = {
        "frozen weights": model.frozen(),
        "trainable parameters": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": sum(_states(settings.optim, size) for size in sizes),
    }
    for part in SHARDED[settings.sharding]:
        if part != "frozen weights" or not model.quantized:
            parts[part] = math.ceil(parts[part] / settings.processes)
    if settings.sharding == "none" and settings.processes > 1:
        parts["gradient buckets"] = 4 * trainable
    parts["activations"] = model.kept()
    parts["copies of weights"] = model.copies()
    return Estimate(parts | max(model.moments(), key=lambda moment: sum(moment.values())))


def _states(optim: str, size: int) -> int:
    """Bytes that an optimizer keeps for a tensor of `size` numbers. The 8-bit ones keep a byte and a scale
    for every 256 (arXiv 2110.02861), and tensors below 4,096 numbers in float32."""
    states = next((count for name, count in STATES.items() if name in optim), 2)
    if "8bit" in optim and size >= 4096:
        return states * (size + 4 * math.ceil(size / 256))
    return states * 4 * size + (4 if "torch" in optim else 0)  # torch's has its step in a tensor


class _Model:
    """The shapes of a LLaMA, and what a run with these settings makes of them. All sizes in bytes."""

    def __init__(self, config: Mapping[str, Any], settings: Settings) -> None:
        self.settings = settings
        try:
            self.hidden, self.inner = config["hidden_size"], config["intermediate_size"]
            self.layers, self.rows = config["num_hidden_layers"], config["vocab_size"]
            self.heads = config["num_attention_heads"]
        except KeyError as missing:
            raise UserError(
                f"The model's config.json has no {missing}; memory is estimated for LLaMA's kind."
            ) from None
        self.dim = config.get("head_dim") or self.hidden // self.heads
        self.wide = self.heads * self.dim
        narrow = (config.get("num_key_value_heads") or self.heads) * self.dim
        self.linear = {  # of a layer: inputs, outputs, and what it is given
            "q_proj": (self.hidden, self.wide, "first norm"),
            "k_proj": (self.hidden, narrow, "first norm"),
            "v_proj": (self.hidden, narrow, "first norm"),
            "o_proj": (self.wide, self.hidden, "heads"),
            "gate_proj": (self.hidden, self.inner, "second norm"),
            "up_proj": (self.hidden, self.inner, "second norm"),
            "down_proj": (self.inner, self.hidden, "product"),
        }
        everything = settings.targets == ("all-linear",)
        self.targets = {
            name: shape for name, shape in self.linear.items() if everything or name in settings.targets
        }
        self.matrices = 1 if config.get("tie_word_embeddings") else 2
        self.matrix = self.rows * self.hidden  # numbers of a vocabulary matrix
        self.tokens = settings.batch * settings.block
        self.quantized = settings.quantization != "none"
        self.stored = BYTES[settings.dtype]  # of a number in a frozen weight
        self.compute = 2 if settings.half else self.stored
        self.trained_rows = {"new-rows": settings.new_rows, "full": self.rows, "frozen": 0}[
            settings.embeddings
        ]

    def trainable(self) -> list[int]:
        """Numbers of each tensor that trains; they are float32."""
        s, sizes = self.settings, []
        for inputs, outputs, _ in self.targets.values():
            sizes += [s.rank * inputs, s.rank * outputs, *([outputs] if s.dora else [])]
        rows = [self.trained_rows * self.hidden] * (self.matrices if self.trained_rows else 0)
        return sizes * self.layers + rows

    def frozen(self) -> int:
        """The base; PEFT keeps it whole beside matrices that train."""
        rest = self.matrices * self.matrix + (2 * self.layers + 1) * self.hidden  # the vocabulary, norms
        return rest * self.stored + self.layers * self.layer_weights()

    def layer_weights(self) -> int:
        """The linear weights of one layer. nf4 (QLoRA, arXiv 2305.14314): 64 numbers share a scale of one byte,
        256 scales a float32, and there are tables of 16 and 256 float32 and an offset. int8: a float32 a row."""
        total = 0
        for inputs, outputs, _ in self.linear.values():
            size = inputs * outputs
            if self.settings.quantization == "nf4":
                scales = math.ceil(size / 64)
                total += math.ceil(size / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)
            elif self.settings.quantization == "int8":
                total += size + 4 * outputs
            else:
                total += size * self.stored
        return total

    def kept(self) -> int:
        """What the forward pass keeps for the backward pass, the logits aside."""
        held = 0 if self.settings.offload else self.stored * self.hidden
        if self.settings.quantization == "int8":  # bitsandbytes holds on to what its layers are given
            held += self.compute * (2 * self.hidden + self.wide + self.inner)
        again = self.recomputed()
        layers = again * held + (self.layers - again) * self.layer()
        top = (
            self.stored * self.hidden + 4 + 2 * self.dim * self.stored + self.settings.block
        )  # norm, angles, mask
        top += self.stored * self.hidden  # the gradient for what lm_head is given
        return self.tokens * (layers + top)

    def layer(self) -> int:
        """What one layer keeps of each token: what both norms are given, and its scale; query, key and value
        (as many as heads), the sum of attention, its softmax' denominators and the token's row of the mask;
        two products of the MLP; what LoRA is given."""
        product = (
            4 if self.quantized and self.stored == 4 else self.compute
        )  # bitsandbytes answers in its input's type
        attention = (4 * self.wide + self.settings.block) * self.compute + 4 * self.heads
        return 2 * (self.stored * self.hidden + 4) + attention + 2 * self.inner * product + self._lora()

    def _lora(self) -> int:
        """What LoRA's B is given of each token; what A is given is made again from what is there. DoRA is PEFT's: after
        dropout, or where autocast has to cast, each A has an input of its own; else those with the same input share it.
        """
        s, total = self.settings, 0
        own = s.dora and (s.dropout or (s.half and (self.stored == 4 or not self.quantized)))
        for inputs, outputs, _ in self.targets.values():
            total += s.rank * self.compute
            total += inputs * self.compute if own else 0
            if s.dora:  # the mask, a byte each, and what the magnitude multiplies
                total += inputs * s.dropout + 2 * outputs * self.compute
        sharing = self.linear if s.quantization == "int8" else self.targets if s.dora and not own else {}
        shared = {
            given: inputs for inputs, _, given in sharing.values() if given != "heads"
        }  # attention keeps its sum
        return total + sum(shared.values()) * self.compute

    def copies(self) -> int:
        """Copies of weights that are kept for the backward pass: what autocast casts."""
        return (self.layers - self.recomputed()) * self._layer_copies()

    def recomputed(self) -> int:
        """Layers of which only the input is kept."""
        return math.ceil(self.layers / self.settings.every) if self.settings.checkpointing else 0

    def _layer_copies(self) -> int:
        """Those of one layer: LoRA, and weights in float32, in 16 bits; DoRA after dropout takes every weight."""
        s = self.settings
        numbers = sum(s.rank * (i + o) for i, o, _ in self.targets.values()) if s.half else 0
        if s.half and not self.quantized and self.stored == 4:
            numbers += sum(i * o for i, o, _ in self.linear.values())
        elif s.dora and s.dropout and (s.half or self.quantized):
            numbers += sum(i * o for i, o, _ in self.targets.values())
        return self.compute * numbers

    def moments(self) -> list[dict[str, int]]:
        """What is there for a while only, at each of the moments that may be the fullest."""
        s = self.settings
        logits = min(self.tokens, max(1, s.logits // self.rows)) * self.rows
        rows, cast = self.trained_rows * self.hidden, self.compute if s.half else 0
        # float32 are the logarithms of the probabilities, and in half precision what they are made from; later the
        # products are there that are added to the rows' gradient
        loss = {
            "logits": self.compute * logits + max((8 if s.half else 4) * logits, cast * rows),
            "gradient of rows": 4 * rows,
            "rows in half precision": cast * (self.matrix if self.stored == 4 else rows),
            "what lm_head is given": self.stored * self.hidden * self.tokens,
        }
        layer = {
            "one layer": (6 if s.half else 14) * self.inner * self.tokens
        }  # gradients, and what they are made of
        if (
            s.checkpointing and (self.layers - 1) % s.every == 0
        ):  # the last one, when all the others are there
            layer["one layer"] += self.layer() * self.tokens + self._layer_copies()
        widest = max(i * o for i, o, _ in self.linear.values())
        if s.dora:  # in float32: the weight, LoRA's product, their sum, and the identity that it is made from
            layer["a weight in full"] = 16 * widest
        elif self.quantized:
            layer["a weight in full"] = self.compute * widest
        if s.sharding in ("fsdp", "zero3"):
            whole = self.stored * self.matrix
            for moment, size in ((loss, whole), (layer, whole + 2 * self.layer_weights())):
                moment["gathered weights"] = size  # lm_head; of the layers, this one and the next
        if self.matrices == 2:
            return [loss, layer]
        layer["gradient of rows"] = (
            4 * rows
        )  # it waits for that of the embedding; activations are gone by then
        return [loss, layer, {"gradients of rows": 12 * rows - self.kept() - self.copies()}]
