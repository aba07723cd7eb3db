"""Rows of prepared data as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from chinese_llama.data.templates import IGNORE


class Collator:
    """Makes a batch of rows of prepared data (see chinese_llama.data.work).

    input_ids, labels and position_ids, each int64 [batch, block_size]; `documents`: for each row the number of
    its source and the ordinals of the documents in it. Positions start again with every part and in the
    filler: a model called with them, without a mask and without a cache, attends within a part only. With
    `across_documents` they run through the block. The first token of a part is no target, nor is filler.
    Instructions also have `learnt`, the number of targets: known here, nobody has to ask the GPU for it.
    With `bounds` the batch also says where parts begin, as chinese_llama.model.attention takes it: filler is a part.
    """

    def __init__(
        self, block_size: int, pad_id: int, across_documents: bool = False, bounds: bool = False
    ) -> None:
        self.block_size, self.pad_id, self.across_documents = block_size, pad_id, across_documents
        self.bounds = bounds

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        shape = (len(rows), self.block_size)
        lengths = [np.asarray(row["lengths"], np.int64) for row in rows]
        tokens = np.array([[part.sum()] for part in lengths])
        filled = np.arange(self.block_size) < tokens
        ids: Any = np.full(shape, self.pad_id, np.int64)
        ids[filled] = np.concatenate([row["input_ids"] for row in rows])
        rest = self.block_size - tokens
        whole = np.concatenate([part for pair in zip(lengths, rest, strict=True) for part in pair])
        whole = whole[whole > 0]  # a full block has no filler
        starts = whole.cumsum() - whole
        labels = np.where(filled, ids, IGNORE)
        if "learnt" in rows[0]:
            learnt = np.concatenate([row["learnt"] for row in rows])
            labels[filled] = np.where(learnt, labels[filled], IGNORE)
        labels.flat[starts] = IGNORE
        if self.across_documents:
            whole = np.full(len(rows), self.block_size)
            starts = np.arange(len(rows)) * self.block_size
        positions = np.arange(labels.size) - np.repeat(starts, whole)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions.reshape(shape)),
            "documents": [(int(row["source"]), [int(n) for n in row["documents"]]) for row in rows],
        }
        if "learnt" in rows[0]:
            batch["learnt"] = int((labels[:, 1:] != IGNORE).sum())
        if self.bounds:
            ends = torch.from_numpy(np.append(starts, labels.size).astype(np.int32))
            batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
            batch |= dict.fromkeys(("max_length_q", "max_length_k"), int(whole.max()))
        return batch
