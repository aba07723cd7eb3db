"""A step of training, beside PEFT and its peers: seconds, tokens and characters a second, peak memory.

    python -m benchmarks train-step --tokenizer tokenizer.model --chinese-sp chinese_sp.model --corpus zh.jsonl.gz

All contenders train the same model (LLaMA's geometry, random weights, the vocabulary that --chinese-sp
gives the base) on the same packed blocks with the same LoRA (r=8 on all projections, dropout 0.05),
optimizer (adamw_torch_fused) and type, each in a process of its own, in turns. "Ours" is the recipe pt_lora
as its command line runs it. With LoRA's B still zero the loss of the first step tells whether contenders
compute the same.

On a GPU: 7B, bfloat16, blocks of 2,048, and rows for the largest batch that ours fits and for QLoRA. On a
CPU: a model of some million weights, most of them the vocabulary's, in float32; ratios count.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import OUT, ROOT, in_turns, markdown, options_of, ratio, record
from benchmarks.step.common import Settings, median_step
from benchmarks.step.material import flops, made

GIB = 2**30
# name: what runs it, how it differs from the common settings
# in the order in which they run: what matters most first
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "modules-to-save": ("peft", {"embeddings": "full"}),
    "ours": ("ours", {}),
    "ours-qlora": (
        "ours",
        {"quantization": "nf4", "checkpointing": True, "optim": "paged_adamw_8bit"},
    ),
    "ours-largest": ("ours", {}),
    "reference": ("peft", {"embeddings": "full", "across": True}),
    "token-indices": ("peft", {}),
    "ours-full": ("ours", {"embeddings": "full"}),
    "modules-to-save-16bit": ("peft", {"embeddings": "full", "upcast": False}),
    "trl": ("trl", {"embeddings": "full"}),
    "llama-factory": ("llama_factory", {"embeddings": "full"}),
    "axolotl": ("axolotl", {"embeddings": "full", "across": True}),
    "unsloth": ("unsloth", {"embeddings": "full", "across": True}),
}
TOLD = {
    "modules-to-save": "PEFT, `modules_to_save`",
    "ours": "ours, `embeddings: new-rows`",
    "ours-qlora": "ours, new-rows, QLoRA (nf4, checkpointing, paged_adamw_8bit)",
    "ours-largest": "ours, new-rows, its largest batch",
    "reference": "PEFT, `modules_to_save`, across documents (as Chinese-LLaMA-Alpaca)",
    "token-indices": "PEFT, `trainable_token_indices`",
    "ours-full": "ours, `embeddings: full`",
    "modules-to-save-16bit": "PEFT, `modules_to_save`, matrices not in float32",
    "trl": "TRL, `modules_to_save`",
    "llama-factory": "LLaMA-Factory, `additional_target`",
    "axolotl": "Axolotl, `lora_modules_to_save`, across documents",
    "unsloth": "Unsloth, `modules_to_save`, across documents",
}
PEERS = {"trl": "trl", "llama-factory": "llamafactory", "axolotl": "axolotl", "unsloth": "unsloth"}
LATE = 25  # seconds that a contender may go on after --seconds
BESIDE = "modules-to-save"  # what ratios are taken to
ON_GPU = ("modules-to-save-16bit", "unsloth", "ours-largest", "ours-qlora")
SAME = {"float32": 1e-3, "bfloat16": 2e-2}  # losses of a first step that differ by less are the same


def main(argv: Sequence[str]) -> None:
    """Make the material, run the contenders in turns, record the table."""
    options = parse(argv)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    material = make_material(options)
    if options.profile:
        result = run(options.profile, settings_of(options.profile, options, material), options)
        if "profile" not in result:
            raise SystemExit(f"{options.profile}: {result['failed']}")
        (options.work / f"profile-{options.profile}.txt").write_text(result["profile"], encoding="utf-8")
        print(result["profile"])
        return
    chosen, left_out = choose(options)
    ways = {name: way(name, options, material) for name in chosen}
    results = in_turns(ways, options.rounds)
    failed = {
        name: next(r["failed"] for r in rs if "failed" in r)
        for name, rs in results.items()
        if "failed" in rs[-1]
    }
    results = {name: rs for name, rs in results.items() if name not in failed}
    if not results:
        raise SystemExit("train-step: no contender ran. " + told_failures(failed))
    notes = f"{described(options, material)} {left_out}{told_failures(failed)}{versions(results)}"
    record("train-step", table(results, options, material), notes, options.results)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; what is left out depends on whether there is a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    parser = options_of(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of the base")
    parser.add_argument("--chinese-sp", type=Path, required=True, help="Chinese SentencePiece model")
    parser.add_argument(
        "--corpus", type=Path, required=True, help=".jsonl or .jsonl.gz; its beginning is used"
    )
    parser.add_argument("--work", type=Path, default=OUT / "train-step", help="what is made is kept there")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="of %(default)s")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="another interpreter"
    )
    parser.add_argument(
        "--profile", metavar="CONTENDER", choices=CONTENDERS, help="its largest costs, no table"
    )
    for name, gpu, cpu in (
        ("hidden", 4096, 256),
        ("layers", 32, 4),
        ("heads", 32, 4),
        ("block", 2048, 256),
        ("batch", 2, 2),
        ("warmup", 3, 1),
        ("measured", 6, 3),
        ("rounds", 1, 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=gpu if cuda else cpu, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=int, default=200 if cuda else 10**6, help="no contender begins later"
    )
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA; default: %(default)s")
    parser.add_argument("--dtype", choices=SAME, default="bfloat16" if cuda else "float32")
    options = parser.parse_args(argv)
    options.cuda = cuda
    options.end = time.monotonic() + options.seconds
    if any("=" not in peer for peer in options.peer):
        parser.error("--peer: NAME=PYTHON is wanted, such as trl=/venvs/trl/bin/python")
    options.peers = dict(peer.split("=", 1) for peer in options.peer)
    unknown = [name for name in (*options.contenders.split(","), *options.peers) if name not in CONTENDERS]
    if unknown or min(options.warmup, options.measured, options.rounds) < 1:
        parser.error(
            f"unknown contenders: {unknown}" if unknown else "--warmup, --measured, --rounds: at least 1"
        )
    return options


def make_material(options: argparse.Namespace) -> dict[str, Any]:
    """What benchmarks.step.material makes; in a process of its own where there is a GPU, which is empty then."""
    wanted: dict[str, Any] = {
        name: getattr(options, name) for name in ("hidden", "layers", "heads", "block", "dtype")
    }
    wanted |= {
        name: str(getattr(options, name).resolve()) for name in ("tokenizer", "chinese_sp", "corpus", "work")
    }
    wanted["blocks"] = 4 * options.batch * (options.warmup + options.measured)  # the largest batch needs more
    if not options.cuda:
        return made(wanted)
    asked = options.work / "options.json"
    asked.write_text(json.dumps(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.step.material", str(asked)]
    if subprocess.run(command, cwd=ROOT, env=environment()).returncode:
        raise SystemExit("train-step: the material could not be made.")
    found: dict[str, Any] = json.loads((options.work / "material.json").read_text(encoding="utf-8"))
    return found


def environment() -> dict[str, str]:
    """This process's, with the modules of the checkout, without network or trackers, and with OpenMP's threads
    told not to spin: chinese_llama does that, and under other load it is worth more than all else."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true", "DO_NOT_TRACK": "1"}
    return {"GOMP_SPINCOUNT": "10000", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **quiet}


