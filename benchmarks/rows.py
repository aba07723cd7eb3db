"""How new rows start, and what it is worth: every method of `extend-model --init` on a small LLaMA.

    python -m benchmarks rows --data DATA

`--data` is a folder with base-proxy/ (a small LLaMA pretrained on English, with the LLaMA tokenizer),
zh_pretrain.jsonl.gz and en_pretrain.jsonl.gz. The base gets the shipped Chinese pieces; each method's model
is trained by recipes/pt_lora.py with the same settings, data and seeds, at a constant learning rate, so
that a figure at a step does not depend on the number of steps. The control is the base itself, which
reads Chinese with its own pieces, on blocks that hold as many characters. What is there already is not made
again, so the command may be stopped, and given again with more seeds. Draws WORK/rows.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_run import is_held_out, records
from benchmarks.record import OUT, ROOT, markdown, options_of, record
from chinese_llama.data.formats import documents
from chinese_llama.data.templates import text_ids
from chinese_llama.model.load import load_model, load_tokenizer
from chinese_llama.model.resize import extend_model
from chinese_llama.vocab.merge import extend_vocab

CONTROL = "no extension"
METHODS = ("mean-resizing", "asymmetric", "subword-mean", CONTROL, "random", "distill")
SHOWN = (0, 50, 200, 1000)  # steps
HELD_OUT = 6_000  # characters of each language that are scored
LARGEST = 1_000  # characters of one held-out document
MIX = {"zh": 0.8, "en": 0.2}  # shares of the tokens

CONFIG = """\
model_name_or_path: {model}
data:
  - {{path: {work}/zh.jsonl, weight: {zh}}}
  - {{path: {work}/en.jsonl, weight: {en}}}
output_dir: {output}
block_size: {block}
embeddings: {embeddings}
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
learning_rate: 1e-3
lr_scheduler_type: constant_with_warmup
warmup_steps: 25
per_device_train_batch_size: {batch}
max_steps: {steps}
seed: {seed}
eval_text: {{zh: {work}/zh_heldout.jsonl, en: {work}/en_heldout.jsonl}}
eval_steps: 50
per_device_eval_batch_size: 8
logging_steps: 50
save_steps: 500
"""
ROWS = "embedding_learning_rate: 2e-4\n"


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=OUT / "rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1, help="blocks a step")
    parser.add_argument("--block", type=int, default=128, help="tokens a block")
    parser.add_argument("--table", action="store_true", help="only tell what is there")
    options = parser.parse_args(argv)
    options.work = options.work.resolve()
    if not options.table:
        prepare(options)
        for seed in options.seeds:
            for method in options.methods:
                train(method, seed, options)
    notes = "Chinese in bits per character, English in bits per byte; mean over the seeds, ± half the range."
    record("rows", table(options.work, options.methods, options.steps), notes, options.results)
    picture(options.work, options.methods, options.steps)


def prepare(options: Any) -> None:
    """The texts, the tokenizer, and a model for every method with its share at step 0."""
    work, base = options.work, options.data / "base-proxy"
    work.mkdir(parents=True, exist_ok=True)
    for name in MIX:
        if not (work / f"{name}_heldout.jsonl").exists():
            slices(options.data / f"{name}_pretrain.jsonl.gz", name, work)
    extend_vocab(base, None, work / "tokenizer", keep=True)
    for method in options.methods:
        made = work / method
        if method == CONTROL or (work / f"{method}.share.json").exists():
            continue
        corpus = [work / "zh.jsonl"] if method == "distill" else []
        extend_model(base, work / "tokenizer", made, init=method, corpus=corpus, keep=True)
        share = share_of_new(made, work / "en_heldout.jsonl", 32_000)
        (work / f"{method}.share.json").write_text(json.dumps(share))


def slices(source: Path, name: str, work: Path) -> None:
    """Training documents, and HELD_OUT characters of held-out ones."""
    left = HELD_OUT
    held = []
    with open(work / f"{name}.jsonl", "w", encoding="utf-8") as train:
        for record in records(source):
            text = record["text"]
            if not is_held_out(text, name):
                print(json.dumps({"text": text}, ensure_ascii=False), file=train)
            elif left > 0:
                held.append(text[: min(left, LARGEST)])
                left -= len(held[-1])
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held)
    (work / f"{name}_heldout.jsonl").write_text("".join(lines), encoding="utf-8")


@torch.no_grad()
def share_of_new(place: Path, path: Path, old_size: int) -> float:
    """The probability on ids from `old_size` on, mean over the tokens of a text."""
    model, tokenizer = load_model(place, "float32"), load_tokenizer(place)
    shares = []
    for text in documents(path):
        ids = torch.tensor([[tokenizer.bos_token_id, *text_ids(tokenizer, text)]])
        probabilities = model(ids[:, : model.config.max_position_embeddings]).logits.softmax(-1)
        shares += probabilities[0, :, old_size:].sum(-1).tolist()
    return statistics.fmean(shares)


def train(method: str, seed: int, options: Any) -> None:
    """One run of the recipe; nothing where it is done."""
    work = options.work
    output = run_directory(work, method, seed, options.steps)
    if output.is_dir():
        return
    model, block, mix = work / method, options.block, MIX
    if method == CONTROL:
        model = (options.data / "base-proxy").resolve()
        block, mix = equal_characters(work, model, options.block)
    config = CONFIG.format(
        model=model,
        work=work,
        output=output,
        block=block,
        batch=options.batch,
        steps=options.steps,
        seed=seed,
        embeddings="frozen" if method == CONTROL else "new-rows",
        **mix,
    )
    output.parent.mkdir(exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(config if method == CONTROL else config + ROWS, encoding="utf-8")
    command = [sys.executable, str(ROOT / "recipes" / "pt_lora.py"), "--config", str(file)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def run_directory(work: Path, method: str, seed: int, steps: int) -> Path:
    return work / "runs" / f"{method.replace(' ', '-')}-{seed}-{steps}"


def equal_characters(work: Path, base: Path, block: int) -> tuple[int, dict[str, float]]:
    """The block and the mix with which the base's own tokenizer reads as many characters of each text."""
    tokens = {}
    for name, share in MIX.items():
        extended, own = (
            characters_per_token(load_tokenizer(place), work / f"{name}.jsonl")
            for place in (work / "tokenizer", base)
        )
        tokens[name] = block * share * extended / own
    total = sum(tokens.values())
    return round(total), {name: round(number / total, 4) for name, number in tokens.items()}


