"""Teach a LLaMA-family model Chinese: vocabulary, embeddings, LoRA training, merging, measures."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin for milliseconds while they wait: harmless alone, but when anything else runs on
# the machine, small models train many times slower. Read when torch is loaded, so it is set before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