def choose(options: argparse.Namespace) -> tuple[list[str], str]:
    """The contenders that can run here, and a sentence about the others."""
    chosen: list[str] = []
    out: list[str] = []
    for name in options.contenders.split(","):
        there = name not in PEERS or name in options.peers or importlib.util.find_spec(PEERS[name])
        if name in ON_GPU and not options.cuda:
            continue
        (chosen if there else out).append(name)
    return chosen, f"Not installed, so left out: {', '.join(out)}. " if out else ""


def settings_of(name: str, options: argparse.Namespace, material: dict[str, Any]) -> Settings:
    """The settings of a contender."""
    place = options.work / "material"
    common = Settings(
        model=str(place / "model"),
        tokenizer=str(place / "tokenizer"),
        corpus=str(place / "corpus.jsonl"),
        prepared=str(place / "prepared"),
        blocks=str(place / "blocks.parquet"),
        work=str(options.work / "run"),
        result=str(options.work / "run" / "result.json"),
        rows=material["rows"],
        first_new=material["first_new"],
        rank=8,
        alpha=32,
        profile=bool(options.profile),
        **{
            field: getattr(options, field)
            for field in ("dtype", "block", "batch", "warmup", "measured", "dropout")
        },
    )
    return dataclasses.replace(common, **CONTENDERS[name][1])


def way(name: str, options: argparse.Namespace, material: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A call that runs a contender once; one that has failed does not run again."""
    state: dict[str, Any] = {"settings": settings_of(name, options, material)}

    def call() -> dict[str, Any]:
        if "failed" in state:
            return {"failed": state["failed"]}
        tries = [state["settings"]]
        if name == "ours-largest" and "batch" not in state:
            largest = largest_batch(state["settings"], options)
            tries = [dataclasses.replace(tries[0], batch=b) for b in range(largest, max(largest - 3, 0), -1)]
        for settings in tries:
            result = run(name, settings, options)
            if "failed" not in result:
                state.update(settings=settings, batch=settings.batch)
                return {**result, "batch": settings.batch}
        state["failed"] = result["failed"]
        return result

    return call


def run(name: str, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run of a contender, or {"failed": why}."""
    if (left := options.end - time.monotonic()) < 0:
        return {"failed": f"not begun: {options.seconds} s were over"}
    place = Path(settings.work)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    asked = place / "settings.json"
    asked.write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
    log = options.work / f"{name}.log"
    module = f"benchmarks.step.{CONTENDERS[name][0]}"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [options.peers.get(name, sys.executable), "-m", module, str(asked)],
            cwd=place,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(left + LATE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"failed": f"killed after {left + LATE:.0f} s"}
    if (file := Path(settings.result)).is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in said if line] or ["ended without a word"]
    return {"failed": next((line for line in reversed(said) if "Error" in line), said[-1])[:160]}