def characters_per_token(tokenizer: Any, path: Path) -> float:
    texts = list(islice(documents(path), 300))
    return sum(map(len, texts)) / sum(len(text_ids(tokenizer, text)) for text in texts)


def figures(work: Path, method: str, steps: int) -> dict[int, list[dict[str, float]]]:
    """{step: figures of each seed that is there}, from the runs that are done."""
    found: dict[int, list[dict[str, float]]] = {}
    for log in sorted((work / "runs").glob(f"{method.replace(' ', '-')}-*-{steps}/log.jsonl")):
        for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if "eval" in entry:
                sets = entry["eval"]
                told = {"zh": sets["zh"]["bits_per_character"], "en": sets["en"]["bits_per_byte"]}
                found.setdefault(entry["step"], []).append(told)
    return found


def table(work: Path, methods: Iterable[str], steps: int) -> str:
    """Markdown: both measures at some steps, mean and half the range over the seeds."""
    shown = sorted({step for step in (*SHOWN, steps) if step <= steps})
    every = {method: figures(work, method, steps) for method in methods}
    goal = every.get("mean-resizing", {}).get(steps)
    header = ["rows start as", "seeds", "on new ids (en, step 0)"]
    header += [f"{name}, step {step}" for name in ("zh", "en") for step in shown]
    lines = []
    for method, found in every.items():
        share = work / f"{method}.share.json"
        cells = [
            method,
            str(len(found.get(0, []))),
            f"{json.loads(share.read_text()):.3%}" if share.exists() else "",
            *(spread(found.get(step, []), name) for name in ("zh", "en") for step in shown),
            str(reached(found, statistics.fmean(run["zh"] for run in goal))) if goal and found else "",
        ]
        lines.append(cells)
    return markdown([*header, f"step that reaches mean-resizing's {steps}"], lines)


def spread(runs: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in runs]
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def reached(found: dict[int, list[dict[str, float]]], goal: float) -> int | str:
    """The first measured step whose Chinese figure is `goal` or better."""
    means = {step: statistics.fmean(run["zh"] for run in runs) for step, runs in found.items()}
    return min((step for step, mean in means.items() if mean <= goal), default="not")


def picture(work: Path, methods: Iterable[str], steps: int) -> None:
    """WORK/rows.png: Chinese and English over the steps, mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {"zh": "bits per Chinese character", "en": "bits per English byte"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for method in methods:
            found = sorted(figures(work, method, steps).items())
            means = [statistics.fmean(run[name] for run in runs) for _, runs in found]
            axes.plot([step for step, _ in found], means, label=method)
        axes.set(xlabel="steps", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(work / "rows.png", dpi=110)
