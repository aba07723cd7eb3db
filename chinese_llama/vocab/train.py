"""Train the Chinese SentencePiece model from a corpus.

Only clauses of Chinese are shown to the trainer, so no piece holds a space, a digit or a
Latin letter; nothing is normalised, so full-width punctuation stays what it is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from chinese_llama.artifacts import Keep, Manifest, input_record, read_manifest, stands, write_manifest
from chinese_llama.data.formats import texts
from chinese_llama.directories import new_directory
from chinese_llama.errors import UserError
from chinese_llama.progress import say, track
from chinese_llama.vocab.corpus import LONGEST, clauses

MODEL = "chinese_sp.model"
SLOW = 5_000_000  # characters; fewer are trained on in seconds
LARGEST = 1_000_000  # pieces; beyond all use, and SentencePiece loops for hours
SEED = 20_000
SENTENCES = 4_000_000  # kept in memory by the trainer, sampled from the whole stream


def train_vocab(
    corpus: list[Path],
    output: Path,
    vocab_size: int = 20_000,
    model_type: str = "bpe",
    force: bool = False,
    keep: Keep = False,
) -> Manifest:
    """Train `output`/chinese_sp.model with about `vocab_size` pieces; return its manifest.

    A corpus too small for that many pieces gives fewer. `keep` accepts an output that was made from
    the same corpus and settings. Raises UserError for a corpus without Chinese.
    """
    if model_type not in ("bpe", "unigram"):
        raise UserError(f"--model-type {model_type!r}: known are bpe and unigram.")
    if not 16 <= vocab_size <= LARGEST:
        raise UserError(f"--vocab-size {vocab_size}: give 16 to {LARGEST:,} pieces.")
    manifest = Manifest(
        "sentencepiece",
        "train-vocab",
        inputs={f"corpus:{i}": input_record(path) for i, path in enumerate(corpus)},
        settings={"vocab_size": vocab_size, "model_type": model_type},
    )
    if keep and stands(output, manifest, force, keep):
        return read_manifest(output) or manifest
    with new_directory(output, force, manifest.places()) as partial:
        counter = {"characters": 0}
        (partial / MODEL).write_bytes(_train(corpus, vocab_size, model_type, counter))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(partial / MODEL))
        manifest.vocab_size = processor.get_piece_size()
        manifest.metrics = counter
        write_manifest(partial, manifest)
    return manifest


def _runs(corpus: list[Path], counter: dict[str, int]) -> Iterator[str]:
    for path in corpus:
        for text in track(texts(path), f"reading {path.name}", unit="documents"):
            for clause in clauses(text):
                counter["characters"] += len(clause)
                yield clause


def _train(corpus: list[Path], vocab_size: int, model_type: str, counter: dict[str, int]) -> bytes:
    model = io.BytesIO()
    failure: list[BaseException] = []  # SentencePiece makes a RuntimeError of what its source raises

    def runs() -> Iterator[str]:
        try:
            yield from _runs(corpus, counter)
            if counter["characters"] > SLOW:
                say(f"train-vocab: {vocab_size:,} pieces from {counter['characters']:,} characters ...")
        except BaseException as error:
            failure.append(error)
            raise

    sentencepiece.set_random_generator_seed(SEED)  # of the sample that is taken of a large corpus
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=runs(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=0.9998,
            hard_vocab_limit=False,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=4 * LONGEST,
            num_threads=1,  # the same pieces on every machine
            minloglevel=2,
        )
    except Exception as error:
        if failure:
            raise failure[0] from None
        if not counter["characters"]:
            raise UserError("The corpus holds no Chinese characters; give one that does.") from error
        if too_small := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab-size {vocab_size}: the corpus has more characters than that; give at least {too_small[1]}."
            ) from error
        raise UserError(
            f"A corpus of {counter['characters']:,} Chinese characters gives no {vocab_size:,} pieces; give "
            "more text or a smaller --vocab-size."
        ) from error
    if failure:
        raise failure[0]
    return model.getvalue()
