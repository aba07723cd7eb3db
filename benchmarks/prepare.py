"""Preparing data beside its parts and its peers: MB of text a second, peak memory.

    python -m benchmarks prepare --data DATA

`--data` is a folder with tokenizers/llama/tokenizer.model, zh_pretrain.jsonl.gz and alpaca_zh.jsonl.gz. "Ours" is
all that happens between a file and prepared blocks on the disk: reading, tokenising, packing, writing,
flushing, hashing. It stands beside the tokenizers library's encode_batch (and encode_batch_fast, which
leaves out offsets) on the same texts, which are in memory already (a template's own lines, which ours tokenises
once, are in each of them), and beside `datasets.map` with a process
for each hardware thread, as Chinese-LLaMA-Alpaca and LLaMA-Factory prepare data: tokenised in one map,
brought into blocks in another (for instructions: written with the template and tokenised in one map, not
packed), in the cache files that datasets keeps. Each in a process of its own, in turns; the clock starts
when the tokenizer is loaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.record import OUT, ROOT, Measured, in_turns, markdown, measured, options_of, ratio, record

PROMPT = (  # as the template chinese-alpaca writes it
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: "
)
KINDS = {"pretraining": "zh_pretrain", "instructions": "alpaca_zh"}


@dataclass(frozen=True)
class Task:
    """A file to prepare in blocks of `block` tokens; `work` is an empty directory."""

    kind: str
    file: Path
    tokenizer: Path
    block: int
    work: Path


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=OUT / "prepare")
    parser.add_argument("--tokenizer", type=Path, help="a directory; without it LLaMA's is extended")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    work = options.work.resolve()
    if options.only:
        print(
            json.dumps(
                timed(options.only, Task(options.kind, options.file, options.tokenizer, options.block, work))
            )
        )
        return
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = (options.tokenizer or extended(options.data, work)).resolve()
    rows = [
        row
        for kind, name in KINDS.items()
        for row in compare(kind, options.data.resolve() / f"{name}.jsonl.gz", tokenizer, options)
    ]
    header = ["", "MB/s", "of encode_batch", "of encode_batch_fast", "peak MiB", "tokens"]
    record("prepare", markdown(header, rows), f"Medians of {options.rounds} rounds.", options.results)


def extended(data: Path, work: Path) -> Path:
    """LLaMA's tokenizer with the shipped Chinese pieces."""
    from chinese_llama.vocab.merge import extend_vocab

    extend_vocab(data / "tokenizers" / "llama", None, work / "tokenizer", keep=True)
    return work / "tokenizer"


def compare(kind: str, packed: Path, tokenizer: Path, options: argparse.Namespace) -> list[list[str]]:
    """A row for each way."""
    work = options.work.resolve()
    plain = work / packed.stem
    with gzip.open(packed, "rb") as source, open(plain, "wb") as target:
        shutil.copyfileobj(source, target)
    size = sum(len(text.encode()) for record in records(plain) for text in strings(record)) / 1e6
    command = [sys.executable, "-m", "benchmarks", "prepare", "--kind", kind, "--block", str(options.block)]
    command += ["--work", str(work / "made"), "--tokenizer", str(tokenizer)]
    ways: dict[str, Callable[[], Measured]] = {}
    for way in options.ways:
        for file in (packed, plain) if way == "ours" else (plain,):
            name = f"{way}, {''.join(file.suffixes)}" if way in ("ours", "datasets.map") else way
            ways[name] = partial(measured, [*command, "--only", way, "--file", str(file)])
    found = in_turns(ways, options.rounds)
    told = {name: [json.loads(run.output.splitlines()[-1]) for run in runs] for name, runs in found.items()}
    seconds = {name: [one["seconds"] for one in runs] for name, runs in told.items()}
    rows = [[f"**{kind}**, {packed.name} ({size:.1f} MB of text)", "", "", "", "", ""]]
    for name, runs in found.items():
        beside = [
            f"{ratio(seconds[raw], seconds[name]):.2f}" if raw in seconds else ""
            for raw in ("encode_batch", "encode_batch_fast")
        ]
        peak = max(run.peak_mib for run in runs)
        speed = size / statistics.median(seconds[name])
        rows.append([name, f"{speed:.1f}", *beside, f"{peak:,.0f}", f"{told[name][0]['tokens']:,}"])
    return rows


