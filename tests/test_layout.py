"""The shape of the code: imports go one way, the light parts stay light, files stay short."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from chinese_llama.config import load_yaml
from chinese_llama.resources import PACKAGE, shipped

RECIPES = shipped("recipes")
# Lowest first. A module imports from lower layers and from its own group, never from a neighbour.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("",),  # chinese_llama/__init__.py: the version
    ("errors", "resources", "progress", "terminal"),
    ("config", "directories", "hub"),
    ("artifacts",),
    ("workspace",),
    ("data", "merging.registry", "merging.delta"),
    ("vocab", "merging.adapter"),
    ("merging.lineage",),
    ("merging.plan",),
    ("model",),
    ("stages", "convert"),
    ("merging",),
    ("evaluate", "doctor"),
    ("train",),  # it measures while it trains, and merges what lies below a quantised base
    ("adapt", "quickstart", "recipes"),
    ("commandline",),
    ("cli_vocab", "cli_merge", "cli_measure", "cli_answers", "cli_doctor", "cli_adapt"),
    ("cli",),
    ("__main__",),
)
LEVEL = {group: level for level, groups in enumerate(LAYERS) for group in groups}
LIGHT = (
    "",
    "errors",
    "config",
    "directories",
    "artifacts",
    "workspace",
    "hub",
    "resources",
    "progress",
    "terminal",
    "merging.registry",
    "merging.adapter",
    "merging.lineage",
    "merging.plan",
)
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}


def modules() -> dict[str, Path]:
    """Dotted names of the package's modules and of the recipes, and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "shipped":
            found[".".join(["chinese_llama", *parts]).removesuffix(".__init__")] = path
    return found | {f"recipes.{path.stem}": path for path in RECIPES.glob("*.py")}


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module imports, inside functions too: our modules in full, others by their top name."""
    found = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{origin}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inner or {origin}
    return {item if item in MODULES else item.partition(".")[0] for item in found}


def group(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    inside = name.removeprefix("chinese_llama").removeprefix(".")
    return inside if inside in LEVEL else inside.partition(".")[0]


def closure(name: str) -> set[str]:
    """Everything that a module imports, directly or through our own modules."""
    seen, todo = set(), [name]
    while todo:
        for item in imports(todo.pop()) - seen:
            seen.add(item)
            todo += [item] if item in MODULES else []
    return seen


def test_the_walk_sees_lazy_imports() -> None:
    assert "chinese_llama.model.resize" in imports("chinese_llama.stages")
    assert "torch" in closure("chinese_llama.stages")
    assert "recipes.pt_lora" in MODULES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    own = group(name)
    assert own in LEVEL, f"{name} has no layer; give it one"
    for item in imports(name) & set(MODULES):
        other = group(item)
        assert other == own or LEVEL[other] < LEVEL[own], f"{name} imports {item}, which is not below it"


def test_siblings_do_not_import_each_other() -> None:
    siblings = {"evaluate", "doctor"}
    for name in MODULES:
        if group(name) in siblings:
            others = {
                item for item in imports(name) & set(MODULES) if group(item) in siblings - {group(name)}
            }
            assert not others, f"{name} imports its siblings {others}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if group(name) in LIGHT))
def test_light_modules_never_reach_torch(name: str) -> None:
    assert not closure(name) & HEAVY


@pytest.mark.parametrize("name", sorted(name for name in MODULES if group(name) == "vocab"))
def test_the_vocabulary_needs_no_torch(name: str) -> None:
    """Tokenizer work runs where no model library is wanted."""
    assert not closure(name) & HEAVY


def test_packages_start_empty() -> None:
    """Importing a part must not pull in its neighbours."""
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert imports(name) <= {"__future__", "os"}, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_is_longer_than_400_lines(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{MODULES[name]} has {lines} lines; split it"


def test_no_recipe_shadows_a_library() -> None:
    """`accelerate launch recipes/x.py` puts recipes/ first on sys.path."""
    names = {path.stem for path in RECIPES.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names
    for name in names:
        assert name not in sys.stdlib_module_names
        assert importlib.util.find_spec(name) is None, f"recipes/{name} shadows a library"


@pytest.mark.parametrize(
    "folder", [RECIPES / "configs", RECIPES / "launch", shipped("merge"), PACKAGE / "quickstart"]
)
def test_every_shipped_yaml_loads(folder: Path) -> None:
    files = sorted(folder.rglob("*.yaml"))
    assert files, f"{folder} ships no YAML"
    for file in files:
        assert load_yaml(file), f"{file} is empty"
