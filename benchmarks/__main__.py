"""python -m benchmarks NAME ...: run a benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "vocab": "what a token holds on held-out sources; speed of extend-vocab and audit-vocab",
    "rows": "how new rows should start: Chinese and English by step, for every --init",
    "merge": "merge beside cp and PEFT: seconds, peak memory, error against float64",
    "extend-model": "extend-model beside cp: seconds and peak memory",
    "prepare": "tokenising and packing beside raw encode_batch and datasets.map: MB/s, peak memory",
    "train-step": "a step of training: tokens per second and peak memory, beside PEFT and its peers",
    "count": "operations and bytes of a training step, and the limit that they give; nothing is run",
    "real-run": "the whole way on real files with a small LLaMA: bits per character",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {name:<14}{what}" for name, what in NAMES.items()))
        return
    name, *rest = argv
    if name not in NAMES:
        raise SystemExit(f"python -m benchmarks: {name!r} is no benchmark; known are {', '.join(NAMES)}.")
    importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
