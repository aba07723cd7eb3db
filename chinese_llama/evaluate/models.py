"""What is measured: a plain model, or a base with adapters that stay unmerged."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import hash_ahead, identity
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.hub import local
from chinese_llama.merging.adapter import Adapter, read_object
from chinese_llama.merging.belongings import tokenizer_of
from chinese_llama.merging.lineage import FORCE
from chinese_llama.merging.plan import check_base, check_lineage


@dataclass
class Subject:
    """A model to measure: `place` is a directory or a hub id; `adapters`, of weight 1, are on it in their order.
    `name` is what tables call it."""

    name: str
    place: str
    adapters: list[Adapter] = field(default_factory=list)

    @cached_property
    def directory(self) -> Path:
        """Where the weights lie; a hub id's are fetched."""
        return local(self.place)

    @property
    def tokenizer(self) -> Path | None:
        """Where the tokenizer lies: beside the last adapter that brings one, else beside the weights."""
        return tokenizer_of(self.directory, self.adapters)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at once: what config.json says, else what transformers takes it for; None where
        neither does."""
        found = read_object(self.directory / "config.json").get("max_position_embeddings")
        if found is None:
            from transformers import AutoConfig

            with contextlib.suppress(Exception):  # loading the model tells what is wrong
                known = AutoConfig.from_pretrained(str(self.directory), local_files_only=True)
                found = getattr(known, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def identity(self) -> str:
        """sha256 of the weights; with adapters, over that and theirs."""
        places = [self.directory, *(adapter.path for adapter in self.adapters)]
        hash_ahead(places)
        found = [identity(place) for place in places]
        return hashlib.sha256("\n".join(found).encode()).hexdigest() if self.adapters else found[0]

    def digest(self) -> str:
        """sha256 over all that figures and answers depend on: the weights, config.json, tokenizer and template."""
        beside = self.tokenizer or self.directory
        names = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
        files = [
            self.directory / "config.json",
            *(file for name in names for file in sorted(beside.glob(name))),
        ]
        found = [self.identity(), *(f"{file.name} {identity(file)}" for file in files if file.is_file())]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()


def check_subject(subject: Subject) -> None:
    """Raise BadFile or DoesNotFit for what can be told without a tensor: no model or tokenizer, a tokenizer of
    another size, adapters that do not belong on it."""
    from chinese_llama.model.load import check_rows, load_tokenizer

    place = subject.directory
    if not place.is_dir():
        raise BadFile(place, "no such directory; a model is wanted here.")
    if not (place / "config.json").is_file():
        raise BadFile(place, "holds no model (no config.json).")
    if subject.tokenizer is None:
        raise BadFile(
            place,
            "has no tokenizer (tokenizer.json or tokenizer.model); put the one that it was made with there.",
        )
    if subject.adapters:
        check_base(place)
        try:
            check_lineage(place, subject.adapters)
        except DoesNotFit as error:
            raise DoesNotFit(str(error).replace(f"; {FORCE}", ".")) from error
    elif isinstance(rows := read_object(place / "config.json").get("vocab_size"), int):
        check_rows(rows, load_tokenizer(subject.tokenizer), subject.place)


def open_subject(subject: Subject) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode, on the GPU if there is one: all adapters but the last baked in, the
    last one live, as PEFT runs it.

    Raises BadFile or DoesNotFit where parts are damaged or do not belong together.
    """
    from chinese_llama.merging.live import bake_in, fitting_rows, grow, live
    from chinese_llama.model.load import check_pair, device, load_model, load_tokenizer

    check_subject(subject)
    place, adapters = subject.directory, subject.adapters
    tokenizer = load_tokenizer(subject.tokenizer or place)
    rows = fitting_rows(place, adapters) if adapters else None
    model = load_model(place)
    bake_in(model, place, adapters[:-1])
    grow(model, rows)
    check_pair(model, tokenizer, place)
    if adapters:
        model = live(model, adapters[-1])
    return model.to(device()), tokenizer
