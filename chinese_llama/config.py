"""Settings: YAML files, command-line fields, and the one order in which they are resolved.

Later wins: defaults of the dataclass, the YAML file (or the workspace's section), `--field value`.
The resolved settings are saved with every result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chinese_llama.errors import BadFile, UserError, nearest

T = TypeVar("T")


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `1e-4` is a float, `${name}` refers to another key.

    Raises BadFile where the file is missing, is not YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.strip() and not isinstance(yaml.safe_load(text), (dict, type(None))):
            raise BadFile(path, "must hold `name: value` lines.")
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except BadFile:
        raise
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise BadFile(
            path, f"${{...}} is a reference to another name: {what} (as text: \\${{...}})."
        ) from error
    except FileNotFoundError as error:
        raise BadFile(path, "no such file.") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror}).") from error
    except Exception as error:  # yaml and OmegaConf have no common base
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadFile(path, f"is not valid YAML ({what}).", mark.line + 1 if mark else None) from error
    if not isinstance(loaded, dict):
        raise BadFile(path, "must hold `name: value` lines.")
    return {str(key): value for key, value in loaded.items()}


def typed(cls: type[T], values: dict[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from `values`, types checked and numbers converted.

    Raises UserError, starting with `where`, for an unknown name or a value of the wrong type.
    """
    _check_names(cls, values, where)
    lists = {f.name for f in dataclasses.fields(cls) if str(f.type).startswith("list")}  # type: ignore[arg-type]
    values = {k: [v] if k in lists and not isinstance(v, list) else v for k, v in values.items()}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        name = getattr(error, "full_key", None) or _culprit(cls, values)
        raise UserError(f"{where}: {name}: {str(error).splitlines()[0].rstrip('.')}.") from error


def _check_names(cls: type, values: dict[str, Any], where: str) -> None:
    """Raise UserError for a name that `cls`, or a section in it, does not have."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: unknown setting {name!r}{nearest(str(name), hints)}.")
        section = dataclasses.is_dataclass(hints[name])
        mapping = section or dict in (get_origin(kind) for kind in (hints[name], *get_args(hints[name])))
        if mapping and not isinstance(value, (dict, type(None))):
            raise UserError(f"{where}: {name}: {value!r} is no section; it must hold `name: value` lines.")
        if section:
            _check_names(hints[name], value, f"{where}: {name}")  # type: ignore[arg-type]


def _culprit(cls: type, values: dict[str, Any]) -> str:
    """The name of the first value that does not fit on its own."""
    for name, value in values.items():
        try:
            OmegaConf.merge(OmegaConf.structured(cls), {name: value})
        except Exception:
            return name
    return "?"


def parse_fields(argv: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """(config file, fields) from `--config FILE --field value --list a b --flag --field=value`.

    Values are read as YAML, so lists and numbers look as they do in a file. Raises UserError for
    anything that is not a field.
    """
    fields: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            raise UserError(f"{word!r}: settings are given as --name value.")
        name, has_value, value = word[2:].partition("=")
        values = [value] if has_value else []
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        parsed = [parse_value(name, text) for text in values]
        fields[name.replace("-", "_")] = parsed if len(parsed) > 1 else (parsed or [True])[0]
    config = fields.pop("config", None)
    return (Path(str(config)) if config is not None else None), fields


def parse_value(name: str, text: str) -> Any:
    """The value that `text` is in YAML. Raises UserError naming the option `name`."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]  # type: ignore[index,call-overload]
    except Exception as error:  # yaml and OmegaConf have no common base
        raise UserError(f"--{name}: {text!r} is not a value.") from error
