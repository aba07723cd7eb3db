"""The main job at toy size: every stage with the code that real runs use, then measures and a report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from chinese_llama import stages
from chinese_llama.artifacts import Manifest, write_manifest
from chinese_llama.data.conversations import conversations
from chinese_llama.directories import new_directory, write_text
from chinese_llama.errors import OutputExists, UserError
from chinese_llama.progress import Stopwatch, say
from chinese_llama.resources import PACKAGE, place_recipes, shipped
from chinese_llama.workspace import FILE, Workspace

RESOURCES = PACKAGE / "quickstart"
FOLDER = Path("quickstart")
SHOWN = (
    "请问中国的首都是哪里？",
    "请问小孩换牙掉的牙叫什么？",
    "亡羊补牢是什么意思？",
)  # of the held-out ones
ANSWER_TOKENS = 48


def run(directory: Path, force: bool = False) -> dict[str, Any]:
    """Make the workspace in `directory`, run all stages, print the table; return the report's data.

    What stands is kept, so a run that was stopped goes on. Raises UserError.
    """
    watch = Stopwatch()
    _prepare(directory)
    os.chdir(directory)
    workspace = Workspace(Path(FILE))
    from chinese_llama.merging.stage import merged_model
    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.quickstart.base import make_base

    quiet_libraries()
    base = Path(workspace.base())
    say(f"base: a tiny LLaMA in {base}")
    made = make_base(FOLDER / "text" / "en.jsonl", base, force)
    if force:
        for stage in (stages.trained_vocab, stages.extended_tokenizer, stages.extended_model):
            stage(workspace, {}, True)
    for name in ("pt_lora", "sft_lora"):
        recipe(name).main(["--force", "true"] if force else [])
    merged_model(workspace, {}, force)

    from chinese_llama.evaluate import report

    told = {"title": "chinese-llama quickstart", **measure(workspace)}
    told["losses"] = {"base": made.metrics["log"], **_losses(workspace)}
    told["seconds"] = watch.seconds()
    manifest = Manifest("report", "quickstart", metrics=told["stages"])
    with new_directory(FOLDER / "report", force=True) as partial:
        write_text(partial / "report.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
        write_text(partial / "report.md", report.markdown(told))
        write_text(partial / "report.html", report.html(told))
        write_manifest(partial, manifest)
    print(report.text(told))
    page = directory / FOLDER / "report" / "report.html"
    print(f"Report: {page} (and .md). It took {told['seconds']:.0f} s.")
    there = "" if str(directory) == "." else f"cd {directory} && "
    print(f"Talk to it: {there}chinese-llama chat --model {workspace.settings.merge.output}")
    return told


def _prepare(directory: Path) -> None:
    """Write the workspace file and the texts, unless they are there already."""
    file, ours = directory / FILE, (RESOURCES / FILE).read_text(encoding="utf-8")
    if file.is_file() and file.read_text(encoding="utf-8") != ours:
        raise OutputExists(f"{file} is another workspace; run quickstart in another directory.")
    with_text = directory / FOLDER / "text"
    try:
        with_text.mkdir(parents=True, exist_ok=True)
        for source in sorted((RESOURCES / "text").iterdir()):
            shutil.copyfile(source, with_text / source.name)
        place_recipes(directory)
    except OSError as error:
        raise UserError(f"{with_text} cannot be written ({error.strerror}).") from error
    write_text(file, ours)


def recipe(name: str) -> ModuleType:
    """The module of a recipe, from the checkout or from the wheel."""
    path = shipped("recipes") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"chinese_llama_recipe_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _losses(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    from chinese_llama.train.callbacks import LOG, read_log

    logs = {name: read_log(Path(place) / LOG) for name, place in workspace.adapters().items()}
    return {name: [entry for entry in log if "loss" in entry] for name, log in logs.items()}


def measure(workspace: Workspace) -> dict[str, Any]:
    """Figures of every stage on the held-out texts, answers to held-out questions."""
    from chinese_llama.data.formats import documents
    from chinese_llama.evaluate.bits import evaluate_text
    from chinese_llama.evaluate.generate import answer

    sets = {name: workspace.path(file) for name, file in workspace.settings.eval.text.items()}
    told: dict[str, Any] = {"stages": {}, "samples": []}
    held_out = workspace.path("quickstart/text/instructions_heldout.jsonl")
    for name, model, tokenizer in _models(workspace):
        say(f"measuring {name}")
        told["stages"][name] = {
            s: evaluate_text(model, tokenizer, documents(file)) for s, file in sets.items()
        }
        if name not in ("base", "merged"):
            continue
        right = 0
        for (asked, _), keyword in zip(conversations(held_out), _keywords(held_out), strict=True):
            question = asked["content"]
            shown = question in SHOWN
            if name == "base" and not shown:
                continue
            said = answer(model, tokenizer, question, ANSWER_TOKENS)
            right += keyword in said
            if shown:
                told["samples"].append({"model": name, "question": question, "answer": said})
    told["answers"] = {"questions": len(_keywords(held_out)), "right": right}
    return told


def _keywords(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["keyword"] for line in lines]


def _models(workspace: Workspace) -> Iterator[tuple[str, Any, Any]]:
    """(stage, model, tokenizer): the base, the two adapters unmerged, the merged model."""
    from peft import PeftModel

    from chinese_llama.model.load import device, load_model, load_tokenizer

    base, merged = Path(workspace.base()), workspace.path(workspace.settings.merge.output)
    extended = workspace.path(workspace.settings.extend_model.output)
    places = workspace.adapters()
    yield "base", load_model(base).to(device()), load_tokenizer(base)
    plus = PeftModel.from_pretrained(load_model(extended).to(device()), places["plus"])
    yield "plus", plus, load_tokenizer(extended)
    alpaca = PeftModel.from_pretrained(plus.merge_and_unload(), places["alpaca"])
    yield "alpaca", alpaca, load_tokenizer(places["alpaca"])
    yield "merged", load_model(merged).to(device()), load_tokenizer(merged)
