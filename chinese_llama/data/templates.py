"""Conversations as token ids: the one place that writes and tokenises them.

Training, `generate` and `chat` all come here. A template is a Jinja chat template, saved with the
tokenizer of a tuned model, so that `apply_chat_template` gives the same prompt ids elsewhere.

It is rendered with a mark in place of every text of a user, so what it writes itself is known: its control
tokens become ids, the rest is tokenised as text, whatever users write. The text before an answer is
tokenised as generation has it, apart from the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama.data.conversations import Message
from chinese_llama.data.published import TEMPLATES
from chinese_llama.errors import BadFile, UserError, nearest

IGNORE = -100  # label of a token that is not learnt
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # control tokens that templates name themselves
LEAD = "\ue000"  # a private character: in no piece of a vocabulary
EDGE = "\x1f"  # white space, so that a template's trim takes it away
FIRST_MARK, LAST_MARK = 0xF0000, 0xFFFFD  # private characters
MARK = re.compile(f"({EDGE}?[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]{EDGE}?)")
Shape = tuple[tuple[str, ...], ...]


@dataclass
class Sample:
    """Token ids and labels of equal length; labels are IGNORE where nothing is learnt. `turns` holds, for
    each answer, the number of ids up to its end."""

    input_ids: list[int]
    labels: list[int]
    turns: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Segment:
    """What is tokenised by itself: a control token, or a text in parts, marks where users' texts go.

    `ends`: it ends an answer. `goes_on`: it is the beginning of an answer, and text stands before it.
    """

    token: int | None
    text: tuple[str, ...]
    learnt: bool
    ends: bool = False
    goes_on: bool = False


def find_template(name: str) -> str:
    """The Jinja text of a template, by its name or from a .jinja file. Raises UserError naming those there
    are, BadFile for a file that cannot be read."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        known = ", ".join(sorted(TEMPLATES))
        hint = nearest(name, TEMPLATES)
        raise UserError(f"template {name!r} is unknown{hint}; known are {known}, or give a .jinja file.")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile(name, f"cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise BadFile(name, "is not UTF-8.") from error


def fit_template(template: str, tokenizer: Any) -> str:
    """The template as this tokenizer can write it, to train with and to save.

    Where ChatML's or Llama-3's token for the end of a turn is no control token of the tokenizer, eos stands
    for it, and the conversation begins with bos; their other markers are then tokenised as text.
    """
    missing = [end for end in TURN_ENDS if end in template and end not in _controls(tokenizer)]
    for end in missing:
        template = template.replace(end, tokenizer.eos_token)
    return "{{ bos_token }}" + template if missing and "bos_token" not in template else template


def text_ids(tokenizer: Any, text: str | list[str]) -> Any:
    """Ids of a text of a user or a corpus (or of each text in a list): no bos, and literal control tokens are
    text."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(text, **options)["input_ids"]


def prompt_ids(tokenizer: Any, template: str, messages: list[Message]) -> list[int]:
    """What an answer is generated after: ids of `messages`, of which the last is the user's. The sample of
    the same conversation with its answer begins with them."""
    return samples(tokenizer, template, [messages])[0].input_ids


def stop_ids(tokenizer: Any, template: str) -> list[int]:
    """Ids that end an answer: eos, and the control token that the template writes after one."""
    messages = _marked((("user", "content"), ("assistant", "content")))
    end = _turn_end(tokenizer, _rendered(tokenizer, template, messages, False), messages[-1])
    return sorted({tokenizer.eos_token_id, *([_controls(tokenizer)[end[0]]] if end else [])})


def samples(tokenizer: Any, template: str, conversations: Sequence[list[Message]]) -> list[Sample]:
    """A sample for each conversation, all tokenised in one call; answers are learnt with the control token
    that ends them, and nothing else.

    A sample stops at the end of its last answer; a conversation that ends with a question is followed by the
    prompt for the answer. Raises UserError for a template that cannot be rendered or does not end answers.
    """
    shapes = [tuple((m["role"], *_fields(m)) for m in messages) for messages in conversations]
    known = {shape: _layout(tokenizer, template, shape) for shape in dict.fromkeys(shapes)}
    layouts = [known[shape] for shape in shapes]
    texts: list[tuple[str, bool]] = []
    for messages, layout in zip(conversations, layouts, strict=True):
        contents = [message[name] for message in messages for name in _fields(message)]
        texts += [(_filled(one.text, contents), one.goes_on) for one in layout if one.token is None]
    ids = _encoded(tokenizer, texts)
    return [_sample(layout, ids) for layout in layouts]


def _sample(layout: list[Segment], texts: Iterator[list[int]]) -> Sample:
    made = Sample([], [])
    for segment in layout:
        ids = next(texts) if segment.token is None else [segment.token]
        made.input_ids += ids
        made.labels += ids if segment.learnt else [IGNORE] * len(ids)
        if segment.ends:
            made.turns.append(len(made.input_ids))
    return made


def _encoded(tokenizer: Any, texts: list[tuple[str, bool]]) -> Iterator[list[int]]:
    """Ids of texts, each with whether it goes on after another text: then it gets no dummy prefix, the space
    that SentencePiece puts before a text."""
    lead = text_ids(tokenizer, LEAD)
    cut = len(lead) if tokenizer.convert_ids_to_tokens(lead[0]) == "▁" else 0
    given = [LEAD + text if cut and goes_on else text for text, goes_on in texts]
    for ids, (_, goes_on) in zip(text_ids(tokenizer, given), texts, strict=True):
        yield ids[cut:] if goes_on else ids


def _fields(message: Message) -> list[str]:
    return sorted(message.keys() - {"role"})


def _filled(text: tuple[str, ...], contents: list[str]) -> str:
    return "".join(_content(part, contents) if MARK.fullmatch(part) else part for part in text)


def _content(mark: str, contents: list[str]) -> str:
    """The text that `mark` stands for; where the template trims it, without the white space on that side."""
    text = contents[ord(mark.strip(EDGE)) - FIRST_MARK]
    text = text if mark.startswith(EDGE) else text.lstrip()
    return text if mark.endswith(EDGE) else text.rstrip()


def _layout(tokenizer: Any, template: str, shape: Shape) -> list[Segment]:
    """The segments of every conversation whose messages have the roles and fields of `shape`."""
    messages = _marked(shape)
    asks = messages[-1]["role"] == "user"
    whole = _rendered(tokenizer, template, messages, asks)
    segments: list[Segment] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _rendered(tokenizer, template, messages[:index], True)
        end = _turn_end(tokenizer, whole, message)
        if not whole.startswith(prompt):
            raise UserError(
                "The chat template writes something else before an answer than where it asks for one "
                "(add_generation_prompt), so what is taught would not be what is asked; correct it."
            )
        if end is None or len(prompt) < done:
            raise UserError(
                "The chat template writes no control token after an answer, so that none would ever end; "
                "put {{ eos_token }} there."
            )
        segments += _segments(tokenizer, whole[done : len(prompt)])
        # An answer goes on after its prompt, as in the text as a whole. But after a prompt that ends in a space,
        # published answers are texts of their own, so that SentencePiece's dummy prefix is a second space:
        # ids that apply_chat_template cannot give for an answer in the history.
        goes_on = bool(segments) and segments[-1].token is None and not prompt.endswith(" ")
        segments += _segments(tokenizer, whole[len(prompt) : end.end()], True, goes_on)
        done = end.end()
    return segments + (_segments(tokenizer, whole[done:]) if asks else [])


def _marked(shape: Shape) -> list[Message]:
    """Messages with a mark of its own in place of every text."""
    marks = iter(range(FIRST_MARK, LAST_MARK))
    return [
        {"role": role, **{name: EDGE + chr(next(marks)) + EDGE for name in names}} for role, *names in shape
    ]


def _turn_end(tokenizer: Any, whole: str, message: Message) -> re.Match[str] | None:
    """The control token that ends the answer `message` in the rendered conversation, if there is one."""
    answer = whole.find(message["content"].strip(EDGE))
    end = _pattern(tokenizer).search(whole, answer) if answer >= 0 else None
    begins = end is not None and end[0] == tokenizer.bos_token != tokenizer.eos_token
    return None if begins else end


def _segments(tokenizer: Any, text: str, learnt: bool = False, goes_on: bool = False) -> list[Segment]:
    """What is between control tokens, and those themselves; `learnt`: `text` is an answer to its end."""
    controls = _controls(tokenizer)
    parts = [part for part in _pattern(tokenizer).split(text) if part]
    return [
        Segment(
            token=controls.get(part),
            text=tuple(piece for piece in MARK.split(part) if piece),
            learnt=learnt,
            ends=learnt and number == len(parts),
            goes_on=goes_on and number == 1,
        )
        for number, part in enumerate(parts, 1)
    ]


def _rendered(tokenizer: Any, template: str, messages: list[Message], prompt: bool) -> str:
    """What `apply_chat_template` makes of the messages, with a `prompt` for an answer."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        text.encode()  # half a surrogate pair is no text
        return text
    except Exception as error:  # a template may do anything that Jinja lets it
        raise UserError(f"The chat template cannot be rendered ({error}).") from error


def _controls(tokenizer: Any) -> dict[str, int]:
    """The ids of the tokenizer's control tokens, by their text."""
    added = tokenizer.added_tokens_decoder
    return {token.content: index for index, token in added.items() if token.special}


def _pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds control tokens in what a template wrote, the longest that fits."""
    longest_first = sorted(_controls(tokenizer), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
