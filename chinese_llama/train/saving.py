"""The finished adapter: tensors that moved, the tokenizer, the card, the log and its picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from chinese_llama.artifacts import Manifest, write_manifest
from chinese_llama.directories import new_directory, write_text
from chinese_llama.errors import UserError
from chinese_llama.model.lora import fingerprint, unmoved
from chinese_llama.model.resize import copy_tokenizer, save_chat_template
from chinese_llama.model.shards import read_json
from chinese_llama.train import page
from chinese_llama.train.fields import Recipe
from chinese_llama.train.log import LOG, read_log

START = "start.json"  # in the directory of a run: the fingerprint of what trains, before the first step


def remember_start(model: Any, directory: Path) -> None:
    """Write down what the trainable tensors were; a run that goes on keeps its own beginning."""
    file = directory / START
    if not file.is_file():
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        write_text(file, json.dumps(fingerprint(trained)) + "\n")


def check_trained(state: dict[str, torch.Tensor], directory: Path, steps: int, alone: int) -> None:
    """Raise UserError where a trained tensor is empty or not finite, or a whole group of them never moved
    in `steps` steps, the first `alone` of which were for rows only."""
    start = json.loads((directory / START).read_text(encoding="utf-8"))
    for name in start:
        if name not in state or state[name].numel() == 0:
            raise UserError(f"{name} is empty and cannot be saved; was it sharded and not gathered?")
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{name} is no longer finite; lower learning_rate, or train in float32.")
    still = unmoved(start, fingerprint((name, state[name]) for name in start))
    if steps < alone + 3:  # a warm-up starts at rate 0, and A has no gradient until B has moved
        still = [group for group in still if group != "lora_A"]
    if still:
        raise UserError(
            f"Nothing in {', '.join(still)} moved in {steps:,} steps; no adapter is saved. Is a learning rate zero, "
            "or the run too short?"
        )


def save(trainer: Any, recipe: Recipe[Any], manifest: Manifest, directory: Path) -> None:
    """Write the adapter of a finished run to its output directory; to be called by every process."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # of torch.compile
    if not trainer.is_world_process_zero():
        return
    fields, model = recipe.fields, trainer.accelerator.unwrap_model(trainer.model)
    check_trained(state, directory, trainer.state.global_step, fields.rows_only_steps)
    log = read_log(directory / LOG)
    with new_directory(Path(fields.output_dir), fields.force, manifest.places()) as partial:
        model.save_pretrained(str(partial), state_dict=state, save_embedding_layers=False)
        _in_order(partial / "adapter_config.json")
        copy_tokenizer(Path(fields.tokenizer), partial)
        if template := manifest.settings.get("chat_template"):
            save_chat_template(partial, template)
        manifest.vocab_size = model.get_base_model().config.vocab_size
        if log:
            shutil.copyfile(directory / LOG, partial / LOG)
            page.picture(log, partial / page.PICTURE)
        write_text(partial / page.PAGE, page.markdown(recipe, manifest, log))
        write_text(partial / "README.md", page.card(recipe, manifest, log))
        write_manifest(partial, manifest)


def _in_order(file: Path) -> None:
    """Sort target_modules in adapter_config.json: PEFT writes a set, in another order each time, and the same training
    would have another sha256."""
    config = read_json(file)
    if isinstance(found := config.get("target_modules"), list):
        config["target_modules"] = sorted(found)
    write_text(file, json.dumps(config, indent=2) + "\n")
