"""What `merge` costs, beside `cp` and PEFT: seconds, peak memory, and the error against float64.

    python -m benchmarks merge

makes a LLaMA of 1.3B parameters with random weights (float16, shards of 1 GB, 2.69 GB) and two adapters in the
published layout: "plus" (r=8, alpha=32, all seven projections, both vocabulary matrices whole, 49,953 rows) and
"alpaca" (r=64, alpha=128, 49,954 rows). Everything runs in processes of its own, in turns; medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import (
    COPY,
    COSTS,
    OUT,
    Measured,
    costs,
    in_turns,
    markdown,
    measured,
    options_of,
    record,
)

SIZES = {  # hidden, intermediate, layers
    "tiny": (256, 688, 4),
    "1.3b": (2048, 5504, 24),
    "7b": (4096, 11008, 32),
}
ROWS, PLUS, ALPACA = 32_000, 49_953, 49_954
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--work", type=Path, default=OUT / "merge")
    parser.add_argument("--size", choices=sorted(SIZES), default="1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="also with a dropped page cache (needs root)")
    parser.add_argument("--peft", action="store_true", help="also PEFT's merge_and_unload in sequence")
    parser.add_argument("--only", choices=("make", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    work = options.work.resolve()
    if options.only:
        (make if options.only == "make" else by_peft)(work, options.size)
        return
    work.mkdir(parents=True, exist_ok=True)
    only = [sys.executable, "-m", "benchmarks", "merge", "--work", work, "--size", options.size, "--only"]
    if not (work / "alpaca" / "adapter_config.json").is_file():
        measured([*only, "make"])
    errors: dict[str, str] = {}
    ways = {
        name: partial(merged, name, command, work, errors)
        for name, command in commands(options, [*only, "peft"]).items()
    }
    rows = costs(in_turns(ways, options.rounds), next(iter(ways)))
    size = sum(file.stat().st_size for file in (work / "base").iterdir())
    lines = [[*row, errors.get(row[0], "")] for row in rows]
    notes = f"Base: {options.size}, {size / 1e9:.2f} GB. Medians of {options.rounds} rounds."
    record("merge", markdown([*COSTS, "against float64"], lines), notes, options.results)


def commands(options: argparse.Namespace, peft: list[str | Path]) -> dict[str, list[str | Path]]:
    """What is measured; each writes work/out. Those named "cold" begin with a dropped page cache."""
    tool = [sys.executable, "-m", "chinese_llama", "merge", "--base", "base", "--loras", "plus,alpaca"]
    tool += ["--output", "out"]
    found: dict[str, list[str | Path]] = {
        "cp of the base, flushed": [*COPY],
        "cp of the base": ["cp", "-r", "base", "out"],
        "merge --no-verify": [*tool, "--no-verify"],
        "merge --no-verify --workers 1": [*tool, "--no-verify", "--workers", "1"],
        "merge": [*tool],
    }
    if options.cold:
        found |= {"cp of the base, flushed, cold": [*COPY]}
        found |= {"merge --no-verify, cold": [*tool, "--no-verify"]}
    if options.peft:
        found |= {"PEFT merge_and_unload in sequence": peft}
    return found


def merged(name: str, command: list[str | Path], work: Path, errors: dict[str, str]) -> Measured:
    """One run; the first one's result is compared with float64, into `errors`."""
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()
    if name.endswith("cold"):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    else:
        warm(work)
    found = measured(command, work)
    if name not in errors and not name.startswith("cp"):
        errors[name] = against_float64(work)
    return found


def warm(work: Path) -> None:
    """Read the inputs into the page cache."""
    for file in [*(work / "base").iterdir(), *(work / "plus").iterdir(), *(work / "alpaca").iterdir()]:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def shapes(size: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, shape) of the projections."""
    hidden, wide, layers = SIZES[size]
    for layer in range(layers):
        for name in PROJECTIONS:
            block = "mlp" if name in PROJECTIONS[4:] else "self_attn"
            shape = {"down_proj": (hidden, wide)}.get(name, (wide if block == "mlp" else hidden, hidden))
            yield f"model.layers.{layer}.{block}.{name}", shape


def make(work: Path, size: str) -> None:
    """The base and the two adapters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, dtype="float16",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(work / "base"), max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)
    for name, rank, alpha, rows in (("plus", 8, 32, PLUS), ("alpaca", 64, 128, ALPACA)):
        tensors: dict[str, Any] = {}
        for module, (out, into) in shapes(size):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into) / into**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank) * 2e-3
        for module in ("model.embed_tokens", "lm_head"):
            tensors[f"base_model.model.{module}.weight"] = (torch.randn(rows, hidden) * 0.02).half()
        (work / name).mkdir()
        save_file(tensors, work / name / "adapter_model.safetensors")
        content = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base",
            "target_modules": list(PROJECTIONS), "modules_to_save": ["embed_tokens", "lm_head"],
        }  # fmt: skip
        (work / name / "adapter_config.json").write_text(json.dumps(content))


def by_peft(work: Path, size: str) -> None:
    """The same merge as PEFT does it in sequence, saved in the base's dtype and shards."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float16)
    for name, rows in (("plus", PLUS), ("alpaca", ALPACA)):
        model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(work / name)).merge_and_unload()
    model.save_pretrained(str(work / "out"), max_shard_size="1GB")


def against_float64(work: Path) -> str:
    """The error of two projections of every fourth layer of the result, in units in the last place, and the share
    of numbers that are not the float64 sum, rounded."""
    from safetensors import safe_open

    def tensor(folder: str, name: str) -> Any:
        for file in sorted((work / folder).glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118
                    return opened.get_tensor(name)
        raise KeyError(name)

    worst, wrong, count = 0, 0, 0
    layers = json.loads((work / "base" / "config.json").read_text())["num_hidden_layers"]
    for layer in range(0, layers, 4):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            exact = tensor("base", f"{name}.weight").double()
            for adapter, scale in (("plus", 4.0), ("alpaca", 2.0)):
                b, a = (
                    tensor(adapter, f"base_model.model.{name}.lora_{side}.weight").double() for side in "BA"
                )
                exact += scale * (b @ a)
            found, rounded = tensor("out", f"{name}.weight"), exact.half()
            wrong += int((found != rounded).sum())
            count += found.numel()
            worst = max(worst, int((_place(found) - _place(rounded)).abs().max()))
    return f"{worst} ulp, {100 * wrong / count:.4f} % not correctly rounded"


def _place(numbers: Any) -> Any:
    """The place of each float16 number in the row of all of them."""
    import torch

    bits = numbers.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
