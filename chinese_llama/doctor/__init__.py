"""What is wrong with models, adapters, tokenizers and data, and whether they fit: `chinese-llama doctor`."""
