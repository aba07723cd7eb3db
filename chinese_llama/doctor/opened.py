"""A tokenizer opened by all that reads it: SentencePiece, the tokenizers library, transformers."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.doctor import raw
from chinese_llama.doctor.finding import Finding, listing, some
from chinese_llama.doctor.things import published_tokenizer
from chinese_llama.errors import UserError
from chinese_llama.vocab.proto import read_model
from chinese_llama.vocab.readers import Reader, fast_reader, sp_reader

Encode = Callable[[list[str]], list[list[int]]]
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass
class Opened:
    """A tokenizer as its readers have it. `model`: tokenizer.model; `content`: tokenizer.json; `config`, `names`,
    `added`: the other files; `reader`: SentencePiece's, else that of tokenizer.json; `auto`: what transformers
    loads; `readings`: encoders by the name of what encodes."""

    place: Path
    published: str | None = None
    model: model_pb2.ModelProto | None = None
    content: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    reader: Reader | None = None
    auto: Any = None
    readings: dict[str, Encode] = field(default_factory=dict)

    def tokens(self) -> dict[str, tuple[int, bool]]:
        """The added tokens of all files: their ids, and whether they are special."""
        found: dict[str, tuple[int, bool]] = {}
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            found |= {name: (int(index), False) for name, index in self.added.items()}
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            decoder = self.config.get("added_tokens_decoder") or {}
            found |= {t["content"]: (int(i), bool(t.get("special"))) for i, t in decoder.items()}
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            listed = self.content.get("added_tokens") or []
            found |= {t["content"]: (int(t["id"]), bool(t.get("special"))) for t in listed}
        return found


def open_tokenizer(place: Path, found: list[Finding], auto: bool = True) -> Opened:
    """The tokenizer in a directory, as far as it can be read, by transformers too with `auto`; what cannot is put
    into `found`."""
    opened = Opened(place, published_tokenizer(place))
    opened.config, opened.names, opened.added = (raw.json_object(place / name, found) for name in SETTINGS)
    if (place / "tokenizer.model").is_file():
        opened.model = sp_model(place / "tokenizer.model", found)
    if (place / "tokenizer.json").is_file():
        opened.content = raw.json_object(place / "tokenizer.json", found)
    duplicates = list(twice(place / "tokenizer.model", opened.model)) if opened.model else []
    found += duplicates
    if opened.model is not None and not duplicates:
        model = opened.model
        opened.reader = guarded(lambda: sp_reader(model), place / "tokenizer.model", found)
        if opened.reader is not None:
            opened.readings["SentencePiece"] = opened.reader.encode
    if opened.content:
        file = place / "tokenizer.json"
        fast = guarded(lambda: fast_reader(file), file, found)
        if fast is not None:
            opened.readings["tokenizer.json"] = fast.encode
            opened.reader = opened.reader or fast
    if auto and not any(one.severity == "error" for one in found):
        _open_auto(opened, found)
    return opened


def _open_auto(opened: Opened, found: list[Finding]) -> None:
    """What transformers makes of the directory. For a tokenizer.model without tokenizer.json this toolkit writes one of
    its own, as transformers' conversion gives other ids: that is read then, and is what is loaded where nothing says
    how transformers should."""
    from chinese_llama.data.templates import text_ids
    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.model.resize import copy_tokenizer

    quiet_libraries()
    with tempfile.TemporaryDirectory() as made:
        if opened.model is not None and not opened.content:

            def convert() -> Any:
                copy_tokenizer(opened.place, Path(made))
                return _auto(Path(made))

            own = guarded(convert, opened.place, found)
            if own is None:
                return
            opened.readings["this toolkit"] = lambda texts: text_ids(own, texts)
            settled = opened.config or opened.added
            opened.auto = guarded(lambda: _auto(opened.place), opened.place, found) if settled else own
            return
        auto = opened.auto = guarded(lambda: _auto(opened.place), opened.place, found)
        if auto is None:
            return
        opened.readings[f"transformers ({type(auto).__name__})"] = lambda texts: text_ids(auto, texts)
        if opened.reader is None and hasattr(auto, "backend_tokenizer"):  # vocab.json and merges.txt
            file = Path(made) / "tokenizer.json"
            auto.backend_tokenizer.save(str(file))
            opened.reader = fast_reader(file)


def _auto(place: Path) -> Any:
    from transformers import AutoTokenizer

    with _quiet_stdout():
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """The tokenizers library prints by itself ("Ignored unknown kwarg option"), past Python: not into our JSON."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def plain_auto(place: Path) -> Encode | None:
    """What transformers' own conversion of a tokenizer.model reads, None where it cannot."""
    from chinese_llama.data.templates import text_ids

    with contextlib.suppress(Exception):  # transformers raises many kinds
        auto = _auto(place)
        return lambda texts: text_ids(auto, texts)
    return None


