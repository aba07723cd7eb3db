"""The stages up to training as a workspace runs them: each makes the ones before it if missing.

A result that stands (made from the same inputs with the same settings) is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import Manifest
from chinese_llama.data.formats import as_paths
from chinese_llama.errors import BadFile, UserError
from chinese_llama.hub import local
from chinese_llama.progress import say
from chinese_llama.workspace import Workspace

Options = dict[str, Any]
SECTIONS = {
    "trained_vocab": "train_vocab",
    "extended_tokenizer": "extend_vocab",
    "extended_model": "extend_model",
}


def trained_vocab(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `train-vocab` with the options `given`, the workspace's for the others."""
    from chinese_llama.vocab.train import train_vocab

    section = workspace.settings.train_vocab
    options = options_of(workspace, section, ("vocab_size", "model_type"), given)
    if "corpus" not in given:
        corpus = section.corpus or workspace.settings.extend_vocab.corpus
        if corpus is None:
            raise UserError(
                f"{workspace.file} names no corpus (train_vocab.corpus); add it or give --corpus."
            )
        options["corpus"] = as_paths(workspace.paths(corpus))
    return options["output"], train_vocab(**options, force=force)


def extended_tokenizer(workspace: Workspace, given: Options, force: bool) -> tuple[Path, dict[str, Any]]:
    """Run `extend-vocab` likewise; return the directory and its report."""
    from chinese_llama.vocab.bases import open_base
    from chinese_llama.vocab.merge import SHIPPED, extend_vocab
    from chinese_llama.vocab.train import MODEL

    section = workspace.settings.extend_vocab
    options = options_of(workspace, section, ("policy", "pad_token", "size", "min_count"), given)
    if "base" not in given:
        options["base"] = Path(workspace.base())
    options["base"] = local(options["base"])
    if given.get("policy") == "reference":  # it takes every piece, whatever the workspace says
        options |= {name: given.get(name, default) for name, default in (("size", None), ("min_count", 0))}
    elif "corpus" not in given and section.corpus is not None:
        options["corpus"] = as_paths(workspace.paths(section.corpus))
    if "chinese_sp" not in given:  # the workspace's, or trained in it, or those that come along
        own, trained = section.chinese_sp, workspace.settings.train_vocab
        wanted = trained.corpus is not None or workspace.path(trained.output).is_dir()
        if wanted and not own:
            open_base(options["base"])  # complain about the base before anything is made for it
            options["chinese_sp"] = first(trained_vocab, workspace) / MODEL
        else:
            options["chinese_sp"] = workspace.path(own) if own and own not in SHIPPED else own
    return options["output"], extend_vocab(**options, force=force)


def extended_model(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `extend-model` likewise."""
    from chinese_llama.model.resize import extend_model

    section = workspace.settings.extend_model
    options = options_of(workspace, section, ("init", "pad_to_multiple_of"), given)
    if "base" not in given:
        options["base"] = Path(workspace.base())
    options["base"] = local(options["base"])
    if not options["base"].is_dir():
        raise BadFile(options["base"], "is not a model directory.")
    corpus = workspace.settings.extend_vocab.corpus
    if options["init"] == "distill" and "corpus" not in given and corpus is not None:
        options["corpus"] = as_paths(workspace.paths(corpus))
    if "tokenizer" not in given:
        options["tokenizer"] = first(extended_tokenizer, workspace)
    return options["output"], extend_model(**options, force=force)


def base_for_training(workspace: Workspace) -> Path:
    """The extended model of the workspace, made now if it is missing."""
    return first(extended_model, workspace)


def first(stage: Callable[..., tuple[Path, Any]], workspace: Workspace) -> Path:
    """The output of a stage that another one needs: made now if it is missing, and said so; one that
    was made from the same inputs is taken as it is."""
    output = workspace.path(getattr(workspace.settings, SECTIONS[stage.__name__]).output)
    if not output.is_dir():
        say(f"{output} is missing; making it first.")
    return stage(workspace, {"keep": "inputs"}, False)[0]


def options_of(workspace: Workspace, section: Any, names: tuple[str, ...], given: Options) -> Options:
    """`given`, and the workspace's values for the settings `names` and the output.

    An output that is the workspace's own is kept if it stands.
    """
    options = {name: getattr(section, name) for name in names}
    options |= {"output": workspace.path(section.output), "keep": "output" not in given}
    return {**options, **given}
