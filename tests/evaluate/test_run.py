"""Everything that is measured of a model: what it holds, what is remembered, and how faults are told."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.evaluate import run as module
from chinese_llama.evaluate import speed
from chinese_llama.evaluate.models import Subject
from chinese_llama.evaluate.run import Request, check, compared, measure, speeds
from chinese_llama.merging.plan import load
from tests import tiny
from tests.model.test_adapters import peft_adapter


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    zh = tiny.write_texts(folder / "zh.jsonl", tiny.CHINESE[:5])
    en = tiny.write_texts(folder / "en.jsonl", [*tiny.ENGLISH[:4], " ".join(tiny.ENGLISH)])
    return {"zh": zh, "en": en}


@pytest.fixture(scope="module")
def measured(extended: Path, texts: dict[str, Path]) -> dict[str, Any]:
    return measure(Subject("ours", str(extended)), Request(texts))


def damaged(base: Path, place: Path, value: float) -> Path:
    shutil.copytree(base, place)
    weights = load_file(place / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


def test_what_is_told(measured: dict[str, Any], extended: Path) -> None:
    told = json.loads(json.dumps(measured))  # all of it is plain JSON
    assert told == measured
    keys = "name model loras sha256 device dtype texts documents choices wikitext"
    assert list(told) == keys.split()
    assert (told["name"], told["model"], told["loras"]) == ("ours", str(extended), [])
    assert (told["choices"], told["wikitext"]) == ([], None)
    zh, counted = told["texts"]["zh"], told["documents"]["zh"]
    assert zh["documents"] == 5 == len(counted["nats"])
    assert zh["bits_per_byte"] == pytest.approx(sum(counted["nats"]) / sum(counted["bytes"]) / math.log(2))
    low, high = zh["interval"]["bits_per_character"]
    assert low < zh["bits_per_character"] < high
    assert zh["interval"]["bits_per_byte"][0] < zh["bits_per_byte"]
    assert told["texts"]["en"]["tokens"] > 5 * 128  # the last document is longer than the model reads
    assert (told["texts"]["en"]["window"], told["texts"]["en"]["stride"]) == (128, 64)


@pytest.mark.parametrize("free", [1 << 40, 0])
def test_speeds_are_taken_in_turn_where_the_memory_holds_the_models(
    base: Path,
    extended: Path,
    texts: dict[str, Path],
    free: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    groups: list[int] = []
    decoded = module._decoded
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(module, "_decoded", lambda m, t: groups.append(len(m)) or decoded(m, t))  # type: ignore[func-returns-value]
    monkeypatch.setattr(speed, "REPEATS", 1)
    models = [Subject("base", str(base)), Subject("ours", str(extended))]
    told = speeds(models, texts, tmp_path / "keep")
    assert [found["text"] for found in told] == ["zh"] * 2
    assert told[0]["tokens"] > told[1]["tokens"] and told[0]["characters"] == told[1]["characters"]
    assert speeds(models, texts, tmp_path / "keep") == told  # remembered
    assert groups == ([2] if free else [1, 1])
    assert speeds(models[1:], texts, tmp_path / "keep") != told[1:]
    assert groups[-1] == 1


def test_two_tokenizers_are_compared_by_document(
    measured: dict[str, Any], base: Path, texts: dict[str, Path]
) -> None:
    theirs = measure(Subject("base", str(base)), Request(texts))
    found = compared(measured, theirs)
    assert set(found) == {"zh", "en"}
    ours = measured["texts"]["zh"]
    assert ours["characters_per_token"] > 2 * theirs["texts"]["zh"]["characters_per_token"]
    for unit in ("character", "byte"):
        ratio = ours[f"bits_per_{unit}"] / theirs["texts"]["zh"][f"bits_per_{unit}"]
        assert found["zh"]["difference"] == pytest.approx(ratio - 1)
    other = theirs | {"documents": {"zh": {k: v[:3] for k, v in theirs["documents"]["zh"].items()}}}
    with pytest.raises(DoesNotFit, match="different documents"):
        compared(measured, other)
    assert compared(measured, theirs | {"documents": {}}) == {}


def test_window_and_stride_are_those_asked_for(extended: Path, texts: dict[str, Path]) -> None:
    """More context, fewer bits to guess; each token is scored once whatever they are."""
    told = [
        measure(Subject("x", str(extended)), Request({"en": texts["en"]}, stride, window))["texts"]["en"]
        for stride, window in ((None, None), (8, 32))
    ]
    assert [t["window"] for t in told] == [128, 32] and [t["stride"] for t in told] == [64, 8]
    assert told[0]["tokens"] == told[1]["tokens"] and told[0]["context"] > told[1]["context"]
    for wrong, said in (
        (Request(texts, window=200), "context of 128"),
        (Request(texts, 128), "stride of 128"),
    ):
        with pytest.raises(UserError, match=said):
            check([Subject("x", str(extended))], wrong)


def test_a_result_is_remembered_until_something_changes(
    base: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, keep = shutil.copytree(base, tmp_path / "own"), tmp_path / "keep" / "here"
    text = shutil.copy(texts["zh"], tmp_path / "zh.jsonl")
    request = Request({"zh": text})
    first = measure(Subject("one", str(own)), request, keep)
    calls: list[str] = []
    opened = module.open_subject
    monkeypatch.setattr(module, "open_subject", lambda s: calls.append(s.name) or opened(s))  # type: ignore[func-returns-value]
    assert measure(Subject("two", str(own)), request, keep) == first | {"name": "two"}
    assert calls == []
    measure(Subject("stride", str(own)), Request({"zh": text}, stride=16), keep)
    measure(Subject("name", str(own)), Request({"chinese": text}), keep)
    lora = load("a", peft_adapter(own, tmp_path / "a"))
    measure(Subject("adapter", str(own), [lora]), request, keep)
    tiny.write_texts(text, tiny.CHINESE[:2])
    measure(Subject("text", str(own)), request, keep)
    (own / "config.json").write_text((own / "config.json").read_text().replace("1e-06", "1e-05"))
    measure(Subject("config", str(own)), request, keep)
    assert calls == ["stride", "name", "adapter", "text", "config"]
    for file in keep.iterdir():
        file.write_text("{")
    measure(Subject("damaged", str(own)), request, keep)
    assert calls[-1] == "damaged"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            math.nan,
            r"its model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite, so it is damaged",
        ),
        (3e38, "its weights are finite but overflow in float32"),
    ],
)
def test_nan_names_text_document_and_cause(
    base: Path, texts: dict[str, Path], tmp_path: Path, value: float, said: str
) -> None:
    place = damaged(base, tmp_path / "bad", value)
    with pytest.raises(UserError, match=rf"bad one gives document \d of zh no number \(nan\): {said}"):
        measure(Subject("bad one", str(place)), Request(texts), tmp_path / "keep")
    assert not (tmp_path / "keep").exists()


def test_bad_texts_are_told_before_a_model_is_loaded(
    base: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "late.jsonl").write_text('{"text": "a"}\n{"n": 1}\n')
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "tokenizer.model"):  # no weights: loading it would be another error
        shutil.copy(base / name, tmp_path / "weights")
    for name, said in (
        ("no.jsonl", "no such file"),
        ("empty.txt", "holds no text"),
        ("late.jsonl", "line 2: has no field 'text'"),
    ):
        with pytest.raises(BadFile, match=f"{name}.*{said}"):
            measure(Subject("x", str(tmp_path / "weights")), Request(texts | {"bad": tmp_path / name}))


def test_a_text_without_a_token_is_named(
    extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chinese_llama.evaluate import bits

    (tmp_path / "odd.txt").write_text("x\n")
    monkeypatch.setattr(bits, "text_ids", lambda tokenizer, text: [])
    with pytest.raises(UserError, match="odd: The text has not one token"):
        measure(Subject("x", str(extended)), Request({"odd": tmp_path / "odd.txt"}))
