"""Generation: transformers' greedy ids, whole characters, an end at eos."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chinese_llama.data.templates import find_template, prompt_ids
from chinese_llama.errors import UserError
from chinese_llama.evaluate import generate as module
from chinese_llama.evaluate.generate import answer, answer_all, model_input, steps, stream
from chinese_llama.model.load import load_model, load_tokenizer

BYTES = range(3, 259)
LONGEST = 16  # tokens of an answer


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """The pico base, its byte pieces made unlikely, so that what it says is text."""
    model = load_model(base, "float32")
    with torch.no_grad():
        model.lm_head.weight[list(BYTES)] = 0
    return model


def parrot(tokenizer: Any, said: Sequence[int]) -> Any:
    """A model that says the (different) ids `said` after bos, whatever came before: each id's
    embedding passes through unchanged, and the head looks up its successor."""
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        embeddings = torch.randn(len(tokenizer), 256, generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.copy_(embeddings)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for now, then in zip([tokenizer.bos_token_id, *said], said, strict=False):
            model.lm_head.weight[then] = embeddings[now]
    return model


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def parts(model: Any, tokenizer: Any, limit: int = 20) -> list[str]:
    return list(stream(model, tokenizer, [tokenizer.bos_token_id], limit, 0.0))


@pytest.mark.parametrize("prompt", ["The quick", "She sells sea shells by", "Water", "["])
def test_greedy_is_what_transformers_generates(model: Any, tokenizer: Any, prompt: str) -> None:
    ids = model_input(tokenizer, prompt)
    wanted = model.generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )[0, len(ids) :]  # fmt: skip
    said = list(stream(model, tokenizer, ids, 40, 0.0))
    assert "".join(said) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "".join(said).strip()
    assert answer(model, tokenizer, prompt, 40) == "".join(said).strip()


def test_parts_are_whole_characters(tokenizer: Any) -> None:
    text = "中国🙂"
    model = parrot(tokenizer, [*byte_ids(tokenizer, text), tokenizer.eos_token_id])
    assert parts(model, tokenizer) == ["中", "国", "🙂"]


@pytest.mark.parametrize(
    ("limit", "said"), [(1, ""), (2, ""), (3, "中"), (5, "中"), (6, "中国"), (9, "中国")]
)
def test_a_character_that_is_cut_off_is_not_shown(tokenizer: Any, limit: int, said: str) -> None:
    model = parrot(tokenizer, byte_ids(tokenizer, "中国🙂"))
    assert "".join(parts(model, tokenizer, limit)) == said


def test_it_stops_at_eos(tokenizer: Any) -> None:
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    model = parrot(tokenizer, [a, b, tokenizer.eos_token_id, c])
    assert "".join(parts(model, tokenizer)) == "ab"
    assert "".join(parts(parrot(tokenizer, [tokenizer.eos_token_id]), tokenizer)) == ""


def test_it_stops_at_what_ends_an_answer_in_the_template(tokenizer: Any) -> None:
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    said = parrot(tokenizer, [a, tokenizer.unk_token_id, b, tokenizer.eos_token_id, c])
    assert "".join(parts(said, tokenizer)) == "ab", "a control token that ends nothing is not shown"
    tuned = copy.deepcopy(tokenizer)
    tuned.chat_template = "{% for m in messages %}{{ m.content + '<unk>' }}{% endfor %}"
    assert "".join(parts(said, tuned)) == "a"
    assert "".join(parts(parrot(tuned, [a, tuned.eos_token_id, b]), tuned)) == "a"


def test_it_stops_at_the_limit_of_the_model(model: Any, tokenizer: Any) -> None:
    limit = model.config.max_position_embeddings
    ids = [tokenizer.bos_token_id] + [tokenizer.convert_tokens_to_ids("a")] * (limit - 4)
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    said = "".join(stream(model, tokenizer, ids, 100, 0.0))
    assert said == tokenizer.decode(wanted[0, len(ids) :], skip_special_tokens=True)


def test_a_prompt_that_fills_the_model_is_told(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="long"):
        answer(model, tokenizer, "fox " * 200)


def test_the_seed_decides_what_is_drawn(model: Any, tokenizer: Any) -> None:
    said = [answer(model, tokenizer, "The", 12, temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    assert said[0] == said[1]
    assert len(set(said)) > 1
    cold = answer(model, tokenizer, "The", 12, temperature=1e-4, seed=5)
    assert cold == answer(model, tokenizer, "The", 12)


def test_a_tuned_tokenizer_asks_in_its_template_unless_raw(base: Path) -> None:
    tuned = load_tokenizer(base)
    plain = [tuned.bos_token_id, *tuned("Hello", add_special_tokens=False).input_ids]
    assert model_input(tuned, "Hello") == plain
    tuned.chat_template = find_template("chinese-alpaca")
    asked = model_input(tuned, "Hello")
    assert asked == prompt_ids(tuned, tuned.chat_template, [{"role": "user", "content": "Hello"}])
    assert asked != plain
    assert "### Instruction:\nHello\n\n### Response: " in tuned.decode(asked)
    assert model_input(tuned, "Hello", raw=True) == plain


def test_literal_control_tokens_in_a_prompt_are_text(tokenizer: Any) -> None:
    ids = model_input(tokenizer, "a</s><s>b")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


# --- batches


def ends(model: Any, index: int, end: int) -> Any:
    """A copy of `model` that says `end` where it would say `index`."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[end] = 1.01 * changed.lm_head.weight[index]
    return changed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pad", [None, "<unk>"])
