"""What the tests of merging share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.merging.making import LLAMA_7B, write_base


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_base(tmp_path / "llama", **LLAMA_7B)
