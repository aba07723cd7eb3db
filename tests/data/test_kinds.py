"""Documents and conversations as ids: what is learnt, what is cut, what is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.kinds import Conversations, Documents, fit
from chinese_llama.data.templates import IGNORE, Sample, find_template, text_ids

TEXTS = ["中国的首都是北京。", "A literal </s> or <s> is text.", " leading", "x", "😀" * 5]
END = 2
# of each turn: tokens of its question and of its answer, the end of the turn included
TURNS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def fast(tokenizer: Path) -> Any:
    from chinese_llama.model.load import load_tokenizer

    return load_tokenizer(tokenizer)


def test_documents_are_bos_ids_and_eos_as_transformers_gives_them(fast: Any) -> None:
    kind = Documents(fast, 8)
    made = kind.collect(TEXTS, [3, 4, 5, 9, 10], kind.encode(TEXTS))
    wanted = [[fast.bos_token_id, *text_ids(fast, text), fast.eos_token_id] for text in TEXTS]
    assert made.parts.ids.tolist() == [index for ids in wanted for index in ids]
    assert made.parts.lengths.tolist() == [len(ids) for ids in wanted]
    assert made.parts.documents.tolist() == [3, 4, 5, 9, 10]
    assert (made.documents, made.characters) == (5, sum(map(len, TEXTS)))
    assert made.bytes == sum(len(text.encode()) for text in TEXTS)


def test_the_tokenizer_itself_is_left_as_it_is(fast: Any) -> None:
    fast.backend_tokenizer.enable_truncation(4)
    before = fast.backend_tokenizer.to_str()
    kind = Documents(fast, 8)
    assert len(kind.collect(["x y z " * 9], [0], kind.encode(["x y z " * 9])).parts.ids) > 20
    assert fast.backend_tokenizer.to_str() == before
    fast.backend_tokenizer.no_truncation()


def test_no_documents_give_no_parts(fast: Any) -> None:
    kind = Documents(fast, 8)
    made = kind.collect([], [], kind.encode([]))
    assert not len(made.parts.ids) and not len(made.parts.lengths) and made.documents == 0


def sample(turns: list[tuple[int, int]], trailing: int = 0) -> Sample:
    """Question tokens 10, 20, ..., answer tokens 11, 21, ..., each answer with its END."""
    made = Sample([], [], [])
    for number, (question, answer) in enumerate(turns, 1):
        answered = [10 * number + 1] * (answer - 1) + [END]
        made.input_ids += [10 * number] * question + answered
        made.labels += [IGNORE] * question + answered
        made.turns.append(len(made.input_ids))
    return Sample([*made.input_ids, *[9] * trailing], [*made.labels, *[IGNORE] * trailing], made.turns)


@settings(max_examples=300, deadline=None)
@given(
    turns=TURNS,
    trailing=st.integers(0, 3),
    size=st.integers(2, 30),
    too_long=st.sampled_from(["drop", "truncate"]),
)
def test_what_is_kept_fits_and_every_answer_has_its_end(
    turns: list[tuple[int, int]], trailing: int, size: int, too_long: str
) -> None:
    whole = sample(turns, trailing)
    made, reason = fit(whole, size, too_long)
    fitting = [end for end in whole.turns if end <= size]
    if len(whole.input_ids) <= size:
        assert (made, reason) == (whole, "")
        return
    if made is None:
        assert reason == "too_long" and not fitting
        return
    kept = len(made.input_ids)
    assert kept <= size and made.input_ids[-1] == made.labels[-1] == END
    assert made.input_ids[:-1] == whole.input_ids[: kept - 1]
    assert made.labels[:-1] == whole.labels[: kept - 1]
    assert made.turns == sorted({end for end in fitting if end <= kept} | {kept})
    if reason == "answers_cut":
        assert too_long == "truncate" and kept == size and made.input_ids[-2] % 10 == 1
    else:
        assert kept == fitting[-1] and reason == ("" if len(fitting) == len(turns) else "turns_cut")


def test_an_answer_is_only_cut_where_something_of_it_is_left() -> None:
    """With room for the question alone, an empty answer would be taught."""
    assert fit(sample([(3, 5)]), 4, "truncate") == (None, "too_long")
    made, reason = fit(sample([(3, 5)]), 5, "truncate")
    assert reason == "answers_cut" and made is not None and made.input_ids == [10, 10, 10, 11, END]
    made, reason = fit(sample([(1, 2), (3, 5)]), 7, "truncate")
    assert reason == "turns_cut" and made is not None and made.input_ids == [10, 11, END]


@pytest.mark.parametrize("labels", [[IGNORE] * 3, [1, IGNORE, IGNORE]])
def test_samples_without_a_learnt_target_are_dropped(labels: list[int]) -> None:
    """What comes first in a block has nothing before it to be predicted from."""
    assert fit(Sample([1, 1, 1], labels, [3]), 8, "drop") == (None, "nothing_learnt")


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def test_conversations_are_counted_and_cut(fast: Any) -> None:
    template = find_template("chinese-alpaca")
    items = [
        talk("问", "答"),
        talk("问", "答" * 200),
        talk("问", "答", "再问", "再答" * 100),
        talk("问" * 300, "答"),
    ]
    whole = Conversations(fast, 10_000, template, "drop", "stop", "auto")
    lengths = whole.collect(items, [0, 1, 2, 3], whole.encode(items)).parts.lengths
    size = int(lengths[0])
    kind = Conversations(fast, size, template, "drop", "stop", "auto")
    made = kind.collect(items, [5, 6, 7, 8], kind.encode(items))
    assert made.parts.documents.tolist() == [5, 7]
    assert made.parts.lengths.tolist() == [size, size]
    assert made.dropped == {"too_long": 2, "turns_cut": 1}
    assert (made.documents, made.characters) == (2, 2 + round(204 * size / lengths[2]))
    cut = Conversations(fast, size + 8, template, "truncate", "stop", "auto")
    made = cut.collect(items, [5, 6, 7, 8], cut.encode(items))
    assert made.dropped == {"answers_cut": 1, "turns_cut": 1, "too_long": 1}
    ends = made.parts.lengths.cumsum() - 1
    assert set(made.parts.ids[ends].tolist()) == {fast.eos_token_id}
    assert made.parts.learnt is not None and made.parts.learnt[ends].all()


def test_no_conversations_give_no_parts(fast: Any) -> None:
    kind = Conversations(fast, 64, find_template("chinese-alpaca"), "drop", "stop", "auto")
    made = kind.collect([], [], kind.encode([]))
    assert not len(made.parts.ids) and made.documents == 0
