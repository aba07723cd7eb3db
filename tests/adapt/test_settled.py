"""What stands as it stood is known without asking the stages; what has changed is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt import plan
from chinese_llama.adapt.settled import settle, settled
from chinese_llama.artifacts import Manifest, input_record, write_manifest
from chinese_llama.workspace import Workspace
from tests.adapt import spaces


@pytest.fixture
def made(tmp_path: Path, work: Path, base: Path, chinese_sp: Path) -> Workspace:
    """A workspace whose outputs are there: manifests that name an input."""
    (tmp_path / "mine.jsonl").write_text('{"text": "甲"}\n', encoding="utf-8")
    values = spaces.settings(work, base, chinese_sp) | {"control": {}}
    values["eval"]["text"] = {"zh": "mine.jsonl"}
    space = spaces.write(tmp_path, values)
    for stage in plan.stages_of(space):
        stage.output.mkdir(parents=True)
        (stage.output / "model.safetensors").write_bytes(b"weights")
        write_manifest(
            stage.output, Manifest("model", stage.name, {"data": input_record(tmp_path / "mine.jsonl")})
        )
    return space


def known(space: Workspace, **sections: Any) -> bool:
    import yaml

    values = yaml.safe_load(space.file.read_text(encoding="utf-8"))
    again = Workspace(space.file, values | sections)
    return settled(again, plan.stages_of(again))


def test_it_is_known_until_something_changes(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not known(made)
    settle(made, plan.stages_of(made))
    assert known(made)
    seal = made.path("work/measured/stands")
    before = seal.stat().st_mtime_ns
    settle(made, plan.stages_of(made))
    assert seal.stat().st_mtime_ns == before
    assert not known(made, title="another")
    assert not known(made, control=None)
    assert not known(made, base="some/model"), "what the hub has now is not asked here"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert not known(made), "dtype: auto may be another"


@pytest.mark.parametrize(
    "name", ["mine.jsonl", "work/plus/model.safetensors", "work/report/chinese_llama.json"]
)
def test_a_file_that_was_written_again_is_noticed(made: Workspace, name: str) -> None:
    settle(made, plan.stages_of(made))
    file = made.path(name)
    stat = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not known(made), "times can be set back, but the time of that change is kept"
    settle(made, plan.stages_of(made))
    assert known(made)
    file.unlink()
    assert not known(made)


def test_what_is_missing_or_damaged_is_not_known(made: Workspace) -> None:
    settle(made, plan.stages_of(made))
    manifest = made.path("work/merged/chinese_llama.json")
    manifest.write_text("{")
    assert not known(made)
    manifest.unlink()
    assert not known(made)
    settle(made, plan.stages_of(made))
    assert not known(made)
