"""A contender of `train-step`: the recipe pt_lora itself, as its command line runs it."""

from __future__ import annotations

import sys

from benchmarks.step.common import Settings, begin


def words(settings: Settings) -> list[str]:
    """The command line of recipes/pt_lora.py."""
    fields = {
        "model_name_or_path": settings.model,
        "tokenizer_name_or_path": settings.tokenizer,
        "data": settings.corpus,
        "prepared_dir": settings.prepared,
        "output_dir": f"{settings.work}/adapter",
        "block_size": settings.block,
        "dtype": settings.dtype,
        "embeddings": settings.embeddings,
        "cross_document_attention": settings.across,
        "quantization": settings.quantization,
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        **settings.training,
    }
    told = {True: "true", False: "false"}
    return [
        word
        for name, value in fields.items()
        for word in (f"--{name}", told.get(value, str(value)) if isinstance(value, bool) else str(value))
    ]


if __name__ == "__main__":
    import chinese_llama  # noqa: F401 (sets how torch's threads wait, before torch is loaded)
    from chinese_llama.errors import report
    from recipes.pt_lora import main

    sys.exit(report(main, words(begin())))
