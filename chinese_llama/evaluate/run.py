"""Everything that is measured of one model, and of two side by side."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama import __version__
from chinese_llama.artifacts import identity
from chinese_llama.data.formats import documents
from chinese_llama.directories import write_text
from chinese_llama.errors import UserError
from chinese_llama.evaluate.models import Subject, check_subject, open_subject


@dataclass
class Request:
    """What is measured: `texts` {name: file}, in windows of `window` tokens that move by `stride`; `choices`
    {exam: place}, with `shots` examples; `wikitext` a file."""

    texts: dict[str, Path] = field(default_factory=dict)
    stride: int | None = None
    window: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    shots: int = 5
    wikitext: Path | None = None


def check(subjects: Sequence[Subject], request: Request) -> dict[str, list[str]]:
    """The documents of the texts. Raises UserError for what is wrong before a model is loaded: a text, an exam, a
    window, a model that is not there."""
    from chinese_llama.evaluate.bits import window_length, window_stride

    for subject in subjects:
        check_subject(subject)
        try:
            window_stride(window_length(subject.context, request.window), request.stride)
        except UserError as error:
            raise UserError(f"{subject.name}: {error}") from error
    if request.choices or request.wikitext:
        from chinese_llama.evaluate import choices
        from chinese_llama.model.load import load_tokenizer

        for subject in subjects if request.choices else ():
            tokenizer = load_tokenizer(subject.tokenizer or subject.directory)
            for exam, place in request.choices.items():
                choices.check_fits(exam, place, request.shots, tokenizer, subject.context)
        if request.wikitext:
            choices.check_wikitext(request.wikitext)
    return {name: list(documents(path)) for name, path in request.texts.items()}


def measure(subject: Subject, request: Request, keep: Path | None = None) -> dict[str, Any]:
    """Figures of a model: {"name", "model", "loras", "sha256", "device", "dtype", "texts": {name: figures and
    "interval"}, "documents": {name: {"nats", "characters", "bytes", "tokens"}}, "choices", "wikitext"}.

    With `keep`, a directory, they are remembered there and not measured again while model, adapters, texts and
    request are the same. Raises UserError; it names the text and the document that a model gives no number for.
    """
    from chinese_llama.model.load import device, quiet_libraries, resolve_dtype

    quiet_libraries()
    texts = check([subject], request)
    named = {"name": subject.name, "model": subject.place, "loras": [a.name for a in subject.adapters]}
    sha = subject.identity()
    where = {"device": device(), "dtype": resolve_dtype("auto")}
    told = _kept(
        keep,
        _digest(subject, request, where),
        lambda: {"sha256": sha, **where, **_measured(subject, request, texts)},
    )
    return named | told


def speeds(
    subjects: Sequence[Subject], texts: dict[str, Path], keep: Path | None = None
) -> list[dict[str, Any]]:
    """Decoding speed of models on the one of `texts` {name: file} with the most bytes a character, the Chinese one: its
    name ("text") and what `decoding_speeds` gives. They take turns where the memory holds all of them at once. `keep`
    and what is raised as in `measure`."""
    from chinese_llama.model.load import device, quiet_libraries, resolve_dtype

    quiet_libraries()
    request, where = Request(texts), {"device": device(), "dtype": resolve_dtype("auto")}
    found = check(subjects, request)
    groups = [list(subjects)] if _fit(subjects) else [[subject] for subject in subjects]
    asked = "\n".join(["speeds", *(_digest(subject, request, where) for subject in subjects)])
    told = _kept(
        keep,
        hashlib.sha256(asked.encode()).hexdigest(),
        lambda: {"speeds": [one for group in groups for one in _speeds(group, found)]},
    )
    return list(told["speeds"])


def _speeds(subjects: Sequence[Subject], texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    with _in_memory(" and ".join(subject.name for subject in subjects), "free some memory"):
        return _decoded([open_subject(subject) for subject in subjects], texts)


def _fit(subjects: Sequence[Subject]) -> bool:
    """Whether the memory holds these models together; float16 in a file is float32 on a CPU."""
    import psutil
    import torch

    files = (file for subject in subjects for file in subject.directory.iterdir())
    size = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin"))
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return 2 * size < free


def compared(measured: dict[str, Any], baseline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name of a text: difference, interval, verdict} of two results of `measure`, see `compare`."""
    from chinese_llama.evaluate.compare import compare

    both = [name for name in measured["documents"] if name in baseline["documents"]]
    return {name: compare(measured["documents"][name], baseline["documents"][name]) for name in both}