def largest_batch(settings: Settings, options: argparse.Namespace) -> int:
    """The most sequences of which a step of ours should fit on the GPU, by the recipes' own estimate."""
    import torch

    from chinese_llama.train.estimate import Settings as Assumed
    from chinese_llama.train.estimate import estimate

    config = json.loads((Path(settings.model) / "config.json").read_text(encoding="utf-8"))
    there = 0.95 * torch.cuda.get_device_properties(0).total_memory
    fits = [
        batch
        for batch in range(1, 4 * options.batch + 1)
        if estimate(
            config,
            Assumed(
                dtype=settings.dtype,
                new_rows=settings.rows - settings.first_new,
                rank=settings.rank,
                batch=batch,
                block=settings.block,
            ),
        ).total
        < there
    ]
    return max(fits, default=1)


def table(
    results: dict[str, list[dict[str, Any]]], options: argparse.Namespace, material: dict[str, Any]
) -> str:
    """The figures as Markdown, medians over the rounds; ratios are medians of the rounds' ratios."""
    beside = results.get(BESIDE)
    cost = flops(material["options"], material["rows"], 8)["model"]
    rows = []
    for name, found in results.items():
        seconds = statistics.median(second for result in found for second in result["seconds"])
        tokens = found[0]["batch"] * options.block / seconds
        rate, peak = tokens * cost, statistics.median(r["peak"] for r in found)
        faster = fuller = ""
        if beside and found[0]["batch"] == beside[0]["batch"]:
            faster = f"{ratio([median_step(r) for r in found], [median_step(r) for r in beside]):.2f}"
            fuller = f"{ratio([r['peak'] for r in found], [r['peak'] for r in beside]):.2f}"
        reserved = f" ({found[0]['reserved'] / GIB:.1f})" if "reserved" in found[0] else ""
        rows.append(
            (
                TOLD[name],
                found[0]["batch"],
                f"{found[0]['first_loss']:.4f}{checked(name, results, options.dtype)}",
                f"{found[0]['later_loss']:.4f}",
                f"{seconds:.3f}",
                faster,
                f"{tokens:,.0f}",
                f"{tokens * material['characters_per_token']:,.0f}",
                f"{rate / 1e12:.3g} ({rate / material['rate']:.0%})",
                f"{found[0]['loaded'] / GIB:.2f}",
                f"{peak / GIB:.2f}{reserved}",
                fuller,
            )
        )
    memory = "peak memory (reserved), GiB" if options.cuda else "peak memory, GiB"
    return markdown(
        (
            "", "batch", "loss at step 0", "mean loss after it", "step, s", "step / `modules_to_save`",
            "tokens/s", "characters/s", "model TFLOP/s (of the matrix rate)", "memory when loaded, GiB", memory,
            "peak / `modules_to_save`",
        ),
        rows,
    )  # fmt: skip


def checked(name: str, results: dict[str, list[dict[str, Any]]], dtype: str) -> str:
    """A mark for a first loss that is not that of PEFT's row, though batch, attention and weights are the same."""
    differs = CONTENDERS[name][1]
    other = results.get("reference" if differs.get("across") else BESIDE)
    mine = results[name][0]
    if not other or other[0]["batch"] != mine["batch"] or "quantization" in differs:
        return ""
    return "" if abs(mine["first_loss"] - other[0]["first_loss"]) < SAME[dtype] else " (differs!)"


def described(options: argparse.Namespace, material: dict[str, Any]) -> str:
    """What ran, in words."""
    parts = flops(material["options"], material["rows"], 8)
    shares = ", ".join(
        f"{name} {value / parts['model']:.1%}" for name, value in parts.items() if name != "model"
    )
    return (
        f"{options.layers} layers, hidden {options.hidden}, vocabulary {material['rows']:,} ({material['first_new']:,} old "
        f"rows), {options.dtype}, blocks of {options.block:,}, {material['characters_per_token']:.3f} characters a token; "
        f"medians of {options.rounds} x {options.measured} steps. Matrix rate: {material['rate'] / 1e12:.3g} TFLOP/s; model "
        f"FLOP: 4N = {parts['model'] / 1e9:.3g} G a token (not counted, beside it: {shares}). Memory: "
        f"{'of tensors on the GPU' if options.cuda else 'resident, of the process'}."
    )


def told_failures(failed: dict[str, str]) -> str:
    """Which contenders failed, and how."""
    return "".join(f"{name} failed ({why}). " for name, why in failed.items())


def versions(results: dict[str, list[dict[str, Any]]]) -> str:
    """The versions that peers ran with."""
    found = {name: results[name][0]["versions"] for name in PEERS if name in results}
    return "".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in its.items())}. " for name, its in found.items()
    )
