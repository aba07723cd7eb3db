"""What the harness asks: choices as ids after the same prompt, and WikiText-style perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import BadFile
from chinese_llama.evaluate.choices import wikitext
from chinese_llama.evaluate.harness import choice_ids
from chinese_llama.model.load import load_model, load_tokenizer
from chinese_llama.vocab.fast import write_tokenizer
from tests import tiny
from tests.evaluate import test_choices
from tests.evaluate.scoring import evaluate_text
from tests.evaluate.test_choices import letter_id, log_probability

model, reader = test_choices.model, test_choices.reader  # fixtures


@pytest.mark.parametrize("place", ["base", "extended"])
@pytest.mark.parametrize("text", ["题目\nA. 一\n答案：", "a </s> b\n答案是：", "<s>答案：", "答案： "])
def test_a_choice_is_one_token_after_the_tokens_of_its_prompt(
    place: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(place))
    pairs = choice_ids(tokenizer, text, "ABCD")
    assert len({tuple(context) for context, _ in pairs}) == 1
    for choice, (context, wanted) in zip("ABCD", pairs, strict=True):
        assert wanted == [letter_id(tokenizer, choice)]
        assert context + wanted == [tokenizer.bos_token_id, *text_ids(tokenizer, text + choice)]
        assert context.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in context, "what looks like eos in a question is text"


def test_choices_that_a_tokenizer_joins_are_compared_after_the_same(tmp_path: Path) -> None:
    proto = tiny.base_tokenizer()
    for piece in ("：", "A", "B", "C", "D", "：A", "：B"):
        proto.pieces.add(piece=piece, score=0.0, type=1)
    write_tokenizer(tmp_path, proto, None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("x：A") == ["▁", "x", "：A"]
    pairs = choice_ids(tokenizer, "x：", "ABCD")
    assert {tuple(tokenizer.convert_ids_to_tokens(context)) for context, _ in pairs} == {("<s>", "▁", "x")}
    said = [tokenizer.convert_ids_to_tokens(wanted) for _, wanted in pairs]
    assert said == [["：A"], ["：B"], ["：", "C"], ["：", "D"]]


def test_wikitext_is_the_sum_of_log_probabilities(model: Any, reader: Any, tmp_path: Path) -> None:
    texts = [tiny.ENGLISH[0], "one  two\nthree", tiny.CHINESE[0]]
    tiny.write_texts(tmp_path / "text.jsonl", texts)
    nats = 0.0
    for text in texts:
        nats -= log_probability(model, [reader.bos_token_id], text_ids(reader, text))
    told = wikitext(model, reader, tmp_path / "text.jsonl")
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert (told["words"], told["bytes"], told["documents"]) == (words, size, 3)
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert told["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert math.log(told["word_perplexity"]) == pytest.approx(nats / words, rel=1e-4)
    assert told["bits_per_byte"] == pytest.approx(
        evaluate_text(model, reader, texts)["bits_per_byte"], rel=1e-5
    )


def test_wikitext_of_documents_longer_than_a_window(extended: Path, reader: Any, tmp_path: Path) -> None:
    """Windows written out: 128 tokens each after the one before them, the last as long as the others."""
    model = load_model(extended, "float32")
    text = "".join(tiny.CHINESE[:60])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids, room = text_ids(reader, text), 128
    assert len(ids) > 2 * room and len(ids) % room
    whole = [reader.bos_token_id, *ids]
    nats = -log_probability(model, whole[:1], whole[1 : room + 1])
    for start in range(room, len(ids), room):
        end = min(start + room, len(ids))
        nats -= log_probability(model, whole[end - room : start + 1], whole[start + 1 : end + 1])
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    told = wikitext(model, reader, tmp_path / "text.txt")
    assert max(read) == room, "no more than the model reads"
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert told["words"] == 1 and nats > 709, "a number that exp cannot hold"
    assert math.isfinite(told["word_perplexity"])


WIKI = """
 = Robert <unk> =

 Robert <unk> , born 1979 ( in London ) , is an actor . He 's in 2 @,@ 000 well @-@ known plays .

 = = Career = =
 Less is said .

 = Du Fu =

 杜甫是唐代诗人。
"""


@pytest.mark.parametrize("lines", [True, False])
def test_wikitext_itself_is_measured_as_the_harness_does(
    model: Any, reader: Any, tmp_path: Path, lines: bool
) -> None:
    """Published line by line, read as whole articles without the spacing, per word of what is published."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    if lines:
        (tmp_path / "wiki.test.txt").write_text(WIKI, encoding="utf-8")
    else:
        rows = [json.dumps({"text": line}) for line in WIKI.splitlines(keepends=True)]
        (tmp_path / "wiki.test.txt").with_suffix(".jsonl").write_text("\n".join(rows))
    first, second = WIKI[: WIKI.index(" = Du")].removesuffix("\n"), WIKI[WIKI.index(" = Du") :].rstrip("\n")
    pages = [{"page": first.removeprefix("\n")}, {"page": second}]
    theirs = HFLM(model, backend="causal", tokenizer=reader, add_bos_token=False)
    asked = [Instance("loglikelihood_rolling", {}, (wikitext_detokenizer(page),), 0) for page in pages]
    assert "born 1979 (in London), is an actor. He's in 2,000 well-known plays .\n" in asked[0].args[0]
    found = theirs.loglikelihood_rolling(asked)
    by_page = [process_results(page, [nats]) for page, nats in zip(pages, found, strict=True)]
    words, size = (sum(one[name][1] for one in by_page) for name in ("word_perplexity", "byte_perplexity"))
    told = wikitext(model, reader, tmp_path)
    assert (told["documents"], told["words"], told["bytes"]) == (2, words, size)
    assert told["bits_per_byte"] == pytest.approx(-sum(found) / math.log(2) / size, rel=1e-4)
    assert math.log(told["word_perplexity"]) == pytest.approx(-sum(found) / words, rel=1e-4)


def test_a_title_amid_other_documents_is_a_document(model: Any, reader: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n = Title =\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text(" = Title =\n\nof an article\n")
    (tmp_path / "c.txt").write_text("four\n")
    assert wikitext(model, reader, tmp_path)["documents"] == 4 + 1 + 1


def test_wikitext_of_no_text_is_one_sentence(model: Any, reader: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadFile, match=r"empty.txt: holds no text\.$"):
        wikitext(model, reader, tmp_path / "empty.txt")


def test_certain_failure_is_a_finite_perplexity(extended: Path, reader: Any, tmp_path: Path) -> None:
    """Thousands of bits for a byte, as of a training that diverged: a number, not an overflow."""
    (tmp_path / "text.txt").write_text("water\n")
    lost = load_model(extended, "float32")
    lost.lm_head.weight.data *= 1e6
    told = wikitext(lost, reader, tmp_path / "text.txt")
    assert told["bits_per_byte"] > 1024 and math.isfinite(told["byte_perplexity"])