def _measured(subject: Subject, request: Request, texts: dict[str, list[str]]) -> dict[str, Any]:
    with _in_memory(subject.name, "give a smaller --window, free some memory"):
        model, tokenizer = open_subject(subject)
        return _figures(subject, request, texts, model, tokenizer)


@contextlib.contextmanager
def _in_memory(name: str, remedy: str) -> Iterator[None]:
    """Raise UserError where the GPU has too little memory for what is done with a model."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"{name} does not fit into the GPU's memory; {remedy}, or use the CPU (CUDA_VISIBLE_DEVICES=)."
        ) from error


def _figures(
    subject: Subject, request: Request, texts: dict[str, list[str]], model: Any, tokenizer: Any
) -> dict[str, Any]:
    told: dict[str, Any] = {"texts": {}, "documents": {}, "choices": [], "wikitext": None}
    for name, found in texts.items():
        told["texts"][name], told["documents"][name] = _text(subject, request, name, found, model, tokenizer)
    if request.choices or request.wikitext:
        from chinese_llama.evaluate import choices

        for exam, place in request.choices.items():
            told["choices"].append(choices.multiple_choice(model, tokenizer, exam, place, request.shots))
        if request.wikitext:
            told["wikitext"] = choices.wikitext(model, tokenizer, request.wikitext)
    return told


def _text(
    subject: Subject, request: Request, name: str, found: list[str], model: Any, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Figures of a text and their intervals; what they are made of, by document."""
    from chinese_llama.evaluate.bits import NotFinite, score, text_windows, window_length
    from chinese_llama.evaluate.compare import interval

    length = window_length(subject.context, request.window)
    try:
        made = text_windows(tokenizer, found, length, request.stride)
        scores = score(model, made, tokenizer.eos_token_id, what=f"{subject.name}, {name}")
    except NotFinite as error:
        raise UserError(
            f"{subject.name} gives document {error.document + 1:,} of {name} no number ({error.value}): {_cause(model)}."
        ) from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    by_document: dict[str, Any] = {
        "nats": scores.nats,
        "characters": scores.characters,
        "bytes": scores.bytes,
        "tokens": scores.tokens,
    }
    intervals = {f"bits_per_{unit[:-1]}": interval(by_document, unit) for unit in ("characters", "bytes")}
    return scores.figures() | {"interval": intervals}, by_document


def _cause(model: Any) -> str:
    """Why a model gives values that are not finite, and what to do."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"its {name} has values that are not finite, so it is damaged; make or fetch it again"
    return (
        f"its weights are finite but overflow in {str(model.dtype).removeprefix('torch.')}; training that diverged, or a wrong "
        "merge, gives such weights: make them again"
    )


def _decoded(models: list[tuple[Any, Any]], texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    from chinese_llama.evaluate.speed import decoding_speeds, sample

    name = max(texts, key=lambda name: _density(texts[name]))
    return [{"text": name, **told} for told in decoding_speeds(models, sample(texts[name]))]


def _density(found: list[str]) -> float:
    """Bytes per character of the beginning of a text: about 3 in Chinese, 1 in English."""
    start = "".join(found[:10])[:10_000]
    return len(start.encode()) / len(start)


def _digest(subject: Subject, request: Request, where: dict[str, str]) -> str:
    """What a remembered result is found by: all that its figures depend on."""
    asked = {
        "model": subject.digest(),
        "texts": {name: identity(path) for name, path in request.texts.items()},
        "choices": {
            e: [p, identity(Path(p)) if Path(p).exists() else ""] for e, p in request.choices.items()
        },
        "wikitext": identity(request.wikitext) if request.wikitext else None,
        "windows": [request.window, request.stride],
        "rest": [request.shots, where, __version__],
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _kept(keep: Path | None, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `keep` remembers by a name, else what is made; then that is remembered."""
    file = keep / f"{name}.json" if keep else None
    told = _remembered(file)
    if told is None:
        told = make()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(told, ensure_ascii=False) + "\n")
    return told


def _remembered(file: Path | None) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(file.read_text(encoding="utf-8")) if file else None
        return told if isinstance(told, dict) else None
    return None
