"""The two kinds of data, documents and conversations: how they are read, tokenised and packed."""

from __future__ import annotations

import copy
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from chinese_llama.data.conversations import Message, file_conversations
from chinese_llama.data.formats import file_documents
from chinese_llama.data.packing import Array, Blocks, Parts, pack_documents, pack_samples, parts
from chinese_llama.data.templates import IGNORE, Sample, samples


@dataclass
class Encoded:
    """Items as parts; the documents, characters and bytes in them; how many were dropped or cut, by reason."""

    parts: Parts
    documents: int
    characters: int
    bytes: int
    dropped: Counter[str] = field(default_factory=Counter)


class Kind(Protocol):
    """`read` gives the items of a file and counts what it leaves out, `size` is that of an item in characters.
    `encode` may run in a thread while `collect` makes parts of what it gave before; `ordinals` are those of
    the items in their source. `pack` gives blocks and what is left for the next ones."""

    def read(self, file: Path, left_out: Counter[str]) -> Iterator[Any]: ...

    def size(self, item: Any) -> int: ...

    def encode(self, items: list[Any]) -> Any: ...

    def collect(self, items: list[Any], ordinals: list[int], encoded: Any) -> Encoded: ...

    def pack(self, stream: Parts, last: bool) -> tuple[Blocks, Parts]: ...


class Documents:
    """Each as bos, the ids of the text and eos; literal control tokens in a text stay text."""

    def __init__(self, tokenizer: Any, block_size: int) -> None:
        self.bos, self.eos, self.block_size = tokenizer.bos_token_id, tokenizer.eos_token_id, block_size
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def read(self, file: Path, left_out: Counter[str]) -> Iterator[str]:
        return file_documents(file)

    def size(self, item: str) -> int:
        return len(item)

    def encode(self, items: list[str]) -> Any:
        return self.backend.encode_batch_fast(items, add_special_tokens=False)

    def collect(self, items: list[str], ordinals: list[int], encoded: Any) -> Encoded:
        lengths = np.fromiter(map(len, encoded), np.int64, len(items)) + 2
        ends = lengths.cumsum()
        ids: Array = np.empty(int(lengths.sum()), np.int32)
        ids[ends - lengths], ids[ends - 1] = self.bos, self.eos
        for encoding, end, length in zip(encoded, ends.tolist(), lengths.tolist(), strict=True):
            ids[end - length + 1 : end - 1] = array("I", encoding.ids)  # twice as fast as numpy from a list
        sizes = sum(map(len, items)), sum(len(text.encode()) for text in items)
        return Encoded(Parts(ids, lengths, np.array(ordinals, np.int64)), len(items), *sizes)

    def pack(self, stream: Parts, last: bool) -> tuple[Blocks, Parts]:
        return pack_documents(stream, self.block_size, last)


class Conversations:
    """Each as `template` writes it; see `fit` for those longer than a block. Characters and bytes are those
    of the messages; those of a conversation that is cut count by its share of the tokens."""

    def __init__(
        self, tokenizer: Any, block_size: int, template: str, too_long: str, bad_records: str, format: str
    ) -> None:
        self.tokenizer, self.block_size, self.template = tokenizer, block_size, template
        self.too_long, self.bad_records, self.format = too_long, bad_records, format

    def read(self, file: Path, left_out: Counter[str]) -> Iterator[list[Message]]:
        return file_conversations(file, self.format, self.bad_records, left_out)

    def size(self, item: list[Message]) -> int:
        return sum([len(message["content"]) for message in item])

    def encode(self, items: list[list[Message]]) -> list[Sample]:
        return samples(self.tokenizer, self.template, items)

    def collect(self, items: list[list[Message]], ordinals: list[int], encoded: list[Sample]) -> Encoded:
        kept, places, dropped = [], [], Counter[str]()
        characters = size = 0.0
        for messages, ordinal, whole in zip(items, ordinals, encoded, strict=True):
            sample, reason = fit(whole, self.block_size, self.too_long)
            if reason:
                dropped[reason] += 1
            if sample is None:
                continue
            kept.append(sample)
            places.append(ordinal)
            share = len(sample.input_ids) / len(whole.input_ids)
            characters += self.size(messages) * share
            size += len("".join([message["content"] for message in messages]).encode()) * share
        found = parts([sample.input_ids for sample in kept], places, [sample.labels for sample in kept])
        return Encoded(found, len(kept), round(characters), round(size), dropped)

    def pack(self, stream: Parts, last: bool) -> tuple[Blocks, Parts]:
        return pack_samples(stream, self.block_size), parts([], [], [])


def fit(sample: Sample, block_size: int, too_long: str) -> tuple[Sample | None, str]:
    """What of a sample fits into `block_size` tokens, and the reason why it is less than all, or "".

    A sample that is too long ends after its last answer that fits; with `too_long` "truncate" the answer
    that does not fit is cut, and its last token (the end of the turn) follows the cut and is learnt.
    """
    reason = ""
    if len(sample.input_ids) > block_size:
        fitting = [end for end in sample.turns if end <= block_size]
        before = fitting[-1] if fitting else 0
        if len(fitting) == len(sample.turns):  # what does not fit is only what follows the last answer
            sample = _first(sample, before)
        elif too_long == "truncate" and _learns(sample.labels[before : block_size - 1]):
            end = sample.input_ids[sample.turns[len(fitting)] - 1]
            cut = _first(sample, block_size - 1)
            sample = Sample([*cut.input_ids, end], [*cut.labels, end], [*fitting, block_size])
            reason = "answers_cut"
        elif fitting:
            sample, reason = _first(sample, before), "turns_cut"
        else:
            return None, "too_long"
    return (sample, reason) if _learns(sample.labels[1:]) else (None, "nothing_learnt")


def _first(sample: Sample, tokens: int) -> Sample:
    turns = [end for end in sample.turns if end <= tokens]
    return Sample(sample.input_ids[:tokens], sample.labels[:tokens], turns)


def _learns(labels: list[int]) -> bool:
    return labels.count(IGNORE) < len(labels)