def guarded(work: Callable[[], Any], where: Path, found: list[Finding]) -> Any:
    """What `work` gives; None, and a finding, where a library cannot read what is there."""
    try:
        return work()
    except Exception as error:  # the libraries raise many kinds
        if where.is_dir() and (
            problem := config_problem(where)
        ):  # transformers reads that for a tokenizer too
            found.append(problem)
            return None
        code = "trust_remote_code" in str(error) or "custom code" in str(error)
        remedy = "Get the file again from where it was published, or make it again."
        if code:
            remedy = (
                "Use the tokenizer.json form, if there is one; this toolkit never runs a model's own code."
            )
        check = "needs-own-code" if code else "tokenizer-not-readable"
        what = "The tokenizer is a program of its own." if code else "The tokenizer does not load."
        found.append(Finding("error", check, str(where), what, [_words(error)], remedy))
        return None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def config_problem(place: Path) -> Finding | None:
    """Why transformers does not load the config.json in a directory; None where it does, there is none, or it is
    that of a model with its own code, which is not run here."""
    from chinese_llama.model.load import quiet_libraries

    file, found = place / "config.json", list[Finding]()
    if not raw.json_object(file, found):
        return found[0] if found else None
    quiet_libraries()
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        if "trust_remote_code" in str(error):
            return None  # the value is no wrong one; a tokenizer with its own code is told of as such
        return Finding(
            "error", "config-field-wrong", str(file),
            "config.json holds a value that transformers refuses, so that neither model nor tokenizer load.",
            [_words(error)],
            "Correct the field that is named, as the model's source has it.",
        )  # fmt: skip
    return None


def sp_model(file: Path, found: list[Finding]) -> model_pb2.ModelProto | None:
    """The SentencePiece model in a file; None, and a finding, where it is none."""
    problem = raw.broken(file)
    if problem is None:
        try:
            return read_model(file)
        except (UserError, UnicodeError) as error:
            problem = _no_model(file, str(error).removeprefix(f"{file}: "))
    found.append(problem)
    return None


def _no_model(file: Path, told: str) -> Finding:
    with open(file, "rb") as stream:
        start = stream.read(200)
    first = start.split(b"\n")[0].split()
    tiktoken = len(first) == 2 and first[1].isdigit() and first[0].isascii()
    return Finding(
        "error", "tokenizer-not-readable", str(file),
        "The file is in tiktoken's form (Llama 3's own), not SentencePiece's."
        if tiktoken
        else f"The file {told}",
        [*listing(file), f"begins with {start[:24]!r}"],
        "Use the tokenizer.json that lies beside the model's Hugging Face weights."
        if tiktoken
        else "It is damaged, or of another kind: get it again, and compare its size and sha256.",
    )  # fmt: skip


def twice(file: Path, model: model_pb2.ModelProto) -> Iterator[Finding]:
    """Pieces that are there twice, or empty: SentencePiece reads neither."""
    counts = Counter(piece.piece for piece in model.pieces)
    wrong = [piece for piece, count in counts.items() if count > 1 or not piece]
    if wrong:
        ids = {piece: [i for i, p in enumerate(model.pieces) if p.piece == piece][:3] for piece in wrong[:5]}
        yield Finding(
            "error", "duplicate-pieces", str(file),
            f"{len(wrong):,} pieces are there more than once, or are empty; ids must be told apart by pieces.",
            some([f"{piece!r}: ids {', '.join(map(str, ids.get(piece, [])))}" for piece in wrong]),
            "Make the tokenizer again without them: chinese-llama extend-vocab.",
        )  # fmt: skip


def vocabulary_of(content: dict[str, Any]) -> dict[str, int]:
    """The ids of the pieces in tokenizer.json, without added tokens; {} where it cannot be told."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, IndexError):
        known = content["model"]["vocab"]
        return {row[0]: i for i, row in enumerate(known)} if isinstance(known, list) else dict(known)
    return {}
