"""Hub ids are told from paths, and nothing else reaches for the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from chinese_llama.errors import UserError
from chinese_llama.hub import is_hub_id, local


@pytest.mark.parametrize("place", ["hfl/chinese-llama-plus-lora-7b", "a-b/c.d_e", "0x/y"])
def test_hub_ids(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(place)


@pytest.mark.parametrize(
    "place", ["name", "/a/b", "./a", "../a", "~/a", "a/b/c", "a/", "", ".a/b", "a b/c", "模型/x y"]
)
def test_paths_are_no_hub_ids(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(place)
    assert local(place) == Path(place)


def test_a_directory_that_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in work/x must not become a download."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("work/missing")
    assert local("work/missing") == Path("work/missing")


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^nobody/nothing is no directory here, and the hub .*\)\.$"
    ) as error:
        local("nobody/nothing")
    assert "\n" not in str(error.value)
