"""Pico artifacts for the tests: a SentencePiece base, a Chinese model, a LLaMA of a few thousand weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

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


def write_texts(path: Path, texts: list[str]) -> Path:
    """A .jsonl corpus."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_base(directory: Path, proto: model_pb2.ModelProto, tied: bool = False, **config: Any) -> Path:
    """A pico LLaMA with the tokenizer `proto`, as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from chinese_llama.vocab.fast import write_tokenizer

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
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(proto.pieces), tie_word_embeddings=tied, **settings))
    model.save_pretrained(str(directory))
    write_tokenizer(directory, proto, None)
    return directory
