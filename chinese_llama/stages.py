"""The stages before training as a workspace runs them: each makes the ones before it if missing.

A result that stands (made from the same inputs with the same settings) is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chinese_llama.artifacts import Manifest, read_manifest
from chinese_llama.data.formats import as_paths
from chinese_llama.errors import UserError
from chinese_llama.hub import local
from chinese_llama.progress import say
from chinese_llama.workspace import Workspace

Options = dict[str, Any]


def trained_vocab(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `train-vocab` with the options `given`, the workspace's for the others."""
    from chinese_llama.vocab.train import train_vocab

    section = workspace.settings.train_vocab
    options = _options(workspace, section, ("vocab_size", "model_type"), given)
    if "corpus" not in given:
        if section.corpus is None:
            raise UserError(
                f"{workspace.file} names neither extend_vocab.chinese_sp (a Chinese SentencePiece model) "
                "nor train_vocab.corpus (text to train one on); add one."
            )
        options["corpus"] = as_paths(workspace.paths(section.corpus))
    announce("train-vocab", options, force)
    return options["output"], train_vocab(**options, force=force)


def extended_tokenizer(workspace: Workspace, given: Options, force: bool) -> tuple[Path, dict[str, Any]]:
    """Run `extend-vocab` likewise; return the directory and its report."""
    from chinese_llama.vocab.merge import extend_vocab
    from chinese_llama.vocab.train import MODEL

    section = workspace.settings.extend_vocab
    options = _options(workspace, section, ("policy", "pad_token"), given)
    if "base" not in given:
        options["base"] = Path(workspace.base())
    options["base"] = local(options["base"])
    if "chinese_sp" not in given:
        own = section.chinese_sp
        options["chinese_sp"] = (
            workspace.path(own) if own else trained_vocab(workspace, {}, force=False)[0] / MODEL
        )
    announce("extend-vocab", options, force)
    return options["output"], extend_vocab(**options, force=force)


def extended_model(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `extend-model` likewise."""
    from chinese_llama.model.resize import extend_model

    section = workspace.settings.extend_model
    options = _options(workspace, section, ("init", "pad_to_multiple_of"), given)
    if "base" not in given:
        options["base"] = Path(workspace.base())
    options["base"] = local(options["base"])
    if "tokenizer" not in given:
        options["tokenizer"] = extended_tokenizer(workspace, {}, force=False)[0]
    announce("extend-model", options, force)
    return options["output"], extend_model(**options, force=force)


def merged_model(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `merge` likewise; adapters are found by name (merging.plan.resolve)."""
    from chinese_llama.merging.plan import parse_list, resolve

    section = workspace.settings.merge
    options = _options(workspace, section, (), given)
    names = parse_list(options.pop("loras", None) or ",".join(section.loras))
    options["adapters"] = [resolve(name, workspace) for name in names]
    if "base" not in given:
        options["base"] = workspace.path(workspace.settings.extend_model.output)
        if not options["base"].is_dir():
            raise UserError(
                f"{options['base']} does not exist; make it with chinese-llama extend-model, or give --base."
            )
    options["base"] = local(options["base"])
    from chinese_llama.merging.stream import merge

    announce("merge", options, force)
    return options["output"], merge(**options, force=force)


def evaluation(workspace: Workspace, given: Options) -> tuple[list[str], dict[str, Path]]:
    """The models and the text sets of `eval`: by default the workspace's base and merged model."""
    if "text" in given:
        pairs = [item.partition("=") for item in given["text"]]
        for name, equals, file in pairs:
            if not (name and equals and file):
                raise UserError(f"--text {name}{equals}{file}: write NAME=FILE.")
        sets = {name: Path(file) for name, _, file in pairs}
    else:
        sets = {name: workspace.path(file) for name, file in workspace.settings.eval.text.items()}
        if not sets:
            raise UserError(f"{workspace.file} names no texts; add eval.text, or give --text NAME=FILE.")
    if "model" in given:
        return [given["model"]], sets
    merged = workspace.path(workspace.settings.merge.output)
    return [workspace.base(), *([str(merged)] if merged.is_dir() else [])], sets


def base_for_training(workspace: Workspace) -> Path:
    """The extended model of the workspace, made now if it is missing."""
    return extended_model(workspace, {}, force=False)[0]


def _options(workspace: Workspace, section: Any, names: tuple[str, ...], given: Options) -> Options:
    """`given`, and the workspace's values for the settings `names` and the output.

    An output that is the workspace's own is kept if it stands.
    """
    options = {name: getattr(section, name) for name in names}
    options |= {"output": workspace.path(section.output), "keep": "output" not in given}
    return {**options, **given}


def announce(command: str, options: Options, force: bool) -> None:
    """Say which result a stage makes, or that one is there that is kept if it fits."""
    output = options["output"]
    manifest = read_manifest(output) if output.is_dir() and options["keep"] and not force else None
    if manifest:
        say(f"{command}: {output} was made {manifest.created}; --force makes it again.")
    else:
        say(f"{command}: making {output}")
