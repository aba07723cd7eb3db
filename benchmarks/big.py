"""What a model of real size costs: seconds and peak memory of extend-model, training and merge.

    python -m benchmarks.big --tokenizer tokenizer.model --chinese-sp chinese_sp.model --corpus zh.jsonl.gz

makes a LLaMA of 7B geometry with random weights (bfloat16), so nothing has to be fetched, and runs the
commands on it. `cp` of the base stands beside them. Smaller: --layers 2 --hidden 256.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of the base")
    parser.add_argument("--chinese-sp", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "out" / "big")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=512)
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    apart(make_base, work / "base", options.tokenizer, options.layers, options.hidden)
    rows = [measured("cp of the base", ["cp", "-r", "base", "copy"], work)]
    shutil.rmtree(work / "copy")
    tool = [sys.executable, "-m", "chinese_llama"]
    rows.append(
        measured(
            "extend-vocab",
            [
                *tool,
                "extend-vocab",
                "--base",
                "base",
                "--chinese-sp",
                str(options.chinese_sp.resolve()),
                "--output",
                "tokenizer",
            ],
            work,
        )
    )
    extend = [*tool, "extend-model", "--base", "base", "--tokenizer", "tokenizer", "--output", "extended"]
    rows.append(measured("extend-model", extend, work))
    for embeddings in ("new-rows", "full") if shutil.which("nvidia-smi") else ():
        train = [
            sys.executable,
            str(ROOT / "recipes" / "pt_lora.py"),
            "--config",
            str(ROOT / "recipes/configs/pt_7b_80gb.yaml"),
        ]
        train += [
            "--model_name_or_path",
            "extended",
            "--data",
            str(options.corpus.resolve()),
            "--output_dir",
            embeddings,
        ]
        train += ["--embeddings", embeddings, "--max_steps", str(options.steps), "--logging_steps", "2"]
        train += ["--per_device_train_batch_size", str(options.batch), "--gradient_accumulation_steps", "1"]
        train += ["--block_size", str(options.block)]
        rows.append(measured(f"pt_lora, embeddings: {embeddings}", train, work) | log_of(work / embeddings))
    apart(make_adapter, work / "adapter", work / "extended", options.layers, options.hidden)
    merge = [*tool, "merge", "--base", "extended", "--loras", "a=adapter", "--output", "merged"]
    rows.append(measured("merge", merge, work))
    print(table(rows, options))


def apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` in a process of its own: a command's peak memory is counted from its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def make_base(directory: Path, tokenizer: Path, layers: int, hidden: int) -> None:
    """A LLaMA with random weights, vocabulary 32,000, in shards of 5 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(directory), max_shard_size="5GB")
    shutil.copyfile(tokenizer, directory / "tokenizer.model")


def make_adapter(directory: Path, extended: Path, layers: int, hidden: int) -> None:
    """A LoRA adapter with random weights: r=8 on all projections, the new rows of both matrices."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    rows = json.loads((extended / "config.json").read_text())["vocab_size"]
    wide = hidden * 43 // 16
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors = {}
    for layer in range(layers):
        for module, (out, into) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, into, generator=generator) / into**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 1e-3
    for module in ("model.embed_tokens", "lm_head"):
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        tensors[name] = torch.randn(rows - 32_000, hidden, generator=generator) * 0.02
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    ids = list(range(32_000, rows))
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 32,
        "target_modules": [m.partition(".")[2] for m in shapes],
        "trainable_token_indices": {"embed_tokens": ids, "lm_head": ids},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def measured(name: str, command: list[str], work: Path) -> dict[str, Any]:
    """Seconds and peak resident memory (GiB) of a command."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=work, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return {"name": name, "seconds": time.monotonic() - start, "rss_gib": usage.ru_maxrss / 2**20}


def log_of(adapter: Path) -> dict[str, Any]:
    """Median speed after the first entry, and peak GPU memory, of a training run."""
    lines = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)[1:]
    return {"tokens_per_second": speeds[len(speeds) // 2], "gpu_gib": lines[0].get("gpu_memory_gib")}


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The figures as Markdown."""
    lines = [
        f"LLaMA of {options.layers} layers, hidden {options.hidden}, bfloat16; training: {options.steps} steps of "
        f"{options.batch} x {options.block} tokens, r=8 on all projections.",
        "",
        "| | seconds | peak resident memory, GiB | peak GPU memory, GiB | tokens per second |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        gpu, speed = row.get("gpu_gib"), row.get("tokens_per_second")
        lines.append(
            f"| {row['name']} | {row['seconds']:.1f} | {row['rss_gib']:.2f} | {gpu or ''} | {f'{speed:,}' if speed else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
