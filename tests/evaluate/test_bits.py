"""Bits per character against sums of log-probabilities that transformers gives one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import UserError
from chinese_llama.evaluate import bits
from chinese_llama.evaluate.bits import (
    NotFinite,
    Window,
    score,
    text_windows,
    window_length,
    window_nats,
    window_stride,
    windows,
)
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny
from tests.evaluate.scoring import evaluate_text

LENGTHS = st.integers(2, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
LONG = " ".join(tiny.ENGLISH[:12])


@pytest.fixture(scope="module")
def model(extended: Path) -> Any:
    return load_model(extended, "float32")


@pytest.fixture(scope="module")
def reader(extended: Path) -> Any:
    return load_tokenizer(extended)


@torch.no_grad()
def log_probability(model: Any, context: list[int], wanted: int) -> float:
    """Natural logarithm of the probability of `wanted` after `context`: one forward pass for it."""
    last = model(torch.tensor([context])).logits[0, -1].double()
    return float(torch.log_softmax(last, -1)[wanted])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100), LENGTHS)
def test_windows_score_every_id_but_the_first_exactly_once(count: int, sizes: tuple[int, int]) -> None:
    length, stride = sizes
    ids = list(range(count))
    scored: list[int] = []
    for number, window in enumerate(windows(ids, length, stride)):
        assert len(window.ids) <= length
        assert window.ids == list(range(window.ids[0], window.ids[-1] + 1))
        assert 1 <= window.context < len(window.ids)
        assert window.ids[0] == number * stride
        assert window.context == (length - stride if number else 1)
        scored += window.ids[window.context :]
    assert scored == ids[1:]


@pytest.mark.parametrize("stride", [128, 500, 0, -1])
def test_a_stride_that_would_skip_ids_is_refused(model: Any, reader: Any, stride: int) -> None:
    """The pico model sees 128 ids: from there on a window would have no context."""
    with pytest.raises(
        UserError, match=f"A stride of {stride} does not fit windows of 128 tokens; give 1 to 127"
    ):
        evaluate_text(model, reader, [LONG], stride=stride)


def test_windows_are_as_long_as_the_model_reads_within_reason() -> None:
    assert window_length(128) == 128
    assert window_length(131_072) == window_length(None) == bits.WINDOW
    assert window_length(131_072, 8192) == window_length(None, 8192) == 8192
    assert window_stride(2) == 1
    with pytest.raises(UserError, match="A window of 129 tokens is longer than the model's context of 128"):
        window_length(128, 129)
    for asked in (1, 0, -5):
        with pytest.raises(UserError, match=f"A window of {asked} leaves nothing"):
            window_length(128, asked)


@pytest.mark.parametrize("chunk", [bits.CHUNK, 7, 1])
def test_a_batch_gives_what_windows_give_one_by_one(
    model: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = [
        Window([1, *torch.randint(3, 500, (size,), generator=draw).tolist()], context)
        for size, context in ((1, 1), (5, 1), (30, 12), (30, 30), (90, 4))
    ]
    alone = [window_nats(model, [window], filler=2)[0] for window in batch]
    monkeypatch.setattr(bits, "CHUNK", chunk)
    assert window_nats(model, batch, filler=2) == pytest.approx(alone, rel=1e-5)
    late = [window for window in batch if window.context > 1]  # the first scored id is not the second
    assert window_nats(model, late, filler=2) == pytest.approx(alone[2:], rel=1e-5)
    assert min(alone) > 0


@torch.no_grad()
def test_a_model_that_gives_all_logits_is_read_alike(model: Any) -> None:
    """Not every model knows `logits_to_keep`."""

    class Deaf:
        device = model.device

        def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            return model(input_ids=input_ids)

    batch = [Window([1, 5, 9, 33, 7], 3), Window([1, 5, 9], 2)]
    assert window_nats(Deaf(), batch, 2) == pytest.approx(window_nats(model, batch, 2), rel=1e-5)


def test_batches_give_each_document_what_it_gets_alone(model: Any, reader: Any) -> None:
    texts = [*tiny.ENGLISH[:5], *tiny.CHINESE[:5], LONG, "a"]
    made = text_windows(reader, texts, 128)
    together, singly = (score(model, made, 2, batch_tokens) for batch_tokens in (4096, 1))
    assert together.nats == pytest.approx(singly.nats, rel=1e-5)
    alone = [evaluate_text(model, reader, [text]) for text in texts]
    wanted = [told["bits_per_character"] * told["characters"] * math.log(2) for told in alone]
    assert together.nats == pytest.approx(wanted, rel=1e-5)
    assert together.characters == [len(text) for text in texts]
    assert together.bytes == [len(text.encode()) for text in texts]
    assert together.tokens == [told["tokens"] for told in alone]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), LENGTHS)
def test_the_context_is_what_is_seen_before_a_scored_token(counts: list[int], sizes: tuple[int, int]) -> None:
    class Letters:
        bos_token_id = unk_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text)}

    made = text_windows(Letters(), ["x" * count for count in counts], *sizes)
    seen = [place for w in made.windows for place in range(w.context, len(w.ids))]
    assert len(seen) == sum(counts) == sum(made.tokens)
    assert made.context == pytest.approx(sum(seen) / len(seen))
    if max(counts) < sizes[0]:
        assert made.context == sum(n * (n + 1) / 2 for n in counts) / sum(counts)


@pytest.mark.parametrize(
    "text", ["The quick brown fox.", "长江是中国最长的河。", "a", "In 2023 越来越多\n\n的人"]
)
def test_the_figures_are_sums_of_log_probabilities(model: Any, reader: Any, text: str) -> None:
    ids = [reader.bos_token_id, *reader(text, add_special_tokens=False).input_ids]
    nats = -sum(log_probability(model, ids[:i], ids[i]) for i in range(1, len(ids)))
    told = evaluate_text(model, reader, [text])
    assert told["bits_per_character"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert told["characters_per_token"] == len(text) / (len(ids) - 1)
    counts = [told[name] for name in ("characters", "bytes", "tokens", "documents")]
    assert counts == [len(text), len(text.encode()), len(ids) - 1, 1]
    assert (told["window"], told["stride"], told["context"]) == (128, 64, len(ids) / 2)


@pytest.mark.parametrize("stride", [None, 30, 39])
def test_a_long_document_slides_over_its_windows(model: Any, reader: Any, stride: int | None) -> None:
    """The guide's rule written out for each id: its window begins at the last multiple of the stride from which it
    is reached."""
    text = LONG[:240]
    ids = [reader.bos_token_id, *reader(text, add_special_tokens=False).input_ids]
    limit, step = 40, stride or 20
    assert len(ids) > 2 * limit
    nats = 0.0
    for i in range(1, len(ids)):
        start = 0 if i < limit else step * ((i - limit) // step + 1)
        nats -= log_probability(model, ids[start:i], ids[i])
    told = evaluate_text(model, reader, [text], stride, limit)
    assert told["bits_per_character"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert told["tokens"] == len(ids) - 1


def test_documents_are_summed_whatever_their_order(model: Any, reader: Any) -> None:
    texts = [*tiny.ENGLISH[:5], *tiny.CHINESE[:5], LONG]
    together = evaluate_text(model, reader, texts)
    alone = [evaluate_text(model, reader, [text]) for text in texts]
    for name in ("characters", "bytes", "tokens", "documents"):
        assert together[name] == sum(figures[name] for figures in alone)
    bits = sum(figures["bits_per_character"] * figures["characters"] for figures in alone)
    assert together["bits_per_character"] * together["characters"] == pytest.approx(bits, rel=1e-5)
    assert evaluate_text(model, reader, texts[::-1]) == pytest.approx(together, rel=1e-6)


def test_literal_control_tokens_are_text(model: Any, reader: Any, extended: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(extended / "tokenizer.model"))
    text = "<s>abc</s>"
    assert evaluate_text(model, reader, [text])["tokens"] == len(reference.encode(text))


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "nan"), (torch.inf, "nan")])
def test_a_model_that_gives_no_number_is_told(extended: Path, reader: Any, value: float, said: str) -> None:
    damaged = load_model(extended, "float32")
    with torch.no_grad():
        damaged.model.norm.weight[0] = value
    with pytest.raises(NotFinite, match=rf"gives document 1 values that are not finite \({said}\)"):
        evaluate_text(damaged, reader, ["abc"])


def test_a_token_that_cannot_be_is_told_with_its_document(extended: Path, reader: Any) -> None:
    """A logit of -inf makes the loss of that token infinite, of no other."""
    ids = [reader(text, add_special_tokens=False).input_ids for text in ("a b", "z")]
    only = next(index for index in ids[1] if index not in ids[0])

    class Forbidding:
        def __init__(self, model: Any) -> None:
            self.model, self.device = model, model.device

        def __call__(self, **inputs: Any) -> Any:
            told = self.model(**inputs)
            told.logits[..., only] = -torch.inf
            return told

    model = Forbidding(load_model(extended, "float32"))
    made = text_windows(reader, ["a b", "z", "a b"], 128)
    with pytest.raises(NotFinite, match=r"document 2 values that are not finite \(inf\)") as caught:
        score(model, made, 2)
    assert caught.value.document == 1


def test_a_text_without_a_token_is_refused(reader: Any) -> None:
    for texts in ([], [""], ["", ""]):
        with pytest.raises(UserError, match="not one token"):
            text_windows(reader, texts, 128)


def test_unknown_tokens_are_counted(model: Any, tmp_path: Path) -> None:
    """A tokenizer without bytes to fall back on hides what it does not know: that costs no bits."""
    proto = tiny.base_tokenizer()
    known = [piece for piece in proto.pieces if piece.type != 6]  # BYTE
    del proto.pieces[:]
    proto.pieces.extend(known)
    proto.trainer_spec.byte_fallback = False
    hiding = load_tokenizer(tiny.write_base(tmp_path, proto))
    figures = evaluate_text(model, hiding, ["the 中", "the"])
    assert figures["unknown"] == 1
    assert evaluate_text(model, hiding, ["the"])["unknown"] == 0
