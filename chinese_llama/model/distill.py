"""Input rows that make the model think of a new piece what it thought of the piece's parts.

Token Distillation (arXiv 2505.20133): the hidden states of the base on the old segmentation of a text are
the target, and the rows of the new pieces are trained until the new segmentation gives the same states.
Nothing else trains, and no text has to be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from chinese_llama.data.formats import texts
from chinese_llama.errors import DoesNotFit
from chinese_llama.progress import track

SNIPPET = 48  # new ids
TIMES = 16  # so often a piece is learnt from; more frequent ones are seen more often beside rarer ones
CHARACTERS = 50_000_000  # of the corpus are looked at
MOST = 6_000  # snippets that are learnt from, drawn from all that were found
BATCH = 32  # snippets
RATE = 0.05  # first learning rate, in standard deviations of the old rows' elements; it falls to zero
KEPT_APART = 20  # one snippet in so many measures the result
SEED = 20_000

Ids = list[int]


def distill(
    base: Path,
    tokenizer: Path,
    corpus: Sequence[Path],
    rows: torch.Tensor,
    parts: Sequence[Sequence[int]],
    old_size: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Trained input rows, float32 [new, hidden], and figures: snippets, pieces that occur in them, and the
    error on snippets kept apart before and after, as a share of the target's variance.

    `rows` [new, hidden] is where they start, and where pieces that the corpus lacks stay; `parts` are the
    old ids of each new piece, `old_size` is the first new id. Raises DoesNotFit for a corpus without any.
    """
    from chinese_llama.model.load import device, load_model, load_tokenizer, quiet_libraries

    quiet_libraries()
    found = list(snippets(load_tokenizer(tokenizer), corpus, parts, old_size))
    if len(found) < 2:
        raise DoesNotFit("--corpus: hardly a new piece occurs in these texts; give texts in their language.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED)).tolist()
    found = [found[index] for index in order[:MOST]]
    apart = found[: -(-len(found) // KEPT_APART)]
    learnt = found[len(apart) :]
    model = load_model(base).to(device()).requires_grad_(False)
    student = Student(model, rows, parts, old_size)
    before = student.error(apart)
    student.train(learnt)
    seen = {index for ids in learnt for index in ids if index >= old_size}
    figures = {"snippets": len(learnt), "pieces": len(seen), "error": [before, student.error(apart)]}
    return student.rows.detach().float().cpu(), figures


def snippets(
    tokenizer: Any, corpus: Sequence[Path], parts: Sequence[Sequence[int]], old_size: int
) -> Iterator[Ids]:
    """Snippets of new ids, as long as each still holds a piece that was seen less than TIMES times."""
    counts: dict[int, int] = {}
    left = CHARACTERS
    for path in corpus:
        for text in track(texts(path), f"looking for new pieces in {path.name}", unit="documents"):
            if left <= 0:
                return
            left -= len(text)
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for start in range(0, len(ids), SNIPPET):
                snippet = ids[start : start + SNIPPET]
                new = {index for index in snippet if index >= old_size and parts[index - old_size]}
                if any(counts.get(index, 0) < TIMES for index in new):
                    for index in new:
                        counts[index] = counts.get(index, 0) + 1
                    yield [tokenizer.bos_token_id, *snippet]


class Student:
    """A frozen model that reads old and new segmentations; `rows` [new, hidden] train, in float32."""

    def __init__(self, model: Any, rows: torch.Tensor, parts: Sequence[Sequence[int]], old_size: int) -> None:
        self.model, self.parts, self.old_size = model.base_model, parts, old_size
        self.old = model.get_input_embeddings().weight
        self.rows = rows.to(self.old.device, torch.float32, copy=True).requires_grad_()

    def train(self, learnt: list[Ids]) -> None:
        """One pass over the snippets; rows that a batch lacks stay where they are in it."""
        rate = RATE * float(self.old[: self.old_size].float().std())
        optimizer = torch.optim.SparseAdam([self.rows], lr=rate)
        batches = [learnt[start : start + BATCH] for start in range(0, len(learnt), BATCH)]
        for step, batch in enumerate(track(batches, "distilling", len(batches), "batches")):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    @torch.no_grad()
    def error(self, apart: list[Ids]) -> float:
        """The loss on snippets that are not learnt from."""
        batches = [apart[start : start + BATCH] for start in range(0, len(apart), BATCH)]
        return sum(float(self.loss(batch)) * len(batch) for batch in batches) / len(apart)

    def loss(self, batch: list[Ids]) -> torch.Tensor:
        """Mean squared distance of the last hidden states, new segmentation from old, over the ids from the
        first new one on; in units of the target's variance over those, so that it is one for every model."""
        device = self.old.device
        ids = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True, padding_value=-1)
        counts = (ids >= self.old_size).cumsum(1)
        wanted = ((ids >= 0) & (counts > 0)).to(device)
        target = self._target(batch).to(device)[wanted]
        states = self.model(inputs_embeds=self._embed(ids.clamp(min=0).to(device)), use_cache=False)
        distance = (states.last_hidden_state[wanted].float() - target).square().sum(1).mean()
        return distance / (target - target.mean(0)).square().sum(1).mean()

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, ids, hidden] of new ids, gradients for the new ones only."""
        states = torch.nn.functional.embedding(ids.clamp(max=self.old_size - 1), self.old)
        is_new = ids >= self.old_size
        new = torch.nn.functional.embedding(ids[is_new] - self.old_size, self.rows, sparse=True)
        states[is_new] = new.to(states.dtype)
        return states

    @torch.no_grad()
    def _target(self, batch: list[Ids]) -> torch.Tensor:
        """Hidden states [batch, ids, hidden] of the old segmentation, after the last part of each new id."""
        old = [[self._old_ids(index) for index in ids] for ids in batch]
        flat = [torch.tensor([part for ids in pieces for part in ids]) for pieces in old]
        ends = [torch.tensor([len(ids) for ids in pieces]).cumsum(0) - 1 for pieces in old]
        ids = pad_sequence(flat, batch_first=True).to(self.old.device)
        states = self.model(input_ids=ids, use_cache=False).last_hidden_state.float()
        rows = torch.arange(len(batch), device=self.old.device)[:, None]
        return states[rows, pad_sequence(ends, batch_first=True).to(self.old.device)]

    def _old_ids(self, index: int) -> Sequence[int]:
        if index < self.old_size:
            return [index]
        return self.parts[index - self.old_size] or [0]
