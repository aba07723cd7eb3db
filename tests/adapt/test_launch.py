"""Recipes in processes of their own: which file runs, what accelerate is told, how one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from chinese_llama.adapt import launch
from chinese_llama.errors import BadFile, Interrupted, UserError
from chinese_llama.resources import shipped
from chinese_llama.workspace import FILE, Workspace


def space(folder: Path, text: str = "base: b\n") -> Workspace:
    (folder / FILE).write_text(text, encoding="utf-8")
    return Workspace(folder / FILE)


def own_recipe(folder: Path, text: str) -> Workspace:
    """A workspace with a pt_lora.py of its own."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "pt_lora.py").write_text(text, encoding="utf-8")
    return space(folder)


@pytest.fixture(autouse=True)
def plain_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the one who runs the tests."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_the_copy_of_the_workspace_is_the_one_that_runs(tmp_path: Path) -> None:
    assert launch.script("pt_lora", space(tmp_path)) == shipped("recipes") / "pt_lora.py"
    own = own_recipe(tmp_path, "DEFAULTS = {'learning_rate': 7}\n")
    assert launch.script("pt_lora", own) == tmp_path / "recipes" / "pt_lora.py"
    assert launch.recipe("pt_lora", own).DEFAULTS == {"learning_rate": 7}
    assert launch.script("sft_lora", own) == shipped("recipes") / "sft_lora.py"


def test_the_launch_file_is_the_workspaces_or_one_that_comes_along(tmp_path: Path) -> None:
    assert launch.launch_file(space(tmp_path)) is None
    named = space(tmp_path, "launch: recipes/launch/cpu.yaml\n")
    assert launch.launch_file(named) == shipped("recipes") / "launch" / "cpu.yaml"
    (tmp_path / "mine.yaml").write_text("use_cpu: true\n")
    assert launch.launch_file(space(tmp_path, "launch: mine.yaml\n")) == tmp_path / "mine.yaml"
    assert launch._options(space(tmp_path, "launch: mine.yaml\n")) == [
        "--config_file",
        str(tmp_path / "mine.yaml"),
    ]
    with pytest.raises(BadFile, match=r"none\.yaml: no such file"):
        launch.launch_file(space(tmp_path, "launch: none.yaml\n"))


def test_the_recipe_is_told_the_workspace_and_the_words_in_its_directory(tmp_path: Path) -> None:
    text = "import os, sys\nopen('told', 'w').write(' '.join(sys.argv[1:]) + ' ' + os.getcwd())\n"
    made = own_recipe(tmp_path, text)
    launch.train(made, "pt_lora", ["--max_steps", "3"])
    assert (tmp_path / "told").read_text() == f"--workspace {tmp_path / FILE} --max_steps 3 {tmp_path}"


def test_a_recipe_that_fails_ends_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = own_recipe(tmp_path, "import sys\nprint('Error: why', file=sys.stderr)\nsys.exit(2)\n")
    with pytest.raises(UserError, match="pt_lora ended with an error"):
        launch.train(made, "pt_lora", [])
    told = capfd.readouterr().err
    assert "Error: why" in told and "Traceback" not in told


def test_several_processes_that_fail_leave_no_traceback_of_the_launcher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    own_recipe(tmp_path, "import sys\nprint('Error: why', file=sys.stderr)\nsys.exit(2)\n")
    with pytest.raises(UserError, match="pt_lora ended with an error"):
        launch.train(space(tmp_path, "launch: recipes/launch/cpu_2.yaml\n"), "pt_lora", [])
    told = capfd.readouterr().err
    assert "Error: why" in told and "Traceback" not in told and "torch" not in told


def test_asking_a_recipe_leaves_nothing_beside_it(tmp_path: Path) -> None:
    own = own_recipe(tmp_path, "DEFAULTS = {}\n")
    launch.recipe("pt_lora", own)
    assert [file.name for file in (tmp_path / "recipes").iterdir()] == ["pt_lora.py"]


@pytest.mark.parametrize("text", ["def (", "DEFAULTS = 3\n", "", "import nothing_of_this_name\n"])
def test_an_edited_recipe_that_does_not_load_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadFile, match=r"pt_lora\.py: does not load as a recipe"):
        launch.recipe("pt_lora", own_recipe(tmp_path, text))


PATIENT = """
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    open("saved", "w").write("checkpoint")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
open("started", "w").write("")
time.sleep(60)
"""


def test_stopped_it_waits_for_the_checkpoint(tmp_path: Path) -> None:
    made = own_recipe(tmp_path, PATIENT)

    def interrupt() -> None:
        while not (tmp_path / "started").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="Stopped in pt_lora; the same command goes on"):
        launch.train(made, "pt_lora", [])
    assert (tmp_path / "saved").read_text() == "checkpoint"


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    text = PATIENT.replace("time.sleep(0.5)", "open('saving', 'w').write('')\n    time.sleep(60)")
    made = own_recipe(tmp_path, text)
    code = (
        "import sys\nfrom pathlib import Path\nfrom chinese_llama.adapt import launch\n"
        "from chinese_llama.errors import report\nfrom chinese_llama.workspace import Workspace\n"
        f"sys.exit(report(lambda _: launch.train(Workspace(Path({str(made.file)!r})), 'pt_lora', []), []))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for sign in ("started", "saving"):
        end = time.monotonic() + 60
        while not (tmp_path / sign).is_file():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive and not (tmp_path / "saved").exists()
