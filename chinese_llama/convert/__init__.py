"""Model formats: Meta's own checkpoints and Hugging Face directories, one into the other."""