def test_answers_in_batches_are_those_given_alone(
    pad: str | None, temperature: float, model: Any, base: Path
) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = pad
    limit = model.config.max_position_embeddings
    texts = ["The", "She sells sea shells by the sea shore", "中国的首都", "a" * (limit - 10), "["]
    prompts, seeds = [model_input(tokenizer, text) for text in texts], [5, 6, 7, 8, 9]
    assert limit - LONGEST < max(map(len, prompts)) < limit, "one is cut by the limit of the model"
    free = alone(model, tokenizer, prompts, temperature, seeds)
    model = ends(model, free[0][3], tokenizer.eos_token_id)
    wanted = alone(model, tokenizer, prompts, temperature, seeds)
    assert len({len(new) for new in wanted}) > 1, "they stop at different steps"
    together = steps(model, tokenizer, prompts, LONGEST, temperature, seeds)
    assert collected(together, len(prompts)) == wanted
    one = [answer(model, tokenizer, t, LONGEST, temperature, s) for t, s in zip(texts, seeds, strict=True)]
    found = answer_all(model, tokenizer, prompts, LONGEST, temperature, seeds, 100)
    assert [text for _, text in sorted(found)] == one


def collected(said: Iterable[dict[int, int]], rows: int) -> list[list[int]]:
    new: list[list[int]] = [[] for _ in range(rows)]
    for step in said:
        for row, index in step.items():
            new[row].append(index)
    return new


def alone(
    model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, seeds: list[int]
) -> list[list[int]]:
    """The ids of each answer of at most LONGEST tokens, one by one."""
    return [
        collected(steps(model, tokenizer, [ids], LONGEST, temperature, [seed]), 1)[0]
        for ids, seed in zip(prompts, seeds, strict=True)
    ]


def test_memory_is_bounded_and_the_longest_come_first(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[tokenizer.bos_token_id] * length for length in (3, 40, 5, 9, 9, 2)]
    asked: list[list[int]] = []

    def watched(model: Any, tokenizer: Any, batch: Any, *rest: Any) -> Any:
        asked.append([len(ids) for ids in batch])
        return steps(model, tokenizer, batch, *rest)

    monkeypatch.setattr(module, "steps", watched)
    found = dict(answer_all(model, tokenizer, prompts, 2, 0.0, [0] * 6, batch_tokens=24))
    assert asked == [[40], [9, 9], [5, 3, 2]]
    assert sorted(found) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("device", "rows"), [("cuda", [12]), ("cpu", [10, 2])])
def test_a_cpu_gets_smaller_batches(
    device: str, rows: list[int], model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = SimpleNamespace(device=torch.device(device), config=model.config)
    asked: list[int] = []
    monkeypatch.setattr(module, "steps", lambda _, __, batch, *rest: asked.append(len(batch)) or iter(()))
    assert len(list(answer_all(placed, tokenizer, [[5] * 100] * 12, 2, 0.0, [0] * 12))) == 12
    assert asked == rows


class Small:
    """A model on a GPU that holds keys and values of so many tokens; `batches`: the rows of each that was begun."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.config, self.device = model.config, model.device
        self.batches: list[int] = []

    def __call__(self, **given: Any) -> Any:
        if given["past_key_values"] is None:
            self.batches.append(len(given["input_ids"]))
        if given["attention_mask"].numel() > self.tokens:
            raise torch.OutOfMemoryError
        return self.model(**given)


def test_where_memory_is_small_batches_are(model: Any, tokenizer: Any) -> None:
    prompts = [[tokenizer.bos_token_id, *range(260, 260 + length)] for length in (3, 40, 5, 9, 9, 2)]
    wanted = sorted(answer_all(model, tokenizer, prompts, 6, 0.0, [0] * 6))
    assert sorted(answer_all(Small(model, 50), tokenizer, prompts, 6, 0.0, [0] * 6)) == wanted
    with pytest.raises(UserError, match="does not hold the model and a prompt of 41 tokens with its answer"):
        list(answer_all(Small(model, 40), tokenizer, prompts, 6, 0.0, [0] * 6))


def test_an_answer_that_ended_before_memory_ran_out_is_not_given_again(tokenizer: Any) -> None:
    letters = byte_ids(tokenizer, "abcdefghij")
    small = Small(parrot(tokenizer, [*letters, tokenizer.eos_token_id]), 12)
    prompts = [[tokenizer.bos_token_id, letters["abcdefghij".index(letter)]] for letter in "iab"]
    found = list(answer_all(small, tokenizer, prompts, 12, 0.0, [0] * 3))
    assert found == [(0, "j"), (1, "bcdefghij"), (2, "cdefghij")]
    assert small.batches == [3, 1, 1], "half a batch at once, however little of the budget it was"


def test_frequencies_of_longrope_are_those_of_a_prompt_alone(tokenizer: Any) -> None:
    factors: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [30.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=1.0, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings).eval()
    prompts = [[tokenizer.bos_token_id, *range(270, 270 + length)] for length in (4, 40)]
    one = [text for ids in prompts for _, text in answer_all(model, tokenizer, [ids], 8, 0.0, [0])]
    assert [text for _, text in sorted(answer_all(model, tokenizer, prompts, 8, 0.0, [0, 0]))] == one


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-9])
def test_a_temperature_of_about_0_takes_the_likeliest(temperature: float, model: Any, tokenizer: Any) -> None:
    assert answer(model, tokenizer, "The", 6, temperature) == answer(model, tokenizer, "The", 6)
