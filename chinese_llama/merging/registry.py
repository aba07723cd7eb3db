"""What is known of published adapters, their bases and tokenizers: merge/adapters.yaml. No torch here."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from chinese_llama.config import load_yaml
from chinese_llama.resources import shipped


@dataclass(frozen=True)
class Vocabulary:
    """A published tokenizer: its pieces, and the sha256 of tokenizer.model."""

    name: str
    pieces: int
    sha256: str


@dataclass(frozen=True)
class Base:
    """A model that published adapters were trained on: its size, and the sha256 of its weight files in
    order, as Meta has them and as the adapters' authors converted them."""

    name: str
    hidden_size: int
    layers: int
    norm_eps: float
    tokenizer: Vocabulary
    meta: tuple[str, ...]
    huggingface: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A published adapter. `after`: names of the adapters that must lie below it, in order; `sha256`: of its
    adapter_model.bin."""

    name: str
    hub: str
    base: Base
    after: tuple[str, ...]
    tokenizer: Vocabulary
    sha256: str


@dataclass(frozen=True)
class Registry:
    """Everything in merge/adapters.yaml, by name."""

    bases: dict[str, Base] = field(default_factory=dict)
    tokenizers: dict[str, Vocabulary] = field(default_factory=dict)
    adapters: dict[str, Published] = field(default_factory=dict)

    def adapter(self, item: str) -> Published | None:
        """The adapter with this name or hub id."""
        hubs = {entry.hub: entry for entry in self.adapters.values()}
        return self.adapters.get(item) or hubs.get(item)

    def by_sha256(self, sha256: str) -> Published | None:
        """The adapter whose adapter_model.bin has this sha256."""
        return next((entry for entry in self.adapters.values() if entry.sha256 == sha256), None)


@functools.cache
def registry() -> Registry:
    """The registry that comes with the package."""
    content = load_yaml(shipped("merge") / "adapters.yaml")
    words = {name: Vocabulary(name, **entry) for name, entry in content["tokenizers"].items()}
    bases = {
        name: Base(
            name,
            entry["hidden_size"],
            entry["layers"],
            entry["norm_eps"],
            words[entry["tokenizer"]],
            tuple(entry["meta"]),
            tuple(entry["huggingface"]),
        )
        for name, entry in content["bases"].items()
    }
    adapters = {
        name: Published(
            name,
            entry["hub"],
            bases[entry["base"]],
            tuple(entry["after"]),
            words[entry["tokenizer"]],
            entry["sha256"],
        )
        for name, entry in content["adapters"].items()
    }
    return Registry(bases, words, adapters)
