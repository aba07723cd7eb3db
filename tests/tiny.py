"""Pico artifacts for the tests: bases of both kinds, a Chinese model, a LLaMA of a few thousand weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

ENGLISH = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "In 2023 the price rose by 10 percent, and 45 people came to see it.",
    "She sells sea shells by the sea shore while the children play.",
    "Water boils at one hundred degrees; ice melts at zero degrees.",
    "def main(): return [1, 2, 3]  # a line of code with brackets",
] * 20
CHINESE = [
    "中国的首都是北京，北京是一座古老的城市。",
    "长江是中国最长的河，黄河是第二长的河。",
    "越来越多的人学习中文，中文并不难！",
    "你好，请问图书馆在哪里？图书馆在学校的东边。",
    "“明天会下雨吗？”“不会，明天是晴天。”",
] * 20

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what byte-level bases are trained on: they join the bytes of a character before characters, as bases that
# have seen more Chinese do, and some words
CHARACTERS = ["\n".join(text) for text in CHINESE] + ["中国\n北京\n的河"] * 20
CONTROLS = ["<|begin|>", "<|end|>", "<|pad|>"]


def base_tokenizer(vocab_size: int = 420) -> model_pb2.ModelProto:
    """An English SentencePiece-BPE model like LLaMA's: byte fallback, single digits, dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    proto = model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def chinese_model(pieces: list[str], kind: int = 1) -> model_pb2.ModelProto:
    """A Chinese BPE model with these pieces (of a `kind`: 1 is an ordinary piece), best first."""
    model = model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kind)
    return model


def write_model(path: Path, model: model_pb2.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def byte_level(
    style: str = "llama3", texts: list[str] = ENGLISH + CHARACTERS, vocab_size: int = 420
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, its control tokens after the vocabulary; `style`: gpt2, llama3, nfc."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style == "gpt2")
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = bytes_of if style == "gpt2" else pre_tokenizers.Sequence([split, bytes_of])
    if style == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=bytes_of.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(CONTROLS)
    return tokenizer


def write_byte_level(directory: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json; `config` overrides the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), CONTROLS, strict=True))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def write_texts(path: Path, texts: list[str]) -> Path:
    """A .jsonl corpus."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_base(directory: Path, proto: model_pb2.ModelProto, tied: bool = False, **config: Any) -> Path:
    """A pico LLaMA with the tokenizer `proto`, as a Hugging Face directory."""
    from chinese_llama.vocab.fast import write_tokenizer

    write_llama(directory, len(proto.pieces), tied, **config)
    write_tokenizer(directory, proto, None)
    return directory


def write_llama(directory: Path, vocab_size: int, tied: bool = False, **config: Any) -> Path:
    """A pico LLaMA without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        **config,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **settings))
    model.save_pretrained(str(directory))
    return directory
