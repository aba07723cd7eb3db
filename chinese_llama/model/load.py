"""Models and tokenizers from directories (or hub ids), with the checks that users miss."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.hub import local
from chinese_llama.model.resize import copy_tokenizer
from chinese_llama.vocab.bytelevel import BETWEEN_DOCUMENTS

LARGE = 1 << 30  # bytes of weights that take some seconds to load
SPARE = 0.1  # share of the rows that may fill up; DeepSeek's 102,400 hold 2 % of such


def quiet_libraries() -> None:
    """Keep the libraries from printing what a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # PEFT looks for tied modules among two kinds; token indices, which it ties too, are a third
    warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")


def load_tokenizer(place: str | Path) -> Any:
    """The fast tokenizer of a directory or hub id. Raises BadFile where there is none."""
    from transformers import AutoTokenizer

    place = local(place)
    _check_place(place, ("tokenizer.json", "tokenizer.model"), "tokenizer")
    if not (place / "tokenizer.json").is_file():
        with tempfile.TemporaryDirectory() as made:  # transformers' own conversion gives other ids
            copy_tokenizer(place, Path(made))
            return load_tokenizer(made)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise BadFile(place, f"has no tokenizer that loads ({_first_line(error)}).") from error
    if tokenizer.bos_token_id is None and BETWEEN_DOCUMENTS in tokenizer.get_vocab():
        tokenizer.bos_token = BETWEEN_DOCUMENTS
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise BadFile(place, "the tokenizer names no bos or eos token (tokenizer_config.json).")
    return tokenizer


def load_model(
    place: str | Path, dtype: str = "auto", quantization: str = "none", device: str = "cpu"
) -> Any:
    """The causal language model of a directory or hub id, in evaluation mode.

    `dtype` "auto": bfloat16 where a GPU with bfloat16 is present, else float32. `quantization` of the
    linear layers, lm_head excepted: nf4 (4 bits, with double quantisation; QLoRA, arXiv 2305.14314) or int8
    (LLM.int8, arXiv 2208.07339); a quantised model is put on `device` at once, others stay on the CPU.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    place = local(place)
    _check_place(place, ("config.json",), "model")
    dtype = resolve_dtype(dtype)
    if sum(file.stat().st_size for file in place.glob("*.safetensors")) > LARGE:
        transformers.logging.enable_progress_bar()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            str(place),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
            **_quantized(quantization, dtype, device),
        )
    except Exception as error:  # transformers raises many kinds
        raise BadFile(place, f"is not a model that loads ({_first_line(error)}).") from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise BadFile(place, f"lacks {len(missing)} of the model's tensors ({missing[0]} ...).")
    return model.eval()


def _quantized(quantization: str, dtype: str, device: str) -> dict[str, Any]:
    """What from_pretrained needs to quantise with bitsandbytes while it loads."""
    if quantization == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"quantization: {quantization} needs bitsandbytes: pip install bitsandbytes."
        ) from error
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device}}


def resolve_dtype(dtype: str) -> str:
    """`dtype`, "auto" made definite."""
    import torch

    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def check_pair(model: Any, tokenizer: Any, place: str | Path) -> None:
    """Raise DoesNotFit if the tokenizer has ids that the model has no rows for, or is not the size of the
    one that the model was made with (49,953 pieces on 49,954 rows run, and babble)."""
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer, place)


def check_rows(rows: int, tokenizer: Any, place: str | Path) -> None:
    """`check_pair` of a model with so many rows."""
    manifest = read_manifest(Path(place)) if Path(place).is_dir() else None
    made_with = manifest.vocab_size if manifest else None
    spare = 1 - len(tokenizer) / rows
    padded = rows % 8 == 0 and spare < SPARE  # rows are rounded up in eights at least
    if len(tokenizer) < (made_with or (0 if padded else rows)):
        raise DoesNotFit(
            f"The tokenizer has {len(tokenizer):,} pieces, {place} is a model of {made_with or rows:,}; use the tokenizer "
            "that it was made with."
        )
    if len(tokenizer) > rows:
        raise DoesNotFit(
            f"The tokenizer has {len(tokenizer):,} pieces, {place} only {rows:,} rows; grow it first with "
            "chinese-llama extend-model."
        )


def check_tokenizer(place: Path, tokenizer: Any, name: str) -> None:
    """Raise DoesNotFit if the model in `place` has a tokenizer beside it whose pieces are not the first ones of
    `tokenizer` (called `name`): its rows would stand for other pieces."""
    if not any((place / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(place).get_vocab()
    wrong = min((index for piece, index in theirs.items() if mine.get(piece) != index), default=None)
    if wrong is not None:
        piece = tokenizer.convert_ids_to_tokens(wrong) if wrong < len(tokenizer) else "nothing"
        there = next(piece for piece, index in theirs.items() if index == wrong)
        raise DoesNotFit(
            f"{name} is not the tokenizer of {place}: id {wrong} is {piece!r} in it, and {there!r} beside the model; "
            "use the one that the model was made with."
        )


def first_new_id(*places: str | Path) -> int | None:
    """The first id that extend-vocab added, from the manifest of a model or a tokenizer."""
    for place in places:
        manifest = read_manifest(Path(place)) if Path(place).is_dir() else None
        if manifest and "base_vocab_size" in manifest.metrics:
            return int(manifest.metrics["base_vocab_size"])
    return None


def device() -> str:
    """Where models run: the first GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_place(place: Path, files: tuple[str, ...], what: str) -> None:
    if not place.is_dir():
        raise BadFile(place, f"no such directory; a {what} is wanted here.")
    if not any((place / file).is_file() for file in files):
        raise BadFile(place, f"holds no {what} (no {' or '.join(files)}).")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
