"""How new rows should start: the same continued pretraining after every `extend-model --init`, by step.

    python -m benchmarks.rows --data ../shared/data --work benchmarks/out/rows

`--data` is a folder as in benchmarks/real_run.py. Every run is `recipes/pt_lora.py` with the recipe's own
measuring: four fifths Chinese and one fifth English by tokens, LoRA on all projections, new rows trained,
constant learning rates after a short warm-up, so that a figure at one step does not depend on where the run
ends. `control` is the base without new pieces, LoRA only, with as many characters of each language a step.
What is done is kept: the same command goes on. Prints Markdown; the curves are in WORK/rows.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.real_run import is_held_out, records

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("mean-resizing", "asymmetric", "subword-mean", "random", "distill", "control")
REFERENCE = "mean-resizing"
SHOWN = (0, 50, 200, 1000)
HELD_OUT = {"zh": 6_000, "en": 8_000}  # characters that are measured, of documents cut to 600
SHARES = {"zh": 0.8, "en": 0.2}
COLOURS = dict(zip(METHODS, ("#555555", "#d9482b", "#3b82c4", "#d9a12b", "#8a5cc2", "#3a9d6e"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "out" / "rows")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block", type=int, default=128, help="tokens of a step")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.table:
        prepare(options)
        runs = [(method, seed) for seed in options.seeds for method in options.methods]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: train(options, *run), runs))
    found = results(options)
    print(table(found, options))
    picture(found, options.work / "rows.png")


def prepare(options: argparse.Namespace) -> None:
    """The texts, the extended tokenizer, and an extended base for every method."""
    work, base = options.work, options.data / "base-proxy"
    slices(options.data, work)
    if not (work / "tokenizer").is_dir():
        tool("extend-vocab", "--base", base, "--output", work / "tokenizer")
    for method in options.methods:
        if method != "control" and not (work / method / "base").is_dir():
            more = ["--corpus", work / "zh.jsonl"] if method == "distill" else []
            common = ("--base", base, "--tokenizer", work / "tokenizer", "--init", method)
            tool("extend-model", *common, "--output", work / method / "base", *more)
            (work / method / "share.json").write_text(json.dumps(share_of_new_ids(work, method)))


def slices(data: Path, work: Path) -> None:
    """Training texts, and short held-out ones, divided by a hash of each document."""
    for name, source in (("zh", "zh_pretrain"), ("en", "en_pretrain")):
        held: list[str] = []
        with open(work / f"{name}.jsonl", "w", encoding="utf-8") as train_file:
            for record in records(data / f"{source}.jsonl.gz"):
                if is_held_out(record["text"], name):
                    held.append(record["text"][:600])
                else:
                    print(json.dumps({"text": record["text"]}, ensure_ascii=False), file=train_file)
        few = held[:: max(1, sum(map(len, held)) // HELD_OUT[name])]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in few]
        (work / f"{name}_heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tool(*words: Any) -> None:
    command = [sys.executable, "-m", "chinese_llama", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)


def share_of_new_ids(work: Path, method: str) -> float:
    """Mean probability, in held-out English, that the untrained extended base gives to all new ids."""
    import torch

    from chinese_llama.data.formats import documents
    from chinese_llama.evaluate.bits import text_windows
    from chinese_llama.model.load import first_new_id, load_model, load_tokenizer

    place = work / method / "base"
    model, tokenizer = load_model(place, "float32"), load_tokenizer(place)
    windows = text_windows(tokenizer, documents(work / "en_heldout.jsonl"), 512).windows
    shares = []
    with torch.no_grad():
        for window in windows:
            logits = model(torch.tensor([window.ids])).logits[0].float()
            shares.append(torch.softmax(logits, -1)[:, first_new_id(place) :].sum(-1))
    return float(torch.cat(shares).mean())


def train(options: argparse.Namespace, method: str, seed: int) -> None:
    """One run of the recipe; nothing if it is done."""
    work = options.work.resolve()
    output = work / method / f"seed-{seed}-{options.steps}x{options.block}"
    if output.is_dir():
        return
    block, shares = options.block, SHARES
    if method == "control":
        block, shares = control_block(work, options.data, options.block)
    config = {
        "model_name_or_path": str(
            options.data / "base-proxy" if method == "control" else work / method / "base"
        ),
        "data": [{"path": str(work / f"{name}.jsonl"), "weight": share} for name, share in shares.items()],
        "output_dir": str(output),
        "prepared_dir": str(work / "prepared"),
        "embeddings": "frozen" if method == "control" else "new-rows",
        "block_size": block,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "per_device_train_batch_size": 1,
        "max_steps": options.steps,
        "seed": seed,
        "eval_text": {name: str(work / f"{name}_heldout.jsonl") for name in SHARES},
        "eval_steps": 50,
        "per_device_eval_batch_size": 8,
        "save_steps": 250,
        "save_total_limit": 1,
    }
    if method != "control":
        config["embedding_learning_rate"] = 2e-4
    file = work / method / f"seed-{seed}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(config, indent=1))
    command = [sys.executable, str(ROOT / "recipes" / "pt_lora.py"), "--config", str(file)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1" if options.jobs > 1 else os.environ.get("OMP_NUM_THREADS", "2"),
    }
    with open(work / method / f"seed-{seed}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log, env=environment)


def control_block(work: Path, data: Path, block: int) -> tuple[int, dict[str, float]]:
    """(tokens of a step, shares) of the base's tokenizer that hold as many characters of each language."""
    from chinese_llama.data.formats import documents
    from chinese_llama.data.templates import text_ids
    from chinese_llama.model.load import load_tokenizer

    base, new = load_tokenizer(data / "base-proxy"), load_tokenizer(work / "tokenizer")
    tokens = {}
    for name, share in SHARES.items():
        texts = [text[:2000] for text in islice(documents(work / f"{name}.jsonl"), 500)]
        long, short = (sum(len(ids) for ids in text_ids(tokenizer, texts)) for tokenizer in (base, new))
        tokens[name] = block * share * long / short
    whole = sum(tokens.values())
    return round(whole), {name: count / whole for name, count in tokens.items()}


