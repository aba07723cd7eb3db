"""The chat template beside a tokenizer: whether it renders, ends answers, asks for them, and is the only one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import read_manifest
from chinese_llama.doctor.finding import Finding, some
from chinese_llama.doctor.opened import Opened, vocabulary_of
from chinese_llama.doctor.raw import json_object
from chinese_llama.doctor.things import Thing
from chinese_llama.errors import BadFile, UserError

QUESTION, ANSWER = "chinesellamaquestion", "chinesellamaanswer"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
# what is meant as one token wherever it is written: <|im_start|>, <｜User｜>, <start_of_turn>, </s>
CONTROL = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end|begin)_of_\w{1,20}>|</?s>|<(?:bos|eos|eot)>"
)
TUNED = re.compile(r"alpaca|chat|instruct|sft|vicuna", re.IGNORECASE)
PLACES = 'chat_template.jinja (or "chat_template" in tokenizer_config.json)'


def check_template(opened: Opened, thing: Thing) -> Iterator[Finding]:
    """All checks of the chat template; of one that is not there, where the model is tuned to answer."""
    found: list[Finding] = []
    templates = _templates(opened, found)
    yield from found
    if not templates:
        yield from _missing(opened, thing)
        return
    yield from _two(opened, templates)
    if opened.auto is None:
        return
    file, template = next(iter(templates.items()))
    where = str(opened.place / file)
    try:
        whole = _rendered(opened.auto, template, [USER, ASSISTANT], False)
        prompts = [_rendered(opened.auto, template, [USER], asked) for asked in (True, False)]
    except UserError as error:
        yield Finding(
            "error", "template-broken", where, "The chat template cannot be rendered.", [str(error)[:300]],
            "Correct it, or take one of this toolkit's: template: chinese-alpaca in sft_lora's settings.",
        )  # fmt: skip
        return
    if QUESTION not in whole or ANSWER not in whole:
        yield Finding(
            "error", "template-drops-messages", where, "The chat template does not write what is said.",
            [repr(whole[:200])], "It must write message['content'] of questions and of answers.",
        )  # fmt: skip
        return
    yield from _end(opened, where, whole)
    yield from _prompt(where, whole, *prompts)


def _templates(opened: Opened, found: list[Finding]) -> dict[str, str]:
    """The templates by the file that has them, the one that transformers takes first."""
    templates: dict[str, str] = {}
    file = opened.place / "chat_template.jinja"
    if file.is_file():
        try:
            templates[file.name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            found.append(
                Finding(
                    "error",
                    "template-broken",
                    str(file),
                    "The chat template is not UTF-8 text.",
                    [str(error)],
                )
            )
    listed = opened.config.get("chat_template")
    for name, value in (
        ("chat_template.json", json_object(opened.place / "chat_template.json", found).get("chat_template")),
        ("tokenizer_config.json", listed),
    ):
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default") or next(iter(named.values()), None)
        if isinstance(value, str) and value.strip():
            templates[name] = value
    return {name: text for name, text in templates.items() if text.strip()}


def _missing(opened: Opened, thing: Thing) -> Iterator[Finding]:
    why = _tuned(opened.place, thing)
    if why:
        yield Finding(
            "note" if why.startswith("by its name") else "warning", "no-template", str(opened.place),
            "The model is tuned to answer, but no chat template says how it is to be asked: programs ask it in a form "
            "of their own, and it answers badly.",
            [why],
            f"Put the template that it was trained with into {PLACES}; the published Chinese-Alpaca models: "
            "chinese-alpaca; Chinese-Alpaca-2: alpaca-2 (see sft_lora's `template`).",
        )  # fmt: skip


def _tuned(place: Path, thing: Thing) -> str | None:
    """What tells that a model or an adapter is tuned to answer."""
    if thing.kind not in ("model", "adapter"):
        return None
    try:
        manifest = read_manifest(place)
    except BadFile:
        manifest = None
    if manifest and "sft" in manifest.command:
        return f"chinese_llama.json: made by {manifest.command}"
    names = [
        thing.published,
        thing.path.name,
        *([*map(str, manifest.settings.get("loras") or [])] if manifest else []),
    ]
    found = next((name for name in names if name and TUNED.search(name)), None)
    return f"by its name: {found}" if found else None


def _two(opened: Opened, templates: dict[str, str]) -> Iterator[Finding]:
    """Templates in several files that say different things."""
    (first, one), *others = templates.items()
    for name, other in others:
        if one.strip() != other.strip():
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
            parts = {first: one, name: other}
            yield Finding(
                "warning", "templates-differ", str(opened.place),
                f"{first} and {name} hold different chat templates; transformers takes the first, other programs the "
                "second.",
                [f"{file}: {text[max(0, at - 20) : at + 60]!r}" for file, text in parts.items()],
                f"Keep the one that the model was trained with, in {PLACES}.",
            )  # fmt: skip


def _rendered(tokenizer: Any, template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    """What the template makes of messages. Raises UserError where it cannot be rendered."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except Exception as error:  # a template may do anything that Jinja lets it
        raise UserError(f"{type(error).__name__}: {error}") from error


