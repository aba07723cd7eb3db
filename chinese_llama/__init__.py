"""Teach a LLaMA-family model Chinese: vocabulary, embeddings, LoRA training, merging, measures."""

__version__ = "0.1.0"
