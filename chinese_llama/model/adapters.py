"""The tensors of a LoRA adapter, sorted by the base weight that they change. They are read when needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from chinese_llama.errors import BadFile
from chinese_llama.merging.delta import Factors, scale_of
from chinese_llama.merging.plan import Adapter, check_mergeable
from chinese_llama.model.shards import EMBED, HEAD
from chinese_llama.model.tensors import Meta, TensorFile, open_tensors

PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
BEFORE = re.compile(
    r"\.original_module\."
)  # what was there before training; PEFT saves it too where rows were grown
TRAINING = re.compile(
    r"\.lora_(velora|monteclora)_"
)  # kinds of LoRA that differ in how they are trained only
SAVED = re.compile(
    r"(.+?)(?:\.modules_to_save)?(?:\.default)?(?:\.token_adapter)?(?:\.base_layer)?\.(weight|bias)"
)


@dataclass
class Pair:
    """The keys of a LoRA pair, and what it is multiplied with. An embedding's halves are stored as
    [r, rows] and [columns, r], a linear layer's as [r, in] and [out, r]."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    embedding: bool = False


@dataclass(eq=False)
class Tensors:
    """What one adapter holds: LoRA pairs, whole matrices, single rows (their token ids); by name of the
    base weight, as keys of its file. `transposed`: the pairs are of weights stored as [in, out] (PEFT's
    fan_in_fan_out)."""

    adapter: Adapter
    file: TensorFile
    pairs: dict[str, Pair] = field(default_factory=dict)
    matrices: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    transposed: bool = False

    def names(self) -> list[str]:
        """The base weights that it changes."""
        return list(dict.fromkeys([*self.pairs, *self.matrices, *self.rows]))

    def keys_of(self, name: str) -> list[str]:
        """The keys of its file that have to do with a base weight."""
        pair = self.pairs.get(name)
        found = [pair.a, pair.b, pair.magnitude] if pair else []
        found += [self.matrices.get(name), self.rows[name][1] if name in self.rows else None]
        return [key for key in found if key]

    def delta_shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of what the pair for `name` adds, the transposition left aside."""
        pair = self.pairs[name]
        (first, _), (second, _) = self.file.meta(pair.b), self.file.meta(pair.a)
        return (second[1], first[0]) if pair.embedding else (first[0], second[1])

    def factors(self, name: str, weight: float = 1.0) -> Factors:
        """The pair for `name`, in float32; its scale, times `weight`, in the right factor."""
        pair = self.pairs[name]
        left, right = self.file.load(pair.b).float(), self.file.load(pair.a).float()
        if pair.embedding or self.transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        magnitude = self.file.load(pair.magnitude).float().flatten() if pair.magnitude else None
        return Factors(left, right * (pair.scale * weight), magnitude)

    def matrix(self, name: str) -> Meta:
        """(shape, dtype) of the whole matrix that it brings for `name`."""
        return self.file.meta(self.matrices[name])

    def vocabulary(self) -> int | None:
        """Rows of the vocabulary that the adapter needs or brings, None where it has none."""
        sizes = [self.matrix(name)[0][0] for name in (EMBED, HEAD) if name in self.matrices]
        sizes += [max(ids) + 1 for name, (ids, _) in self.rows.items() if ids and name in (EMBED, HEAD)]
        return max(sizes) if sizes else None


def read_tensors(adapter: Adapter) -> Tensors:
    """What `adapter` holds, by the headers of its file. Raises BadFile for what cannot be merged."""
    found = Tensors(adapter, open_tensors(adapter.file))
    check_mergeable(adapter)
    halves: dict[str, dict[str, str]] = {}
    for key in found.file.keys():  # noqa: SIM118
        sort_tensor(found, key, halves)
    for module, half in halves.items():
        pair_of(found, module, half)
    if not (found.pairs or found.matrices or found.rows):
        raise BadFile(adapter.file, "holds no tensors.")
    return found


def sort_tensor(found: Tensors, key: str, halves: dict[str, dict[str, str]]) -> None:
    """Put one tensor of the file where it belongs."""
    name = key.removeprefix(PREFIX)
    if TRAINING.search(name) or BEFORE.search(name):
        return
    if 0 in found.file.meta(key)[0]:
        raise BadFile(found.file.file, f"the tensor {key} is empty; was it saved under ZeRO-3?")
    if match := LORA.fullmatch(name):
        halves.setdefault(match[1], {})[(match[2] or "") + match[3]] = key
    elif match := MAGNITUDE.fullmatch(name):
        halves.setdefault(match[1], {})["magnitude"] = key
    elif match := TOKENS.fullmatch(name):
        found.rows[f"{match[1]}.weight"] = (_token_ids(found.adapter, match[1], key), key)
    elif "lora_" not in name and (match := SAVED.fullmatch(name)):
        found.matrices[f"{match[1]}.{match[2]}"] = key
    else:
        raise BadFile(found.file.file, f"the tensor {key} is of a kind that cannot be merged.")


def pair_of(found: Tensors, module: str, half: dict[str, str]) -> None:
    file, config = found.file, found.adapter.config
    embedding = "embedding_A" in half or "embedding_B" in half
    a, b = (half.get(("embedding_" if embedding else "") + side) for side in "AB")
    if a is None or b is None:
        raise BadFile(file.file, f"{module} has only one half of its LoRA pair.")
    if embedding and "magnitude" in half:
        raise BadFile(file.file, f"{module}: DoRA on embeddings cannot be merged.")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    shapes = file.meta(a)[0], file.meta(b)[0]
    if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != (rank, rank):
        raise BadFile(
            file.file,
            f"{module}: LoRA shapes {shapes[0]} and {shapes[1]} are not of rank {rank} (adapter_config.json).",
        )
    magnitude = file.meta(half["magnitude"])[0] if "magnitude" in half else None
    if bool(config.get("use_dora")) != (magnitude is not None):
        said = "says use_dora" if magnitude is None else "does not say use_dora"
        raise BadFile(
            file.file,
            f"{module} has {'no' if magnitude is None else 'a'} magnitude, and adapter_config.json {said}.",
        )
    if magnitude is not None and torch.Size(magnitude).numel() != shapes[1][0]:
        raise BadFile(
            file.file, f"{module} has {torch.Size(magnitude).numel()} magnitudes for {shapes[1][0]} rows."
        )
    scale = scale_of(alpha, rank, bool(config.get("use_rslora")))
    found.pairs[f"{module}.weight"] = Pair(a, b, scale, half.get("magnitude"), embedding)


def _token_ids(adapter: Adapter, module: str, key: str) -> list[int]:
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        names = [name for name in indices if module == name or module.endswith(f".{name}")]
        indices = indices[names[0]] if names else None
    if not indices:
        raise BadFile(adapter.path / "adapter_config.json", f"does not say which token ids {key} is for.")
    return [int(index) for index in indices]


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def whole_rows(adapter: Adapter) -> int | None:
    """Rows of the vocabulary matrices that an adapter (of whatever kind) brings whole; None if it brings none."""
    file = open_tensors(adapter.file)
    found = []
    for key in file.keys():  # noqa: SIM118
        match = SAVED.fullmatch(key.removeprefix(PREFIX))
        if match and f"{match[1]}.weight" in (EMBED, HEAD):
            found.append(file.meta(key)[0][0])
    return max(found, default=None)
