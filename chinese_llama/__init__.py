"""Teach a LLaMA-family model Chinese: vocabulary, embeddings, LoRA training, merging, measures."""

import os

__version__ = "0.1.0"

# Threads that spin while they wait slow a CPU run down five times and more when anything else runs on
# the machine. Read by OpenMP when torch is loaded, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
