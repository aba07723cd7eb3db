"""What tensors of a training step take, counted: those that are there all the time, and those that operations make."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chinese_llama.train.estimate import Settings

FIXED = ("frozen weights", "trainable parameters", "gradients", "optimizer")


class Norm(torch.autograd.Function):
    """RMSNorm as a GPU's kernel has it: what is kept is its input, and a number for each token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        given = (gradient * weight).float()
        inner = (given * x).mean(-1, keepdim=True)
        return (scale * (given - x.float() * inner * scale * scale)).to(x.dtype), None, None


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still there: `now`, and at the most `peak`."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in given:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@dataclasses.dataclass
class Run:
    """A model as a recipe trains it, after one step: gradients and optimizer states are there."""

    model: Any
    settings: Settings
    optimizer: Any
    batch: dict[str, torch.Tensor]

    @property
    def trained(self) -> list[Any]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self) -> torch.Tensor:
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.half):
            return self.model(**self.batch).loss

    def frozen(self) -> list[torch.Tensor]:
        """Frozen weights and buffers, with what bitsandbytes keeps beside them."""
        tensors = [p.data for p in self.model.parameters() if not p.requires_grad]
        tensors += [b for name, b in self.model.named_buffers() if "inv_freq" not in name]
        for module in self.model.modules():
            state, weight = getattr(module, "state", None), getattr(module, "weight", None)
            if quant := getattr(weight, "quant_state", None):
                tensors += [quant.absmax, quant.code, quant.offset, quant.state2.absmax, quant.state2.code]
            for holder in (state, weight):
                tensors += [
                    t for t in (getattr(holder, "CB", None), getattr(holder, "SCB", None)) if t is not None
                ]
        return tensors

    def fixed(self) -> dict[str, int]:
        """Bytes of what is there all the time."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        tensors = [self.frozen(), [p.data for p in self.trained], [p.grad for p in self.trained], states]
        return {part: size_of(found) for part, found in zip(FIXED, tensors, strict=True)}

    def step(self) -> tuple[int, int]:
        """Bytes that a further micro batch keeps after its forward pass, and takes at the most."""
        known = [*self.frozen(), *self.model.buffers(), *self.batch.values()]
        known += [t for p in self.trained for t in (p.data, p.grad)]
        with Alive(known) as alive:
            loss = self.loss()
            kept = alive.now
            loss.backward()
        return kept, alive.peak


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
