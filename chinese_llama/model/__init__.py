"""Weights: reading and writing them tensor by tensor, growing the vocabulary, LoRA."""
