"""Multiple choice (C-Eval, CMMLU) and WikiText-style perplexity, through lm-evaluation-harness."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

from chinese_llama.data.formats import corpus_files, documents, file_documents, records
from chinese_llama.data.templates import text_ids
from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate.exams import LETTERS, Exam, Questions, find_exam, read_exam
from chinese_llama.progress import say


def check_harness() -> None:
    """Raise UserError if lm-evaluation-harness is not installed: it is an extra."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            'Multiple choice and WikiText-style perplexity need pip install "chinese-llama[eval]".'
        )


def check_fits(exam: str, place: str | Path, shots: int, tokenizer: Any, window: int | None) -> None:
    """Raise UserError or BadFile for what would stop `multiple_choice`, a question among it that is longer, without
    examples, than the `window` tokens that a model reads (None: not known)."""
    check_harness()
    told = find_exam(exam)
    _check_lengths(told, read_exam(told, place, shots), tokenizer, window)


def _check_lengths(exam: Exam, questions: Questions, tokenizer: Any, window: int | None) -> None:
    """Refuse what HFLM would cut: a question without its beginning is another."""
    from jinja2 import Template

    template = Template(exam.task["description"] + exam.task["doc_to_text"])  # as the harness has it
    long = []
    for subject, splits in questions.items():
        name, _ = exam.subjects[subject]
        for one in splits["test"]:
            prompt = template.render(subject=name, **one.texts)
            # A token is at least a byte: most need not be counted. Twice, for what a normaliser may add.
            if window and 2 * len(prompt.encode()) > window:
                # bos is before an answer, whose last token is not read
                length = max(map(len, text_ids(tokenizer, [prompt + letter for letter in LETTERS])))
                long += [(length, one)] if length > window else []
    if long:
        length, worst = max(long, key=lambda one: one[0])
        others = f" and {len(long) - 1} more that are too long" if len(long) > 1 else ""
        raise BadFile(
            worst.file,
            f"the question is {length:,} tokens long without an example, the model reads {window:,}; give a "
            f"directory without it{others}.",
            worst.line,
        )


def multiple_choice(model: Any, tokenizer: Any, exam: str, place: str | Path, shots: int) -> dict[str, Any]:
    """How many questions of "ceval" or "cmmlu" in `place` a model answers, after `shots` examples each: the first
    of dev. Where they are too long for the model, the question is asked without the first of them.

    The answer is the letter, of A to D, that is most probable after the prompt that the exam's authors publish.
    Accuracies of categories, and the average, are means over subjects, as in both papers, whatever number of
    questions those have; standard errors hold for questions drawn at random, and are None where a subject has
    but one. Returns {"exam", "place", "shots", "questions", "average": {"accuracy", "stderr"},
    "categories": {name: {"accuracy", "stderr", "questions"}}, "subjects": {name: {"accuracy", "stderr",
    "questions", "category"}}, "shots_used": {name: least before a question}, "missing": subjects of the exam that
    are not in `place`, "source"}.

    Raises what `check_fits` raises, and UserError for values that are not finite.
    """
    check_harness()
    from chinese_llama.evaluate.harness import run

    told = find_exam(exam)
    questions = read_exam(told, place, shots)
    _check_lengths(told, questions, tokenizer, getattr(model.config, "max_position_embeddings", None))
    missing = [subject for subject in told.subjects if subject not in questions]
    if missing:
        say(
            f"{place}: {len(questions)} of the {len(told.subjects)} subjects of {told.title}; averages are theirs."
        )
    tasks = {}
    for subject, splits in questions.items():
        name, _ = told.subjects[subject]
        named = {split: [{"subject": name, **one.texts} for one in found] for split, found in splits.items()}
        tasks[subject] = (_config(told, shots), named)
    results = run(model, tokenizer, tasks)
    for subject in questions:
        _say_fewer(subject, results[subject]["shots"], shots)
    subjects = {
        subject: {
            "accuracy": results[subject]["acc,none"],
            "stderr": _number(results[subject]["acc_stderr,none"]),
            "questions": len(splits["test"]),
            "category": told.subjects[subject][1],
        }
        for subject, splits in questions.items()
    }
    return {
        "exam": exam,
        "place": str(place),
        "shots": shots,
        "questions": sum(one["questions"] for one in subjects.values()),
        "average": {name: average(subjects)[name] for name in ("accuracy", "stderr")},
        "categories": categories(told, subjects),
        "subjects": subjects,
        "shots_used": {subject: min(results[subject]["shots"]) for subject in questions},
        "missing": missing,
        "source": _source(),
    }


