"""Prompts from a file, answered by one model or two.

A directory of answers holds answers.jsonl, a record a prompt: {"number" (from 1), "line" (of the prompts file; null
for a list in .json), "prompt", "keyword" (or null), "answers": {"A": text, "B": text}}; answers.html, the same to
read (chinese_llama.evaluate.rating); and the manifest, whose inputs "A", "B" and "prompts" say what the models are.
A directory from elsewhere will do for `rate` and `judge` if its answers.jsonl has number, prompt and answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chinese_llama.artifacts import Manifest, input_record, read_manifest, stands, write_manifest
from chinese_llama.data.conversations import Malformed, first_question
from chinese_llama.data.formats import corpus_files, records, valid_unicode
from chinese_llama.directories import alone_in, check_apart, check_output, new_directory, write_text
from chinese_llama.errors import BadFile, Interrupted, UserError
from chinese_llama.evaluate.lines import append_line, read_lines
from chinese_llama.evaluate.wins import wilson
from chinese_llama.progress import say, track

if TYPE_CHECKING:  # it loads torch, which `rate` and `judge` do without
    from chinese_llama.evaluate.models import Subject
    from chinese_llama.merging.adapter import Adapter

ANSWERS, PAGE, VOTES, JUDGEMENTS = "answers.jsonl", "answers.html", "votes.jsonl", "judgements.jsonl"
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A question; `keyword` is a word that a right answer holds, `line` where it stands in its file."""

    text: str
    keyword: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class How:
    """How answers are generated, as `generate.answer` has it."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    raw: bool = False


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers by label, "A" and "B"."""

    number: int
    prompt: str
    answers: dict[str, str]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: a line each in .txt (empty ones are skipped); of records (.jsonl, .json, .parquet; all
    but the last also .gz, .zst) the field `prompt`, or what the user asks first in a record of instruction data
    (chinese_llama.data.conversations), with `keyword` where there is one.

    Raises BadFile where a record has no prompt, and where there is none at all.
    """
    if Path(path).is_dir():
        raise BadFile(path, "is a directory; a file of prompts is wanted here.")
    (file,) = corpus_files(path)
    prompts = []
    for number, (line, record) in enumerate(records(file), 1):
        if not isinstance(record, str) or record.strip():
            prompts.append(_prompt(file, line, f"record {number} " if line is None else "", record))
    if not prompts:
        raise BadFile(file, "holds no prompts.")
    return prompts


def _prompt(file: Path, line: int | None, where: str, record: Any) -> Prompt:
    if isinstance(record, str):
        return Prompt(valid_unicode(file, line, record.strip()), None, line)
    try:
        text = record["prompt"] if isinstance(record, dict) and "prompt" in record else first_question(record)
    except Malformed as error:
        raise BadFile(file, f"{where}has no field 'prompt', and {error}", line) from None
    keyword = record.get("keyword")
    for name, value in (("prompt", text), ("keyword", keyword)):
        if not isinstance(value, str) and (name, value) != ("keyword", None):
            raise BadFile(file, f"{where}the field {name!r} is not text.", line)
        valid_unicode(file, line, value or "")
    if not text.strip():
        raise BadFile(file, f"{where}the prompt is empty.", line)
    return Prompt(text, keyword or None, line)


def check_room(
    tokenizer: Any, context: int, prompts: Sequence[Prompt], file: Path, raw: bool = False
) -> None:
    """Raise BadFile, naming the line, for a prompt that leaves a model of `context` tokens no room to answer."""
    from chinese_llama.evaluate.generate import model_input

    for number, prompt in enumerate(prompts, 1):
        length = len(model_input(tokenizer, prompt.text, raw))
        if length >= context:
            where = f"prompt {number}" if prompt.line is None else "the prompt"
            what = f"{where} is too long: {length:,} tokens, and the model holds {context:,} with the answer."
            raise BadFile(file, what, prompt.line)


def answering(
    model: Any, tokenizer: Any, prompts: dict[int, Prompt], how: How, what: str = "answering"
) -> Iterator[tuple[int, str]]:
    """(number, answer) of prompts by number (from 1), in batches, in the order in which they end.

    A prompt's seed is that of `how` and its number: what is drawn for one says nothing of another, be it the same.
    """
    from chinese_llama.evaluate.generate import answer_all, model_input

    numbers = list(prompts)
    ids = [model_input(tokenizer, prompt.text, how.raw) for prompt in prompts.values()]
    seeds = [how.seed + number - 1 for number in numbers]
    said = answer_all(model, tokenizer, ids, how.max_new_tokens, how.temperature, seeds)
    for index, text in track(said, what, len(numbers), "prompts"):
        yield numbers[index], text


def right(said: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    """{"questions", "right", "share", "interval": [low, high]} of the prompts with a keyword: the answer holds it.
    None where no prompt has one. The interval is Wilson's (`wins.wilson`)."""
    found = [prompt.keyword in text for text, prompt in zip(said, prompts, strict=True) if prompt.keyword]
    if not found:
        return None
    count, good = len(found), sum(found)
    return {"questions": count, "right": good, "share": good / count, "interval": wilson(good, count)}


