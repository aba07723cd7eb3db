"""Conversations as token ids: the one place that writes and tokenises them.

Training, `generate` and `chat` all come here. A template is a Jinja chat template, saved with the
tokenizer of a tuned model, so that `apply_chat_template` gives the same prompt ids elsewhere.

It is rendered with a mark in place of every text of a user, so what it writes itself is known: its control
tokens become ids, the rest is tokenised as text, whatever users write. The text before an answer is
tokenised as generation has it, apart from the answer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
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
LINE = re.compile("[^\n]*\n|[^\n]+")
NORMALIZER = {  # LLaMA's, as the tokenizers library writes it
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
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
    """What is tokenised by itself: a text in parts, marks where users' texts go. `ids` are those of a control
    token or of a text without marks, which are the same in every conversation.

    `ends`: it ends an answer. `goes_on`: text stands before it.
    """

    text: tuple[str, ...]
    ids: list[int] | None
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
        texts += [(_filled(one.text, contents), one.goes_on) for one in layout if one.ids is None]
    ids = _encoded(tokenizer, texts)
    return [_sample(layout, ids) for layout in layouts]


def _sample(layout: list[Segment], texts: Iterator[list[int]]) -> Sample:
    made = Sample([], [])
    for segment in layout:
        ids = next(texts) if segment.ids is None else segment.ids
        made.input_ids += ids
        made.labels += ids if segment.learnt else [IGNORE] * len(ids)
        if segment.ends:
            made.turns.append(len(made.input_ids))
    return made


def _encoded(tokenizer: Any, texts: list[tuple[str, bool]]) -> Iterator[list[int]]:
    """Ids of texts, each with whether it goes on after another text: then it gets no dummy prefix, the space
    that SentencePiece puts before a text."""
    lead = text_ids(tokenizer, LEAD)  # and the backend takes literal control tokens as text, and cuts nothing
    cut = len(lead) if tokenizer.convert_ids_to_tokens(lead[0]) == "▁" else 0
    given = [LEAD + text if cut and goes_on else text for text, goes_on in texts]
    found = tokenizer.backend_tokenizer.encode_batch_fast(given, add_special_tokens=False)
    for encoding, (_, goes_on) in zip(found, texts, strict=True):
        yield encoding.ids[cut:] if goes_on else encoding.ids


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
        goes_on = bool(segments and segments[-1].text) and not prompt.endswith(" ")
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
    """What is between control tokens, and those themselves; `learnt`: `text` is an answer to its end.

    Lines without marks are segments of their own, where that does not change ids.
    """
    controls = _controls(tokenizer)
    apart = _lines_apart(tokenizer, len(tokenizer))
    segments: list[Segment] = []
    for part in filter(None, _pattern(tokenizer).split(text)):
        if part in controls:
            segments.append(Segment((), [controls[part]], learnt))
        else:
            lines = groupby(LINE.findall(part) if apart else [part], _marks)
            for marks, group in lines:
                piece = "".join(group)
                ids = None if marks else next(_encoded(tokenizer, [(piece, goes_on)]))
                parts = tuple(filter(None, MARK.split(piece)))
                segments.append(Segment(parts, ids, learnt, goes_on=goes_on))
                goes_on = True
        goes_on = False
    if learnt:
        segments[-1] = dataclasses.replace(segments[-1], ends=True)
    return segments


def _marks(text: str) -> bool:
    return MARK.search(text) is not None


@functools.lru_cache(maxsize=1)
def _lines_apart(tokenizer: Any, size: int) -> bool:
    """Whether the ids of a text are those of its lines (each with its line break), one behind the other, whatever the
    text; `size` is the tokenizer's.

    So it is for LLaMA's: BPE on whole texts, where a line break becomes a byte token, and no piece holds one and
    something else. No merge reaches over it, and the merges before it do not depend on those behind it.
    """
    model, normalizer = tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.normalizer
    if type(model).__name__ != "BPE" or tokenizer.backend_tokenizer.pre_tokenizer or not normalizer:
        return False
    if model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if not all(token.special for token in tokenizer.added_tokens_decoder.values()):
        return False  # it is looked for in users' texts
    if json.loads(normalizer.__getstate__()) != NORMALIZER:
        return False
    bytes_alone = ["▁", *(f"<0x{byte:02X}>" for byte in f"{LEAD}\n".encode())]
    if tokenizer.convert_ids_to_tokens(text_ids(tokenizer, f"{LEAD}\n")) != bytes_alone:
        return False
    return not any(
        "\n" in piece or ("<0x" in piece and piece != piece[:6]) for piece in tokenizer.get_vocab()
    )


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
