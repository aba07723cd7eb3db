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

from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.evaluate.bits import Window, evaluate, evaluate_text, window_nats, windows
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny

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
        if number:
            assert window.context >= min(length - stride, window.ids[-1])
        scored += window.ids[window.context :]
    assert scored == ids[1:]


@pytest.mark.parametrize("stride", [128, 500])
def test_a_stride_that_would_skip_ids_is_refused(model: Any, reader: Any, stride: int) -> None:
    """The pico model sees 128 ids: from there on a window would have no context."""
    with pytest.raises(UserError, match="stride"):
        evaluate_text(model, reader, [LONG], stride=stride)


def test_a_batch_gives_what_windows_give_one_by_one(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = [
        Window([1, *torch.randint(3, 500, (size,), generator=draw).tolist()], context)
        for size, context in ((1, 1), (5, 1), (30, 12), (30, 30), (90, 4))
    ]
    together = window_nats(model, batch, filler=2)
    alone = [window_nats(model, [window], filler=2)[0] for window in batch]
    assert together == pytest.approx(alone, rel=1e-5)
    assert min(alone) > 0


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


@pytest.mark.parametrize("stride", [None, 100, 127])
def test_a_long_document_slides_over_its_windows(model: Any, reader: Any, stride: int | None) -> None:
    """The rule written out for each id: where its window ends, and what that window sees before it."""
    ids = [reader.bos_token_id, *reader(LONG, add_special_tokens=False).input_ids]
    limit, step = 128, stride or 64
    assert len(ids) > 2 * limit
    nats = 0.0
    for i in range(1, len(ids)):
        end = limit if i < limit else min(len(ids), limit + step * ((i - limit) // step + 1))
        nats -= log_probability(model, ids[max(0, end - limit) : i], ids[i])
    told = evaluate_text(model, reader, [LONG], stride)
    assert told["bits_per_character"] == pytest.approx(nats / math.log(2) / len(LONG), rel=1e-5)
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


def test_a_model_that_gives_nan_is_told(extended: Path, reader: Any) -> None:
    damaged = load_model(extended, "float32")
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="values that are not finite; is it damaged, or in float16"):
        evaluate_text(damaged, reader, ["abc"])


def test_evaluate_reads_files_and_names_the_sets(work: Path, extended: Path) -> None:
    told = evaluate(str(extended), {"zh": work / "zh.jsonl", "en": work / "en.jsonl"})
    assert told["model"] == str(extended)
    assert set(told["sets"]) == {"zh", "en"}
    assert told["sets"]["zh"]["documents"] == len(tiny.CHINESE)
    assert told["sets"]["zh"]["characters"] == sum(map(len, tiny.CHINESE))
    names = "bits_per_character bits_per_byte perplexity characters_per_token characters bytes tokens"
    assert set(told["sets"]["en"]) >= set(names.split())


def test_bad_text_is_told_before_the_model_is_loaded(extended: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"no.jsonl: no such file"):
        evaluate("/no/model", {"zh": tmp_path / "no.jsonl"})
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BadFile, match=r"empty.txt: holds no text"):
        evaluate("/no/model", {"zh": tmp_path / "empty.txt"})


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    base: Path, extended: Path, work: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    for file in extended.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DoesNotFit, match="only 420 rows"):
        evaluate(str(tmp_path), {"zh": work / "zh.jsonl"})
