"""The built wheel works outside any checkout: its data travels inside the package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, unpacked as an installation would be."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_only_the_package_is_installed(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "chinese_llama"
    }


def test_the_data_is_found(installed: Path, tmp_path: Path) -> None:
    code = (
        "from chinese_llama.resources import PACKAGE, shipped\n"
        "print(PACKAGE, *(shipped(n) for n in ('recipes', 'vocab', 'merge')))\n"
        "print(all((shipped(n) / f).is_file() for n, f in "
        "(('recipes', 'pt_lora.py'), ('vocab', 'probe.txt'), ('merge', 'adapters.yaml'))))"
    )
    places, there = run(installed, tmp_path, "-c", code).stdout.splitlines()
    assert there == "True"
    assert all(place.startswith(str(installed)) for place in places.split())


def test_pages_and_tasks_are_inside(installed: Path) -> None:
    evaluate = installed / "chinese_llama" / "evaluate"
    for name in ("report/page.html", "rating.html", "tasks/ceval.yaml", "tasks/cmmlu.yaml"):
        assert (evaluate / name).is_file(), name


def test_the_registry_and_the_quickstart_are_inside(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed,
        tmp_path,
        "-m",
        "chinese_llama",
        "merge",
        "--base",
        "x",
        "--loras",
        "nobody",
        "--output",
        "y",
    )
    assert done.returncode == 2 and "chinese-alpaca-pro-7b" in done.stderr
    text = installed / "chinese_llama" / "quickstart" / "text"
    assert {"zh.jsonl", "en.jsonl", "instructions.jsonl"} <= {path.name for path in text.iterdir()}
    assert (installed / "chinese_llama" / "quickstart" / "chinese-llama.yaml").is_file()


def test_a_recipe_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = installed / "chinese_llama" / "shipped" / "recipes" / "pt_lora.py"
    done = run(installed, tmp_path, str(script))
    assert done.returncode == 2
    assert "chinese-llama init DIR" in done.stderr and "Traceback" not in done.stderr
