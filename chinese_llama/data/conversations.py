"""Conversations from records in the formats that instruction data come in.

alpaca: `instruction`, `input` (may be absent), `output`, and where there are any `system` and `history`
(pairs of question and answer). belle: the same fields, where the instruction may hold a whole dialogue
"Human:...\\nAssistant:...\\nHuman:...\\nAssistant:"
(https://huggingface.co/datasets/BelleGroup/multiturn_chat_0.8M); or `conversations` as in sharegpt.
sharegpt: `conversations`, a list of {"from", "value"}. openai: `messages`, a list of {"role", "content"}.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from chinese_llama.data.formats import corpus_files, records, valid_unicode
from chinese_llama.errors import BadFile, UserError, nearest
from chinese_llama.progress import say

# A message has "role" (system, user, assistant) and "content". A question that came in two fields also has
# them apart, as "instruction" and "input", for the template that writes them apart.
Message = dict[str, str]
FORMATS = ("alpaca", "belle", "sharegpt", "openai")
EITHER = "alpaca or belle"  # both have an instruction; a dialogue in it is belle's
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}
BELLE_TURN = re.compile(r"(?:\A|\n)\s*(Human|Assistant):")


def conversations(path: Path, format: str = "auto", on_bad: str = "stop") -> Iterator[list[Message]]:
    """The conversations in a file or in all files of a directory; `format` "auto" goes by each file's
    first record.

    A conversation may begin with a system message; then user and assistant take turns, the assistant has
    the last word. So what an assistant says before the first question and a question at the end that
    nobody answers are dropped. Records with an empty question or answer are left out, and their number is
    told. Raises BadFile for a malformed record (`on_bad` "skip": those are left out and counted too), and
    where no conversation is left; UserError for an unknown format.
    """
    left_out: Counter[str] = Counter()
    found = 0
    for file in corpus_files(path):
        for conversation in file_conversations(file, format, on_bad, left_out):
            found += 1
            yield conversation
    total = found + left_out.total()
    if left_out["empty"]:
        say(
            f"{path}: left out {left_out['empty']:,} of {total:,} records, whose question or answer is empty."
        )
    if left_out["malformed"]:
        say(f"{path}: skipped {left_out['malformed']:,} of {total:,} records, which are malformed.")
    if not found:
        raise BadFile(path, "holds no conversations.")


def file_conversations(
    file: Path, format: str, on_bad: str, left_out: Counter[str]
) -> Iterator[list[Message]]:
    """The conversations of one file, none is no error; those left out are counted as "empty" and
    "malformed". Raises as `conversations`."""
    if format not in ("auto", *FORMATS):
        known = ", ".join(FORMATS)
        raise UserError(f"format {format!r} is unknown{nearest(format, FORMATS)}; known are auto, {known}.")

    def skip(error: BadFile) -> None:
        if not left_out["malformed"]:
            say(f"Skipped: {error}")
        left_out["malformed"] += 1

    found = None if format == "auto" else format
    for number, (line, record) in enumerate(records(file, bad=skip if on_bad == "skip" else None), 1):
        try:
            found = found or detected(record)
            conversation = conversation_of(found, record)
            valid_unicode(file, line, "\n".join(chain.from_iterable(map(dict.values, conversation))))
        except (Malformed, BadFile) as error:
            where = "" if line else f"record {number} "
            told = error if isinstance(error, BadFile) else BadFile(file, f"{where}{error}", line)
            if on_bad != "skip":
                raise told from None
            skip(told)
            continue
        if conversation and all(message["content"].strip() for message in conversation):
            yield conversation
        else:
            left_out["empty"] += 1


class Malformed(Exception):
    """What is wrong with a record, to stand after the file's name."""


def detected(record: Any) -> str:
    """The format of a record. Raises Malformed for none that is known."""
    if isinstance(record, str):
        raise Malformed("is plain text; conversations come as .jsonl, .json or .parquet records.")
    for format, name in (("openai", "messages"), ("sharegpt", "conversations"), ("alpaca", "instruction")):
        if isinstance(record, dict) and name in record:
            return EITHER if format == "alpaca" else format
    known = "alpaca and belle (instruction, output), sharegpt (conversations), openai (messages)"
    raise Malformed(f"is in no known format (found: {_names(record)}); known are {known}.")


