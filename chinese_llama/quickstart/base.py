"""The toy's base: a tiny LLaMA with a tokenizer that behaves like LLaMA's, pretrained on English."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece

from chinese_llama.artifacts import Manifest, input_record, read_manifest, stands, write_manifest
from chinese_llama.data.formats import documents
from chinese_llama.directories import new_directory
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import model_pb2

CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
VOCAB_SIZE = 2000
BLOCK_SIZE = 128
TRAINING = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 7,
    "logging_steps": 50,
    "seed": 42,
}


def english_tokenizer(corpus: Path) -> model_pb2.ModelProto:
    """A SentencePiece-BPE model like LLaMA's: single digits, byte fallback, dummy prefix, text kept
    as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents(corpus) for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    proto = model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def make_base(corpus: Path, output: Path, force: bool = False) -> Manifest:
    """Write the toy base to `output` (kept if it stands), pretrained on the documents of `corpus`."""
    manifest = Manifest(
        "model",
        "quickstart",
        inputs={"corpus": input_record(corpus)},
        settings={**CONFIG, **TRAINING, "block_size": BLOCK_SIZE},
        vocab_size=VOCAB_SIZE,
    )
    if stands(output, manifest, force):
        return read_manifest(output) or manifest
    with new_directory(output, force, manifest.places()) as partial:
        proto = english_tokenizer(corpus)
        write_tokenizer(partial, proto, None)
        with tempfile.TemporaryDirectory() as directory:
            model, log = _pretrain(partial, corpus, Path(directory))
        model.save_pretrained(str(partial))
        manifest.metrics = {"log": log, "parameters": model.num_parameters()}
        write_manifest(partial, manifest)
    return manifest


def _pretrain(place: Path, corpus: Path, directory: Path) -> tuple[Any, list[dict[str, float]]]:
    """The trained model, with the tokenizer in `place`, and its loss by step."""
    import transformers

    from chinese_llama.data.mixture import Source
    from chinese_llama.data.prepare import Job, prepare
    from chinese_llama.model.load import load_tokenizer
    from chinese_llama.train.callbacks import Bar
    from chinese_llama.train.collate import Collator

    seed = int(TRAINING["seed"])  # type: ignore[call-overload]
    transformers.set_seed(seed)
    tokenizer = load_tokenizer(place)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), dtype="float32", use_cache=False, **CONFIG)
    model = transformers.LlamaForCausalLM(config)
    job = Job("pretraining", (Source(corpus),), place, BLOCK_SIZE)
    collator = Collator(BLOCK_SIZE, tokenizer.eos_token_id)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **TRAINING,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=prepare(job, directory / "prepared", tokenizer).dataset(seed),
        data_collator=lambda rows: {k: v for k, v in collator(rows).items() if k != "documents"},
        callbacks=[Bar("base")],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    model.config.use_cache = True
    log = [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]
    return model.cpu(), log
