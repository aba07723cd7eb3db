"""The whole way on real files: the LLaMA tokenizer, chinese_sp.model, real Chinese text, a small LLaMA.

    python -m benchmarks.real_run --data ../shared/data --work benchmarks/out/real

`--data` is a folder with tokenizers/llama/tokenizer.model, tokenizers/chinese_sp.model,
base-proxy/ (a small LLaMA at vocabulary 32,000), zh_pretrain.jsonl.gz, en_pretrain.jsonl.gz and
alpaca_zh.jsonl.gz. The run is a workspace like any user's: the script writes slices of the data and a
chinese-llama.yaml, and types the commands. Results are printed as Markdown and kept in WORK/result.json.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = {"zh": 50, "en": 10, "instructions": 50}  # one document in so many is held out
LARGEST = 2_000  # characters of a held-out document that are scored

WORKSPACE = """\
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
eval:
  text: {{zh: zh_heldout.jsonl, en: en_heldout.jsonl}}
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
    result = run(options.work)
    (options.work / "result.json").write_text(
        json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    print(table(result, vars(options)))


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
    with open(work / "instructions.jsonl", "w", encoding="utf-8") as train:
        for record in records(data / "alpaca_zh.jsonl.gz"):
            if not is_held_out(record["instruction"], "instructions"):
                print(json.dumps(record, ensure_ascii=False), file=train)


def records(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def is_held_out(text: str, source: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT[source] == 0


def run(work: Path) -> dict[str, Any]:
    """Type the commands; seconds of each and the figures of every stage."""
    bin_ = Path(sys.executable).parent
    tool, launch = [str(bin_ / "chinese-llama")], [str(bin_ / "accelerate"), "launch"]
    if not Path(tool[0]).exists():
        tool = [sys.executable, "-m", "chinese_llama"]
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
    force = ["--force"]
    steps = {
        "extend-vocab": [*tool, "extend-vocab", *force],
        "extend-model": [*tool, "extend-model", *force],
        "pt_lora": [*launch, str(ROOT / "recipes/pt_lora.py"), "--force", "true"],
        "sft_lora": [*launch, str(ROOT / "recipes/sft_lora.py"), "--force", "true"],
        "merge plus": [*tool, "merge", "--loras", "plus", "--output", "work/plus-merged", *force],
        "merge plus,alpaca": [*tool, "merge", "--loras", "plus,alpaca", *force],
        "audit-vocab": [
            *tool,
            "audit-vocab",
            "--tokenizer",
            "work/tokenizer",
            "--base",
            _base(work),
            "--corpus",
            "zh_heldout.jsonl",
            "--corpus",
            "en_heldout.jsonl",
            "--json",
            "audit.json",
        ],
    }
    for name, model in (
        ("base", _base(work)),
        ("extended, step 0", "work/extended"),
        ("plus", "work/plus-merged"),
        ("plus + alpaca", "work/merged"),
    ):
        steps[f"eval {name}"] = [
            *tool,
            "eval",
            "--model",
            model,
            "--text",
            "zh=zh_heldout.jsonl",
            "--text",
            "en=en_heldout.jsonl",
            "--json",
            f"eval {name}.json",
        ]
    result: dict[str, Any] = {"seconds": {}, "eval": {}}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name, command in steps.items():
        start = time.monotonic()
        subprocess.run(command, cwd=work, check=True, env=environment)
        result["seconds"][name] = round(time.monotonic() - start, 1)
        if name.startswith("eval "):
            result["eval"][name[5:]] = json.loads((work / f"{name}.json").read_text())["models"][0]["texts"]
    for name in ("tokenizer", "plus", "alpaca"):
        manifest = json.loads((work / "work" / name / "chinese_llama.json").read_text())
        result[name] = {"vocab_size": manifest["vocab_size"], **manifest["metrics"]}
    result["samples"] = samples(tool, work, environment)
    return result


def _base(work: Path) -> str:
    first = (work / "chinese-llama.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("base: ")


def samples(tool: list[str], work: Path, environment: dict[str, str]) -> list[dict[str, str]]:
    """Answers of the merged model to three instructions of its kind."""
    told = []
    for question in ("列出三种水果。", "把下面的句子翻译成英文：我爱你。", "给出保持健康的三个建议。"):
        command = [
            *tool,
            "generate",
            "--model",
            "work/merged",
            "--prompt",
            question,
            "--max-new-tokens",
            "60",
        ]
        answer = subprocess.run(
            command, cwd=work, check=True, capture_output=True, text=True, env=environment
        )
        told.append({"question": question, "answer": answer.stdout.strip()})
    return told


def table(result: dict[str, Any], options: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Vocabulary 32,000 -> {result['tokenizer']['vocab_size']:,}; {options['pt_steps']} steps of "
        f"{options['batch']} x {options['block']} tokens of pretraining, {options['sft_steps']} of tuning.",
        "",
        "| model | characters per token (zh) | bits per character (zh) | bits per byte (en) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, sets in result["eval"].items():
        zh, en = sets["zh"], sets["en"]
        lines.append(
            f"| {name} | {zh['characters_per_token']:.3f} | {zh['bits_per_character']:.2f} | {en['bits_per_byte']:.3f} |"
        )
    lines += [
        "",
        "Seconds: " + ", ".join(f"{name} {took}" for name, took in result["seconds"].items()) + ".",
        "",
    ]
    lines += [f"- {sample['question']} -> {sample['answer']}" for sample in result["samples"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
