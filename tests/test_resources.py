"""What is shipped with the package is found."""

from __future__ import annotations

import pytest

from chinese_llama.resources import PACKAGE, shipped


@pytest.mark.parametrize(
    ("name", "file"), [("recipes", "pt_lora.py"), ("vocab", "README.md"), ("merge", "adapters.yaml")]
)
def test_shipped_folders_are_there(name: str, file: str) -> None:
    assert (shipped(name) / file).is_file()


def test_the_quickstart_texts_are_there() -> None:
    texts = PACKAGE / "quickstart" / "text"
    for name in ("zh", "en", "instructions"):
        for file in (texts / f"{name}.jsonl", texts / f"{name}_heldout.jsonl"):
            assert file.stat().st_size > 1000