def answer_file(
    prompts_file: Path,
    models: dict[str, str],
    output: Path,
    how: How = How(),
    force: bool = False,
    adapters: Sequence[Adapter] = (),
) -> Manifest:
    """Write `output`, a directory of answers of the `models` ({"A": place, "B": place}) to the prompts of a file; one
    model is in memory at a time. `adapters` are on the first, unmerged. What stands and was made from the same is kept.

    Answers are kept in `output`.run as they come: a run that was stopped, killed or broken goes on; with other inputs
    or settings it does so only with `force`, from the beginning. Raises BadFile for prompts before a model is loaded,
    OutputExists, DoesNotFit, UserError, Interrupted where it is stopped.
    """
    from chinese_llama.evaluate.models import Subject

    prompts = read_prompts(prompts_file)
    subjects = {label: Subject(place, place) for label, place in models.items()}
    first = next(iter(subjects.values()))
    first.adapters = list(adapters)
    first.name = " + ".join([first.place, *(adapter.name for adapter in adapters)])
    places = {label: subject.directory for label, subject in subjects.items()} | {"prompts": prompts_file}
    places |= {f"adapter:{i}": adapter.path for i, adapter in enumerate(adapters)}
    manifest = Manifest("answers", "generate", settings=asdict(how))
    manifest.settings["models"] = {label: subject.digest() for label, subject in subjects.items()}
    manifest.inputs = {role: input_record(place) for role, place in places.items()}
    if stands(output, manifest, force):
        return read_manifest(output) or manifest
    check_output(output, force)
    check_apart(output, list(places.values()))
    _check_opinions(output)
    for subject in subjects.values():
        _check_model(subject, prompts, prompts_file, how.raw)
    names = {label: subject.name for label, subject in subjects.items()}
    manifest.metrics = {"prompts": len(prompts), "models": names}
    with _work_beside(output, len(prompts) * len(models)) as work:
        _check_journal(work / JOURNAL, manifest, force)
        said = _journalled(work / JOURNAL, subjects, prompts, how)
        with new_directory(output, force, list(places.values())) as partial:
            _write(partial, manifest, prompts, said)
    return manifest


@contextlib.contextmanager
def _work_beside(output: Path, wanted: int) -> Iterator[Path]:
    """The directory `output`.run, for this process alone. It goes when the block ends; if that fails with answers in
    the journal, it stays, and a stop is told as Interrupted."""
    work = output.absolute().with_name(f"{output.absolute().name}.run")
    work.mkdir(parents=True, exist_ok=True)
    if any(entry.name != JOURNAL for entry in work.iterdir()):
        raise UserError(
            f"{work}, where answers are kept on the way, holds other things; give another output."
        )
    with alone_in(work):
        try:
            yield work
        except BaseException as error:
            kept = max(0, len(read_lines(work / JOURNAL)) - 1)
            if not kept:
                shutil.rmtree(work)
            elif isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"Stopped: {kept:,} of {wanted:,} answers are kept in {work}; the same command goes on."
                ) from error
            raise
        shutil.rmtree(work)


def _check_opinions(output: Path) -> None:
    """Raise UserError where `output` holds what people or a judge say of its answers, which --force would remove."""
    for name in (VOTES, JUDGEMENTS):
        if (output / name).is_file():
            raise UserError(
                f"{output / name} is about the answers there; move it away, or give another output."
            )


def _check_model(subject: Subject, prompts: Sequence[Prompt], file: Path, raw: bool) -> None:
    """Raise what can be told of a model before its weights are read."""
    from chinese_llama.evaluate.models import check_subject
    from chinese_llama.model.load import load_tokenizer

    check_subject(subject)
    if subject.tokenizer and subject.context:
        check_room(load_tokenizer(subject.tokenizer), subject.context, prompts, file, raw)