def results(options: argparse.Namespace) -> dict[str, dict[int, dict[int, dict[str, float]]]]:
    """method -> seed -> step -> {"zh": bits per character, "en": bits per byte}, of runs that are done."""
    found: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for method in options.methods:
        for seed in options.seeds:
            log = options.work / method / f"seed-{seed}-{options.steps}x{options.block}" / "log.jsonl"
            entries = map(json.loads, log.read_text().splitlines()) if log.is_file() else ()
            steps = {e["step"]: figures(e["eval"]) for e in entries if "eval" in e}
            if steps:
                found.setdefault(method, {})[seed] = steps
    return found


def figures(measured: dict[str, Any]) -> dict[str, float]:
    return {"zh": measured["zh"]["bits_per_character"], "en": measured["en"]["bits_per_byte"]}


def table(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown: figures by step, mean ± standard deviation over the seeds."""
    shown = [step for step in SHOWN if step <= options.steps]
    last = shown[-1]
    goal = mean(run[last]["zh"] for run in found[REFERENCE].values()) if REFERENCE in found else None
    head = ["`--init`", "seeds", "new ids in English at step 0"]
    head += [f"{name}, step {step:,}" for name in ("zh", "en") for step in shown]
    head += [f"steps to {REFERENCE}'s figure at {last:,}"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for method, runs in found.items():
        share = options.work / method / "share.json"
        cells = [method, str(len(runs)), f"{json.loads(share.read_text()):.3%}" if share.is_file() else "-"]
        cells += [
            spread([run[step][name] for run in runs.values()]) for name in ("zh", "en") for step in shown
        ]
        cells.append(str(reached(runs, goal)) if goal else "")
        lines.append("| " + " | ".join(cells) + " |")
    note = f"zh: bits per held-out Chinese character; en: bits per held-out English byte; {options.block} tokens a step."
    return "\n".join([*lines, "", note])


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def reached(runs: dict[int, Any], goal: float) -> int | str:
    """The first measured step at which the mean over the seeds is at the goal."""
    for step in next(iter(runs.values())):
        if mean(run[step]["zh"] for run in runs.values()) <= goal:
            return step
    return "not reached"


def picture(found: dict[str, Any], path: Path) -> None:
    """Both figures by step, a line a method (mean over the seeds)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    for method, runs in found.items():
        steps = list(next(iter(runs.values())))
        for axis, name in zip(axes, ("zh", "en"), strict=True):
            points = [mean(run[step][name] for run in runs.values()) for step in steps]
            axis.plot(steps[1:], points[1:], label=method, color=COLOURS[method])
    axes[0].set(xlabel="step", ylabel="bits per Chinese character", title="held-out Chinese, from step 50")
    axes[1].set(xlabel="step", ylabel="bits per English byte", title="held-out English, from step 50")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
