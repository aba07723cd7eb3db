"""Settings are read, layered and typed in one way, and what is wrong is named with its place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.config import load_yaml, parse_fields, typed
from chinese_llama.errors import BadFile, UserError


@dataclass
class Settings:
    rate: float = 0.1
    steps: int = 1
    name: str = "x"
    tag: str | None = None
    items: list[str] = field(default_factory=list)
    anything: Any = None
    named: dict[str, int] | None = None
    flag: bool = False


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "settings.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_yaml_numbers_and_references(tmp_path: Path) -> None:
    loaded = load_yaml(write(tmp_path, "a: 1e-4\nb: [1, 二]\nc: ${a}\nd: {e: null}\n1: x\n"))
    assert loaded == {"a": 1e-4, "b": [1, "二"], "c": 1e-4, "d": {"e": None}, "1": "x"}
    assert isinstance(loaded["a"], float)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "# only a comment\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", r"settings\.yaml, line 3: is not valid YAML"),
        ("a: 1\n\tb: 2\n", r"settings\.yaml, line 2: is not valid YAML"),
        ("a: 1\na: 2\n", r"settings\.yaml, line 2: is not valid YAML \(.*duplicate"),
        ("a: ${nowhere}\n", r"settings\.yaml: .* is a reference .*'nowhere' not found"),
        (b"\xff\xd6", r"settings\.yaml: is not valid YAML .*utf-8"),
        ("- 1\n- 2\n", r"settings\.yaml: must hold `name: value` lines"),
        ("3\n", r"settings\.yaml: must hold `name: value` lines"),
        ("only words\n", r"settings\.yaml: must hold `name: value` lines"),
    ],
)
def test_bad_yaml_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(BadFile, match=message):
        load_yaml(write(tmp_path, text))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"none\.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(BadFile, match="cannot be read"):
        load_yaml(tmp_path)


def test_typed_fills_in_defaults_and_converts() -> None:
    made = typed(Settings, {"rate": "1e-4", "steps": "3", "items": "one", "anything": {"a": [1]}}, "here")
    assert made == Settings(rate=1e-4, steps=3, items=["one"], anything={"a": [1]})
    assert isinstance(made, Settings)
    assert typed(Settings, {"rate": 2, "name": 5}, "here") == Settings(rate=2.0, name="5")


def test_typed_makes_fresh_lists() -> None:
    typed(Settings, {}, "here").items.append("x")
    assert typed(Settings, {}, "here").items == []


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^here: unknown setting 'stepz' \(did you mean 'steps'\?\)\.$"):
        typed(Settings, {"stepz": 3}, "here")
    with pytest.raises(UserError, match=r"^here: unknown setting 'qqqq'\.$"):
        typed(Settings, {"qqqq": 3}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, r"^here: steps: .*many"),
        ({"steps": 1.5}, r"^here: steps: .*1\.5"),
        ({"rate": [1]}, "^here: rate: "),
        ({"flag": "perhaps"}, "^here: flag: .*perhaps"),
        ({"steps": None}, "^here: steps: "),
        ({"named": ["a"]}, r"^here: named: \['a'\] is no section; it must hold `name: value` lines"),
    ],
)
def test_a_wrong_type_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        typed(Settings, values, "here")


def test_fields_of_a_command_line() -> None:
    argv = ["--config", "a.yaml", "--learning-rate", "1e-4", "--data", "a", "b", "--x=plus=dir/b", "--bf16"]
    assert parse_fields(argv) == (
        Path("a.yaml"),
        {"learning_rate": 1e-4, "data": ["a", "b"], "x": "plus=dir/b", "bf16": True},
    )
    assert parse_fields(["--config=b.yaml"]) == (Path("b.yaml"), {})
    assert parse_fields([]) == (None, {})


def test_the_last_of_a_repeated_field_wins() -> None:
    assert parse_fields(["--a", "1", "--a", "2"])[1] == {"a": 2}


@pytest.mark.parametrize("argv", [["a"], ["-a", "1"]])
def test_words_that_are_no_field(argv: list[str]) -> None:
    with pytest.raises(UserError, match=rf"'{argv[0]}': settings are given as --name value"):
        parse_fields(argv)


def test_a_value_that_is_none() -> None:
    with pytest.raises(UserError, match=r"--a: '\[1' is not a value"):
        parse_fields(["--a", "[1"])


NAMES = st.from_regex(r"[a-z]{2,8}(_[a-z]{1,5})?", fullmatch=True).filter(lambda name: name != "config")
WORDS = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1)
ATOMS = st.integers() | st.booleans() | WORDS | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(NAMES, ATOMS | st.lists(ATOMS, min_size=1, max_size=3)))
def test_a_command_line_gives_what_a_file_gives(fields: dict[str, Any]) -> None:
    """`--name value` reads a value as YAML does, so settings move between file and command line."""
    argv = [f"--{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    parsed = parse_fields(argv)[1]
    assert parsed.keys() == fields.keys()
    for name, value in fields.items():
        pairs = zip(parsed[name], value, strict=True) if isinstance(value, list) else [(parsed[name], value)]
        for got, wanted in pairs:
            close = math.isclose(got, wanted) if isinstance(wanted, float) else got == wanted
            assert close and type(got) is type(wanted)