def _check_journal(journal: Path, manifest: Manifest, force: bool) -> None:
    """Let the journal be of these inputs and settings: it is begun, or with `force` begun anew. Raises UserError where
    it holds answers of others."""
    plan = hashlib.sha256(json.dumps([manifest.inputs, manifest.settings]).encode()).hexdigest()
    first, *rest = read_lines(journal) or [{}]
    if first.get("of") == plan:
        return
    if rest and not force:
        raise UserError(
            f"{journal.parent} holds {len(rest):,} answers of a run with other inputs or settings; give its command, or "
            "another --output, or --force, which removes them."
        )
    journal.unlink(missing_ok=True)
    append_line(journal, {"of": plan})


def _journalled(
    journal: Path, subjects: dict[str, Subject], prompts: Sequence[Prompt], how: How
) -> dict[str, list[str]]:
    """The answers of each model, in order: those that the journal holds, and the others, which are added to it."""
    known = read_lines(journal)[1:]
    if known:
        say(f"Going on: {len(known):,} of {len(prompts) * len(subjects):,} answers are there.")
    said: dict[str, dict[int, str]] = {label: {} for label in subjects}
    for entry in known:
        said[entry["model"]][entry["number"]] = entry["said"]
    for label, subject in subjects.items():
        todo = {number: p for number, p in enumerate(prompts, 1) if number not in said[label]}
        for number, text in _answers_of(subject, todo, how) if todo else ():
            append_line(journal, {"model": label, "number": number, "said": text})
            said[label][number] = text
    return {label: [texts[number] for number in sorted(texts)] for label, texts in said.items()}


def _answers_of(subject: Subject, prompts: dict[int, Prompt], how: How) -> Iterator[tuple[int, str]]:
    """The answers of a model, which is in memory until the last."""
    from chinese_llama.evaluate.models import open_subject

    yield from answering(*open_subject(subject), prompts, how, f"answering with {subject.name}")


def _write(
    directory: Path, manifest: Manifest, prompts: Sequence[Prompt], said: dict[str, list[str]]
) -> None:
    from chinese_llama.evaluate.rating import page

    answered = [
        Answered(number, prompt.text, {label: texts[number - 1] for label, texts in said.items()})
        for number, prompt in enumerate(prompts, 1)
    ]
    lines = [
        {"number": a.number, "line": p.line, "prompt": p.text, "keyword": p.keyword, "answers": a.answers}
        for a, p in zip(answered, prompts, strict=True)
    ]
    write_text(directory / ANSWERS, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    write_text(directory / PAGE, page(answered, manifest.metrics["models"], manifest.settings["seed"]))
    scores = {label: right(texts, prompts) for label, texts in said.items()}
    if any(scores.values()):
        manifest.metrics["right"] = scores
    write_manifest(directory, manifest)


def read_answers(directory: Path) -> tuple[list[Answered], dict[str, str], int]:
    """The answers in a directory, {label: name of its model}, and the seed of the blind order. Raises BadFile where
    there are none, or one is no record as the module describes."""
    file = Path(directory) / ANSWERS
    if not file.is_file():
        raise BadFile(file, "no such file; chinese-llama generate --prompts FILE --output DIR makes it.")
    manifest = read_manifest(Path(directory))
    models, settings = (manifest.metrics.get("models", {}), manifest.settings) if manifest else ({}, {})
    found: dict[int, Answered] = {}
    labels: list[str] = []
    for line, record in records(file):
        one = _answered(file, line, record)
        labels = labels or list(one.answers)
        if one.number in found:
            raise BadFile(file, f"number {one.number} is there twice.", line)
        if one.answers.keys() != set(labels):
            raise BadFile(file, "has answers of other models than the first line.", line)
        found[one.number] = one
    if not found:
        raise BadFile(file, "holds no answers.")
    names = {label: models.get(label, label) for label in labels}
    return list(found.values()), names, int(settings.get("seed", 0))


def _answered(file: Path, line: int | None, record: Any) -> Answered:
    """A record of answers.jsonl. Raises BadFile."""
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    number, prompt, said = (fields.get(name) for name in ("number", "prompt", "answers"))
    texts = [prompt, *said.values()] if isinstance(said, dict) else []
    if type(number) is not int or len(texts) not in (2, 3) or not all(isinstance(t, str) for t in texts):
        what = "is no record with number, prompt and answers ({label: text} of one or two models)."
        raise BadFile(file, what, line)
    for text in texts:
        valid_unicode(file, line, text)
    return Answered(fields["number"], fields["prompt"], fields["answers"])