def _config(exam: Exam, shots: int) -> dict[str, Any]:
    without = () if shots else ("fewshot_split", "fewshot_config")
    return {**{k: v for k, v in exam.task.items() if k not in without}, "num_fewshot": shots}


def _say_fewer(subject: str, used: list[int], shots: int) -> None:
    if fewer := sum(count < shots for count in used):
        say(
            f"{subject}: {fewer} of {len(used)} questions are asked after fewer than {shots} examples, {min(used)} at "
            "least: more do not fit into the model's context."
        )


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None  # the harness writes "N/A"


def _source() -> str:
    return f"lm-eval {importlib.metadata.version('lm_eval')}"


def categories(exam: Exam, subjects: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The averages of the categories that have a subject: the exam's own, and those across them (C-Eval Hard,
    CMMLU's China specific)."""
    of: dict[str, list[str]] = {}
    for subject, (_, category) in exam.subjects.items():
        of.setdefault(category, []).append(subject)
    there = {
        name: {s: subjects[s] for s in members if s in subjects} for name, members in (of | exam.also).items()
    }
    return {name: average(members) for name, members in there.items() if members}


def average(subjects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean of the subjects' accuracies, its standard error (they are independent: the root of the sum of
    squares, over their number) and the sum of their questions."""
    errors = [one["stderr"] for one in subjects.values()]
    return {
        "accuracy": sum(one["accuracy"] for one in subjects.values()) / len(subjects),
        "stderr": None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors),
        "questions": sum(one["questions"] for one in subjects.values()),
    }


def check_wikitext(path: Path) -> None:
    """Raise UserError or BadFile for what would stop `wikitext`; no model is needed for it."""
    check_harness()
    next(documents(path))


def wikitext(model: Any, tokenizer: Any, path: Path) -> dict[str, Any]:
    """Perplexity of the documents in `path` as the harness's task wikitext measures it: {"word_perplexity",
    "byte_perplexity", "bits_per_byte", "documents", "words", "bytes", "source"}.

    As there, WikiText's own spacing (" @-@ ", " , ") is undone before the model reads a text, and words, which
    are what white space separates, and bytes are those of the text as it was: for Chinese, look at the bytes.
    Every token is scored once, in windows that do not overlap (but the last of a document, which is as long as
    the others): the first tokens of a window do not see what is before it. `evaluate.bits` lets windows overlap
    by half; its bits per byte are the same where each document fits into one window and has no such spacing.
    Raises BadFile for a text that cannot be read.
    """
    check_harness()
    from lm_eval.api.task import Task
    from lm_eval.tasks.wikitext import preprocess_wikitext as published

    from chinese_llama.evaluate.harness import run

    texts = _articles(path)
    task = {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": published.wikitext_detokenizer,
        # Its perplexities overflow on a text without spaces, where a word is thousands of nats.
        "process_results": lambda *told: {"bits_per_byte": published.process_results(*told)["bits_per_byte"]},
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    }
    results = run(model, tokenizer, {"wikitext": (task, {"test": [{"page": text} for text in texts]})})
    bits = results["wikitext"]["bits_per_byte,none"]
    words, size = sum(map(Task.count_words, texts)), sum(map(Task.count_bytes, texts))
    return {
        "word_perplexity": math.exp(min(bits * math.log(2) * size / words, 700.0)),
        "byte_perplexity": math.exp(min(bits * math.log(2), 700.0)),
        "bits_per_byte": bits,
        "documents": len(texts),
        "words": words,
        "bytes": size,
        "source": _source(),
    }


def _articles(path: Path) -> list[str]:
    """The documents in `path`. A file that begins with a title is WikiText itself, which is published line by line: it
    is put together to articles as the harness has it
    (https://huggingface.co/datasets/EleutherAI/wikitext_document_level)."""
    next(documents(path))  # which there must be
    found: list[str] = []
    for file in corpus_files(path):
        texts = list(file_documents(file))
        found += _put_together(file) if texts and _begins_article(texts[0]) else texts
    return found


def _put_together(file: Path) -> list[str]:
    articles: list[list[str]] = [[]]
    for line in (one if isinstance(one, str) else one["text"] for _, one in records(file)):
        if _begins_article(line):
            articles.append([])
        articles[-1].append(line.removesuffix("\n"))
    return [text for text in map("\n".join, articles) if text.strip()]


def _begins_article(line: str) -> bool:
    """True for a title, " = Valkyria Chronicles III = ", but not for a section's, with more of these signs."""
    title = line.replace("= = =", "===").replace("= =", "==").strip()
    return title.startswith("= ") and title.endswith(" =") and "\n" not in title