def _end(opened: Opened, where: str, whole: str) -> Iterator[Finding]:
    """What stands after an answer: a control token that stops generation, or nothing that does."""
    tail = whole[whole.rindex(ANSWER) + len(ANSWER) :]
    tokens = {
        token.content: (index, token.special) for index, token in opened.auto.added_tokens_decoder.items()
    }
    written = sorted((tail.find(token), -len(token), token) for token in tokens if token in tail)
    if not written:
        spelt = CONTROL.findall(tail)
        eos = opened.auto.eos_token
        yield Finding(
            "error", "template-without-end", where,
            "The chat template writes no control token after an answer, so none would ever end"
            + (f": {spelt[0]} is no token of this vocabulary, it is spelt as text." if spelt else "."),
            [f"after an answer: {tail[:80]!r}", f"eos is {eos!r}"],
            "Put {{ eos_token }} after the answer; sft_lora does so with this toolkit's templates.",
        )  # fmt: skip
        return
    end = written[0][2]
    if not tokens[end][1]:
        yield Finding(
            "warning", "template-end-not-special", where,
            f"{end!r} ends an answer, but is not marked as special: this toolkit takes it for text, and decoding "
            "shows it.",
            [f"id {tokens[end][0]}"],
            'Set "special": true for it in tokenizer.json (added_tokens) and tokenizer_config.json.',
        )  # fmt: skip
    yield from _stops(opened, end, tokens[end][0])
    known = {*tokens, *vocabulary_of(opened.content)}
    text = [token for token in dict.fromkeys(CONTROL.findall(whole)) if token not in known]
    if text:
        yield Finding(
            "note", "template-tokens-as-text", where,
            f"{len(text)} markers of the chat template are no tokens of the vocabulary, and are spelt as text: it "
            "works for a model that was trained so.",
            some([f"{token}: {len(opened.auto(token, add_special_tokens=False)['input_ids'])} tokens" for token in text]),
            "Add them as tokens before training, or take a template without them (chinese-alpaca).",
        )  # fmt: skip


def _stops(opened: Opened, end: str, index: int) -> Iterator[Finding]:
    """Whether generation stops at the end of an answer: by generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        value = json_object(opened.place / name, []).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if index not in ids:
            yield Finding(
                "error", "generation-does-not-stop", str(opened.place / name),
                f"The chat template ends answers with {end!r} (id {index}), and {name} does not stop there: answers "
                "run on.",
                [f"eos_token_id: {json.dumps(value)}"],
                f'Set "eos_token_id" to [{", ".join(map(str, [*ids, index]))}] in generation_config.json.',
            )  # fmt: skip
        return


def _prompt(where: str, whole: str, asked: str, plain: str) -> Iterator[Finding]:
    """Whether the prompt for an answer is what stands before answers."""
    before = whole[: whole.rindex(ANSWER)]
    if not before.startswith(asked.rstrip()):
        yield Finding(
            "warning", "template-prompt-differs", where,
            "Where an answer is asked for, the chat template writes something else than what stands before answers: "
            "what is taught is not what is asked.",
            [f"asked: {asked[-60:]!r}", f"before an answer: {before[-60:]!r}"],
            "Let add_generation_prompt write exactly what precedes an answer.",
        )  # fmt: skip
    elif asked == plain and len(before.rstrip()) > len(asked.rstrip()):
        yield Finding(
            "warning", "template-without-prompt", where,
            "The chat template ignores add_generation_prompt: a model that is asked has to begin its own turn, and may "
            "go on with the question instead.",
            [f"missing at the end of a prompt: {before[len(asked) :]!r}"],
            "Add {% if add_generation_prompt %}...{% endif %} with that text at its end.",
        )  # fmt: skip
