"""What the recipe is told for the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt import control
from chinese_llama.config import parse_fields
from chinese_llama.train.jobs import prepare_ahead
from chinese_llama.workspace import Workspace
from tests.adapt import spaces


def told(space: Workspace) -> dict[str, Any]:
    return parse_fields(control.argv(space))[1]


def write(folder: Path, work: Path, base: Path, chinese_sp: Path, **more: Any) -> Workspace:
    return spaces.write(folder, spaces.settings(work, base, chinese_sp) | more)


def test_it_is_the_base_itself_and_no_row_trains(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    pretraining = {"data": str(work / "zh.jsonl"), "num_train_epochs": 2, "rows_only_steps": 5}
    found = told(write(tmp_path, work, base, chinese_sp, pt_lora=pretraining, control={}))
    assert found["model_name_or_path"] == found["tokenizer_name_or_path"] == str(base)
    assert (found["embeddings"], found["rows_only_steps"], found["keep"]) == ("frozen", 0, True)
    assert found["embedding_learning_rate"] is None
    assert "max_steps" not in found, "the same epochs read the same text"
    assert found["output_dir"] == str(tmp_path / "work/control")


def test_its_own_settings_win(tmp_path: Path, work: Path, base: Path, chinese_sp: Path) -> None:
    own = {"embeddings": "full", "max_steps": 7, "data": [{"path": "a b.jsonl", "weight": 0.5}]}
    found = told(write(tmp_path, work, base, chinese_sp, control=own))
    own["data"] = [{"path": str(tmp_path / "a b.jsonl"), "weight": 0.5}]
    assert {name: found[name] for name in own} == own


def test_counted_steps_become_those_that_read_the_same_text(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    from chinese_llama.data.formats import documents
    from chinese_llama.model.load import load_tokenizer

    values = spaces.settings(work, base, chinese_sp)
    values["pt_lora"]["max_steps"] = 1000
    space = spaces.write(tmp_path, values | {"control": {}})
    steps = told(space)["max_steps"]
    counts = []
    for place in (base, space.path(space.settings.extend_model.output)):
        tokenizer = load_tokenizer(place)
        texts = [text for name in ("zh", "en") for text in documents(work / f"{name}.jsonl")]
        counts.append(sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 2 for text in texts))
    assert abs(steps - 1000 * counts[0] / counts[1]) < 10
    smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    space = spaces.write(tmp_path, values | {"control": smaller})
    assert abs(told(space)["max_steps"] - steps * 2 / 3) <= 1


def test_with_weights_it_reads_the_same_characters_of_every_source(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    """Weights are shares of tokens, and the Chinese has six times as many in the base's tokenizer."""
    data = [{"path": str(work / "zh.jsonl"), "weight": 0.8}, {"path": str(work / "en.jsonl"), "weight": 0.2}]
    pretraining = {"data": data, "max_steps": -1, "num_train_epochs": 3}
    values = spaces.settings(work, base, chinese_sp)
    space = spaces.write(tmp_path, values | {"control": {}, "pt_lora": {**values["pt_lora"], **pretraining}})
    found = told(space)
    ours, theirs = (
        prepare_ahead("pt_lora", ["--workspace", str(space.file), *words]).manifest.metrics["sources"]
        for words in ([], control.words(space))
    )
    read = []
    for figures, weights, epochs in (
        (ours, [0.8, 0.2], 3),
        (theirs, [s["weight"] for s in found["data"]], found["num_train_epochs"]),
    ):
        tokens = sum(f["tokens"] for f in figures) * epochs
        read.append(
            [tokens * w * f["characters"] / f["tokens"] for f, w in zip(figures, weights, strict=True)]
        )
    assert read[1] == pytest.approx(read[0], rel=1e-3)
    assert found["num_train_epochs"] != 3
