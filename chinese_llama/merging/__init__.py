"""LoRA adapters baked into base weights."""
