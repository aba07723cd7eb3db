"""The whole way on real files: the LLaMA tokenizer, chinese_sp.model, real Chinese text, a small LLaMA.

    python -m benchmarks.real_run --data ../shared/data --work benchmarks/out/real

`--data` is a folder with tokenizers/llama/tokenizer.model, tokenizers/chinese_sp.model,
base-proxy/ (a small LLaMA at vocabulary 32,000), zh_pretrain.jsonl.gz, en_pretrain.jsonl.gz and
alpaca_zh.jsonl.gz. The run is a workspace like any user's: the script writes slices of the data and a
chinese-llama.yaml, and runs `chinese-llama adapt`, control included. What is made is kept; the same command
goes on. The results are WORK/report.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
control: {{}}
eval:
  text: {{zh: zh_heldout.jsonl, en: en_heldout.jsonl}}
  prompts: questions.jsonl
  max_new_tokens: 60
  output: report
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "out" / "real")
    parser.add_argument("--pt-steps", type=int, default=400)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="blocks a step")
    parser.add_argument("--block", type=int, default=256, help="tokens a block")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    slices(options.data, options.work)
    text = WORKSPACE.format(
        base=(options.data / "base-proxy").resolve(),
        data=options.data.resolve(),
        block=options.block,
        batch=options.batch,
        pt_steps=options.pt_steps,
        sft_steps=options.sft_steps,
    )
    (options.work / "chinese-llama.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "chinese_llama", "adapt"], cwd=options.work, env=environment)
    sys.exit(done.returncode)


def slices(data: Path, work: Path) -> None:
    """Training and held-out parts, divided by a hash of each document."""
    for name, source in (("zh", "zh_pretrain"), ("en", "en_pretrain")):
        with (
            open(work / f"{name}.jsonl", "w", encoding="utf-8") as train,
            open(work / f"{name}_heldout.jsonl", "w", encoding="utf-8") as held,
        ):
            for record in records(data / f"{source}.jsonl.gz"):
                out = is_held_out(record["text"], name)
                text = record["text"][:LARGEST] if out else record["text"]
                print(json.dumps({"text": text}, ensure_ascii=False), file=held if out else train)
    asked = 0
    with (
        open(work / "instructions.jsonl", "w", encoding="utf-8") as train,
        open(work / "questions.jsonl", "w", encoding="utf-8") as held,
    ):
        for record in records(data / "alpaca_zh.jsonl.gz"):
            out = is_held_out(record["instruction"], "instructions")
            if not out or (asked < QUESTIONS and len(record["instruction"] + record["input"]) < 100):
                print(json.dumps(record, ensure_ascii=False), file=held if out else train)
                asked += out


def records(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def is_held_out(text: str, source: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT[source] == 0


if __name__ == "__main__":
    main()