def conversation_of(format: str, record: Any) -> list[Message]:
    """The messages of a record; empty where no question is answered. Raises Malformed."""
    try:
        return _alternating(_turns(format, record))
    except Malformed as error:
        raise Malformed(f"is no {format} record: {error}.") from None


def first_question(record: Any) -> str:
    """What a user asks first in a record of any format, answered or not; '' where nobody asks. Raises Malformed."""
    format = detected(record)
    turns = _turns(format, {"output": "", **record} if format == EITHER else record)
    return next((turn["content"] for turn in turns if turn["role"] == "user"), "")


def _turns(format: str, record: Any) -> list[Message]:
    if not isinstance(record, dict):
        raise Malformed(f"it is no mapping (found: {_names(record)})")
    if format == "openai":
        return _listed(record, "messages", "role", "content")
    if format == "sharegpt" or (format == "belle" and "conversations" in record):
        return _listed(record, "conversations", "from", "value")
    return _fields(record, format != "alpaca")


def _alternating(turns: list[Message]) -> list[Message]:
    """`turns` from the first question to the last answer, after a system message that is not empty."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    first, last = len(system), len(turns)
    while first < last and turns[first]["role"] == "assistant":
        first += 1
    while first < last and turns[last - 1]["role"] == "user":
        last -= 1
    for index in range(first, last):
        wanted = ("user", "assistant")[(index - first) % 2]
        if turns[index]["role"] != wanted:
            raise Malformed(f"turn {index + 1} is the {turns[index]['role']}'s, not the {wanted}'s")
    if first == last:
        return []
    return [turn for turn in system if turn["content"].strip()] + turns[first:last]


def _listed(record: dict[str, Any], name: str, role: str, content: str) -> list[Message]:
    """The turns of a record that lists them under `name`."""
    turns = record.get(name)
    if not isinstance(turns, list):
        raise Malformed(f"it has no list {name!r} (found: {_names(record)})")
    system = _text(record, "system", needed=False)
    found = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Malformed(f"turn {number} is not {{{role!r}, {content!r}}}")
        speaker = _text(turn, role)
        if speaker.lower() not in ROLES:
            raise Malformed(f"turn {number} is from {speaker!r}; known are {', '.join(ROLES)}")
        found.append({"role": ROLES[speaker.lower()], "content": _text(turn, content)})
    return found


def _fields(record: dict[str, Any], belle: bool) -> list[Message]:
    """The turns of a record with instruction, input and output."""
    instruction, output = _text(record, "instruction"), _text(record, "output")
    system, given = _text(record, "system", needed=False), _text(record, "input", needed=False)
    turns = [{"role": "system", "content": system}] if system else []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Malformed("its 'history' is not a list of pairs of texts")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Malformed("its 'history' is not a list of pairs of texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    dialogue = _belle_turns(instruction) if belle else []
    if dialogue:
        dialogue[-1]["content"] += f"\n{given}" if given else ""
        turns += dialogue
    elif given:
        joined = f"{instruction}\n{given}"
        turns.append({"role": "user", "content": joined, "instruction": instruction, "input": given})
    else:
        turns.append({"role": "user", "content": instruction})
    return [*turns, {"role": "assistant", "content": output}]


def _belle_turns(instruction: Any) -> list[Message]:
    """The turns of a dialogue that waits for an answer; none where `instruction` is a single question."""
    text = instruction.strip() if isinstance(instruction, str) else ""
    if not (text.startswith("Human:") and text.endswith("Assistant:")):
        return []
    parts = BELLE_TURN.split(text)[1:-2]  # without the last "Assistant:", whose text is the output
    return [
        {"role": ROLES[speaker.lower()], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _text(record: dict[str, Any], name: str, needed: bool = True) -> str:
    """The text of a field; "" where it is null, or absent and not needed."""
    if needed and name not in record:
        raise Malformed(f"it has no {name!r} (found: {_names(record)})")
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise Malformed(f"its {name!r} is not text")
    return value or ""


def _names(record: Any) -> str:
    names = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    return names or "nothing"