def timed(way: str, task: Task) -> dict[str, float]:
    """Seconds and tokens of one way."""
    shutil.rmtree(task.work, ignore_errors=True)
    task.work.mkdir(parents=True)
    work = WAYS[way](task)
    start = time.perf_counter()
    tokens = work()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def records(file: Path) -> Iterator[dict[str, str]]:
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def strings(record: dict[str, str]) -> list[str]:
    return [record[name] for name in ("text", "instruction", "input", "output") if name in record]


def written(record: dict[str, str]) -> list[str]:
    """The texts that are tokenised for a record: a document, or a prompt and its answer."""
    if "text" in record:
        return [record["text"]]
    asked = "\n".join(text for text in (record["instruction"], record["input"]) if text)
    return [PROMPT.format(asked), record["output"]]


def ours(task: Task) -> Callable[[], int]:
    from chinese_llama.data.mixture import Source
    from chinese_llama.data.prepare import Job, prepare
    from chinese_llama.data.templates import find_template, fit_template

    tokenizer = loaded(task)
    given: dict[str, Any] = {}
    if task.kind == "instructions":
        given["template"] = fit_template(find_template("chinese-alpaca"), tokenizer)
    job = Job(task.kind, (Source(task.file),), task.tokenizer, task.block, **given)
    return lambda: int(prepare(job, task.work, tokenizer).manifest.metrics["sources"][0]["tokens"])


def raw(task: Task, fast: bool) -> Callable[[], int]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(task.tokenizer / "tokenizer.json"))
    texts = [text for record in records(task.file) for text in written(record)]
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    return lambda: sum(map(len, encode(texts, add_special_tokens=False)))


def by_datasets(task: Task) -> Callable[[], int]:
    import datasets
    from pyarrow import compute

    tokenizer = loaded(task)
    datasets.disable_progress_bars()
    given = {"batched": True, "num_proc": len(os.sched_getaffinity(0))}

    def make() -> int:
        found = datasets.load_dataset(
            "json", data_files=str(task.file), split="train", cache_dir=str(task.work / "cache")
        )
        names = found.column_names
        if task.kind == "instructions":
            tokenise = partial(questions_and_answers, tokenizer=tokenizer, longest=task.block)
            found = found.map(tokenise, remove_columns=names, **given)
        else:
            found = found.map(partial(whole_texts, tokenizer=tokenizer), remove_columns=names, **given)
            found = found.map(partial(grouped, block=task.block), **given)
        return int(compute.sum(compute.list_value_length(found.data.column("input_ids"))).as_py() or 0)

    return make


def whole_texts(batch: dict[str, list[str]], tokenizer: Any) -> Any:
    return tokenizer(batch["text"])


def grouped(batch: dict[str, list[list[int]]], block: int) -> dict[str, list[list[int]]]:
    """Every column joined and cut into blocks, without the rest; labels are the ids."""
    columns = {name: list(chain.from_iterable(lists)) for name, lists in batch.items()}
    full = len(columns["input_ids"]) // block * block
    made = {
        name: [ids[start : start + block] for start in range(0, full, block)] for name, ids in columns.items()
    }
    return {**made, "labels": [list(ids) for ids in made["input_ids"]]}


def questions_and_answers(
    batch: dict[str, list[str]], tokenizer: Any, longest: int
) -> dict[str, list[list[int]]]:
    """Ids of prompt, answer and eos, cut at `longest`, and labels that leave out the prompt."""
    asked = zip(batch["instruction"], batch["input"], batch["output"], strict=True)
    texts = [written({"instruction": one, "input": more, "output": answer}) for one, more, answer in asked]
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        end = [*answer, tokenizer.eos_token_id]
        made["input_ids"].append((prompt + end)[:longest])
        made["labels"].append(([-100] * len(prompt) + end)[:longest])
    return made


def loaded(task: Task) -> Any:
    from chinese_llama.model.load import load_tokenizer

    return load_tokenizer(task.tokenizer)


WAYS: dict[str, Callable[[Task], Callable[[], int]]] = {
    "ours": ours,
    "encode_batch": partial(raw, fast=False),
    "encode_batch_fast": partial(raw, fast=True),
    "datasets.map": by_datasets,
}
