"""How much text a token holds, on sources that the choice of pieces has not seen; how fast it is.

    python -m benchmarks vocab --data DATA

`--data` is a folder with tokenizers/llama/tokenizer.model, tokenizers/chinese_sp.model,
zh_pretrain.jsonl.gz, alpaca_zh.jsonl.gz, preference_zh.jsonl.gz and en_pretrain.jsonl.gz. Each
group of sources is held out in turn: pieces are chosen on the others and measured on it, in non-ASCII
characters per token that holds at least one. Then the time of each command's work is set against the
tokenizers library's `encode_batch` on the same text. Some minutes on two cores.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.record import ROOT, in_turns, markdown, measured, options_of, ratio, record
from chinese_llama.data.formats import texts
from chinese_llama.vocab import audit, merge
from chinese_llama.vocab.bases import open_base
from chinese_llama.vocab.corpus import read_corpus
from chinese_llama.vocab.proto import read_chinese
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.select import select

FILES = ("zh_pretrain", "alpaca_zh", "preference_zh")
FOLDS = {
    "instructions": ("alpaca_zh", "preference_zh"),
    "exam dialogues (c3)": ("nlpdata/c3",),
    "encyclopedic dialogues (KdConv)": ("thu-coai/KdConv",),
    "essays (weekly)": ("ruanyf/weekly",),
    "recipes": ("Anduin2017/HowToCook",),
    "books and manuals": (
        "d2l-ai/d2l-zh",
        "selfteaching/the-craft-of-selfteaching",
        "reactjs/zh-hans.react.dev",
        "pingcap/docs-cn",
    ),
}
SIZES = (39_936, 49_953, 55_296)


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as made:
        tables = f"{held_out(options.data, Path(made))}\n\n{speed(options.data, Path(made))}"
    notes = "Non-ASCII characters per token that holds at least one, on held-out sources; then the commands."
    record("vocab", tables, notes, options.results)


def by_source(data: Path) -> dict[str, list[str]]:
    """Source -> documents as JSON lines."""
    sources: dict[str, list[str]] = {}
    for name in FILES:
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                sources.setdefault(json.loads(line).get("source", name), []).append(line)
    return sources


def held_out(data: Path, work: Path) -> str:
    """Rows: ways to make a tokenizer; columns: what was held out."""
    base, chinese = open_base(data / "tokenizers" / "llama"), data / "tokenizers" / "chinese_sp.model"
    sources = by_source(data)
    rows: dict[tuple[str, int], list[str]] = {}
    for fold in FOLDS.values():
        seen, unseen = work / "seen.jsonl", work / "unseen.jsonl"
        seen.write_text("".join(line for s, ls in sources.items() if s not in fold for line in ls))
        unseen.write_text("".join(line for source in fold for line in sources[source]))

        def measure(name: str, path: Path, unseen: Path = unseen) -> None:
            told = audit.audit_vocab(path, [unseen])
            figure = told["files"][str(unseen)]["non_ascii_per_token"]
            rows.setdefault((name, told["vocab_size"]), []).append(f"{figure:.3f}")

        measure("LLaMA", base.file)
        for name, arguments in {
            "Chinese-LLaMA (--policy reference)": {"policy": "reference"},
            "chinese_sp.model alone": {},
        }.items():
            merge.extend_vocab(base.file, chinese, work / "tokenizer", force=True, **arguments)  # type: ignore[arg-type]
            measure(name, work / "tokenizer")
        counts = read_corpus([seen], held_out=0).counts
        for size in SIZES:
            pieces = select(base, read_chinese(chinese), counts, size - base.size).pieces
            with tempfile.TemporaryDirectory(dir=work) as made:
                base.write(Path(made), pieces, None)
                measure("chinese_sp.model and the other sources", Path(made))
    lines = [[name, f"{size:,}", *figures] for (name, size), figures in rows.items()]
    return markdown(["tokenizer", "pieces", *FOLDS], lines)


def speed(data: Path, work: Path) -> str:
    """Seconds of the commands, and of reading a corpus in each way."""
    zh = [data / f"{name}.jsonl.gz" for name in ("zh_pretrain", "alpaca_zh")]
    llama, chinese = str(data / "tokenizers" / "llama"), str(data / "tokenizers" / "chinese_sp.model")
    extend = ["extend-vocab", "--base", llama, "--chinese-sp", chinese]
    made, again = str(work / "made"), str(work / "again")
    corpus = [word for path in zh for word in ("--corpus", str(path))]
    rows = [
        ["extend-vocab, from chinese_sp.model", *command([*extend, "--output", made])],
        ["extend-vocab --corpus (both Chinese files)", *command([*extend, *corpus, "--output", again])],
    ]
    commands = markdown(["command", "seconds", "peak resident memory, MiB"], rows)
    documents = list(texts(zh[0]))
    size = sum(len(text.encode()) for text in documents) / 1e6
    new, other = open_readers(Path(made))
    base = open_readers(Path(llama))[0]
    raw = tokenizers.Tokenizer.from_file(str(Path(made) / "tokenizer.json"))
    ways: dict[str, Callable[[], Any]] = {
        "`encode_batch` of tokenizers": lambda: [raw.encode_batch(b) for b in batches(documents)],
        "audit-vocab: both readers, the base, all checks": lambda: audit.compare(documents, new, other, base),
        "audit-vocab without a base": lambda: audit.compare(documents, new, other, None),
    }
    times = in_turns({name: partial(seconds, way) for name, way in ways.items()}, 3)
    first = times["`encode_batch` of tokenizers"]
    lines = [
        [name, f"{size / statistics.median(found):.1f}", f"{ratio(first, found):.2f}"]
        for name, found in times.items()
    ]
    return commands + "\n\n" + markdown([f"zh_pretrain, {size:.1f} MB", "MB/s", "of encode_batch"], lines)


def batches(documents: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(documents), audit.BATCH):
        yield documents[start : start + audit.BATCH]


def seconds(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def command(words: list[str]) -> list[str]:
    """[seconds, MiB] of a command of the tool."""
    done = measured([sys.executable, "-m", "chinese_llama", *words])
    return [f"{done.seconds:.1f}", f"{done.peak_mib:,.0f}"]
