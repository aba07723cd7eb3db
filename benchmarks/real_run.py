"""The whole way on real files: the LLaMA tokenizer, chinese_sp.model, real Chinese text, a small LLaMA.

    python -m benchmarks real-run --data DATA

`--data` is a folder with tokenizers/llama/tokenizer.model, tokenizers/chinese_sp.model,
base-proxy/ (a small LLaMA at vocabulary 32,000), zh_pretrain.jsonl.gz, en_pretrain.jsonl.gz and
alpaca_zh.jsonl.gz. The run is a workspace like any user's: the script writes slices of the data and a
chinese-llama.yaml, and runs `chinese-llama adapt`, control included. What is made is kept; the same command
goes on. WORK/report tells more than the table.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.record import OUT, ROOT, markdown, options_of, record

HELD_OUT = {"zh": 50, "en": 10, "instructions": 50}  # one document in so many is held out
LARGEST = 2_000  # characters of a held-out document that are scored
QUESTIONS = 6  # of the held-out ones that base and result answer

WORKSPACE = """\
title: A 19.5M-parameter LLaMA learns Chinese
base: {base}
extend_vocab:
  chinese_sp: {data}/tokenizers/chinese_sp.model
pt_lora:
  data:
    - {{path: zh.jsonl, weight: 0.8}}
    - {{path: en.jsonl, weight: 0.2}}
  block_size: {block}
  lora_r: 64
  lora_alpha: 64
  lora_dropout: 0.0
  embeddings: new-rows
  learning_rate: 1e-3
  per_device_train_batch_size: {batch}
  max_steps: {pt_steps}
  logging_steps: 10
  save_steps: 200
sft_lora:
  data: instructions.jsonl
  max_seq_length: {block}
  lora_r: 64
  lora_alpha: 64
  lora_dropout: 0.0
  learning_rate: 1e-3
  per_device_train_batch_size: {batch}
  max_steps: {sft_steps}
  logging_steps: 10
  save_steps: 200
{control}eval:
  text: {{zh: zh_heldout.jsonl, en: en_heldout.jsonl}}
  prompts: questions.jsonl
  max_new_tokens: 60
  output: report
"""


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=OUT / "real")
    parser.add_argument("--pt-steps", type=int, default=400)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="blocks a step")
    parser.add_argument("--block", type=int, default=256, help="tokens a block")
    parser.add_argument(
        "--no-control", action="store_true", help="without the base trained without new pieces"
    )
    parser.add_argument("--documents", type=int, help="only so many of each file, for a trial")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    slices(options.data, options.work, options.documents)
    text = WORKSPACE.format(
        base=(options.data / "base-proxy").resolve(),
        data=options.data.resolve(),
        block=options.block,
        batch=options.batch,
        control="" if options.no_control else "control: {}\n",
        pt_steps=options.pt_steps,
        sft_steps=options.sft_steps,
    )
    (options.work / "chinese-llama.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "chinese_llama", "adapt"], cwd=options.work, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    tokens = options.pt_steps * options.batch * options.block
    notes = f"Pretraining: {tokens:,} tokens. In brackets: 95 % intervals, bootstrap over documents."
    record("real-run", table(options.work / "report" / "report.json"), notes, options.results)


def table(report: Path) -> str:
    """What each stage reads and spells out of the held-out texts."""
    header = ["model", "characters per token (zh)", "bits per character (zh)", "bits per byte (en)"]
    rows = []
    for stage in json.loads(report.read_text(encoding="utf-8"))["stages"]:
        cells = [stage["label"], f"{stage['texts']['zh']['characters_per_token']:.3f}"]
        for name, key, digits in (("zh", "bits_per_character", 2), ("en", "bits_per_byte", 3)):
            told = stage["texts"][name]
            between = ", ".join(f"{end:.{digits}f}" for end in ((told["interval"] or {}).get(key) or ()))
            cells.append(
                f"{told[key]:.{digits}f}" + (f" [{between}]" if between else "")
            )  # one document has none
        rows.append(cells)
    return markdown(header, rows)


def slices(data: Path, work: Path, documents: int | None) -> None:
    """Training and held-out parts, divided by a hash of each document."""
    for name, source in (("zh", "zh_pretrain"), ("en", "en_pretrain")):
        with (
            open(work / f"{name}.jsonl", "w", encoding="utf-8") as train,
            open(work / f"{name}_heldout.jsonl", "w", encoding="utf-8") as held,
        ):
            for item in islice(records(data / f"{source}.jsonl.gz"), documents):
                out = is_held_out(item["text"], name)
                text = item["text"][:LARGEST] if out else item["text"]
                print(json.dumps({"text": text}, ensure_ascii=False), file=held if out else train)
    asked = 0
    with (
        open(work / "instructions.jsonl", "w", encoding="utf-8") as train,
        open(work / "questions.jsonl", "w", encoding="utf-8") as held,
    ):
        for item in islice(records(data / "alpaca_zh.jsonl.gz"), documents):
            out = is_held_out(item["instruction"], "instructions")
            if not out or (asked < QUESTIONS and len(item["instruction"] + item["input"]) < 100):
                print(json.dumps(item, ensure_ascii=False), file=held if out else train)
                asked += out


def records(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def is_held_out(text: str, source: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT[source] == 0
