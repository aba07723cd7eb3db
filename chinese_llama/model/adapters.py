"""The tensors of a LoRA adapter, sorted by the base weight that they change, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.delta import Factors, add_delta, scale_of
from chinese_llama.merging.plan import Adapter
from chinese_llama.model.shards import EMBED, HEAD, Change, Weights

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora-ga", "lora")  # init_lora_weights
PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
SAVED = re.compile(r"(.+?)(?:\.modules_to_save)?(?:\.default)?\.weight")


@dataclass
class Tensors:
    """What one adapter holds: LoRA pairs, whole matrices, single rows; by name of the base weight."""

    factors: dict[str, Factors] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)

    def vocabulary(self) -> int | None:
        """Rows of the vocabulary that the adapter needs or brings, None where it has none."""
        sizes = [len(matrix) for name, matrix in self.matrices.items() if name in (EMBED, HEAD)]
        sizes += [max(ids) + 1 for ids, _ in self.rows.values() if ids]
        return max(sizes) if sizes else None


def read_tensors(adapter: Adapter) -> Tensors:
    """The tensors of `adapter`, mapped from its file. Raises BadFile for what cannot be merged."""
    found = Tensors()
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.split("_")[0].lower() in CHANGES_BASE:
        raise BadFile(
            adapter.path / "adapter_config.json",
            f"the adapter was initialised with {init!r}, which changes the base; save it converted to plain "
            "LoRA (peft: path_initial_model_for_weight_conversion).",
        )
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _load(adapter.file).items():
        name = key.removeprefix(PREFIX)
        if tensor.numel() == 0:
            raise BadFile(adapter.file, f"the tensor {key} is empty; was it saved under ZeRO-3?")
        if not torch.isfinite(tensor).all():
            raise BadFile(adapter.file, f"the tensor {key} has values that are not finite.")
        if match := LORA.fullmatch(name):
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif match := TOKENS.fullmatch(name):
            found.rows[f"{match[1]}.weight"] = (_token_ids(adapter, match[1], key), tensor)
        elif "lora_" not in name and (match := SAVED.fullmatch(name)):
            found.matrices[f"{match[1]}.weight"] = tensor
        else:
            raise BadFile(adapter.file, f"the tensor {key} is of a kind that cannot be merged (DoRA, bias?).")
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise BadFile(adapter.file, f"{module} has only one half of its LoRA pair.")
        found.factors[f"{module}.weight"] = _factors(adapter, module, pair)
    if not (found.factors or found.matrices or found.rows):
        raise BadFile(adapter.file, "holds no tensors.")
    return found


def whole_rows(adapter: Adapter) -> int | None:
    """Rows of the vocabulary matrices that an adapter (of whatever kind) brings whole; None if it brings none."""
    found = []
    for key, tensor in _load(adapter.file).items():
        match = SAVED.fullmatch(key.removeprefix(PREFIX))
        if match and f"{match[1]}.weight" in (EMBED, HEAD):
            found.append(len(tensor))
    return max(found, default=None)


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with safe_open(str(file), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors, zip and pickle errors have no common base
        raise BadFile(file, f"is damaged or not a weights file ({error}).") from error


def _token_ids(adapter: Adapter, module: str, key: str) -> list[int]:
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        names = [name for name in indices if module == name or module.endswith(f".{name}")]
        indices = indices[names[0]] if names else None
    if not indices:
        raise BadFile(adapter.path / "adapter_config.json", f"does not say which token ids {key} is for.")
    return [int(index) for index in indices]


def _factors(adapter: Adapter, module: str, pair: dict[str, torch.Tensor]) -> Factors:
    config = adapter.config
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if tuple(pair["A"].shape[:1]) != (rank,) or tuple(pair["B"].shape[1:]) != (rank,):
        shapes = f"{tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}"
        raise BadFile(
            adapter.file, f"{module}: LoRA shapes {shapes} are not of rank {rank} (adapter_config.json)."
        )
    scale = scale_of(alpha, rank, bool(config.get("use_rslora")))
    return Factors(pair["A"], pair["B"], scale, bool(config.get("fan_in_fan_out")))


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def merged_changes(source: Weights, adapters: Sequence[tuple[Adapter, Tensors]]) -> dict[str, Change]:
    """The weights of `source` that the adapters change, merged in their order.

    Raises DoesNotFit where a tensor has no place in the base or another shape, or the vocabulary
    shrinks along the list.
    """
    rows = source.meta(EMBED)[0][0]
    for adapter, tensors in adapters:
        rows = _check_vocabulary(adapter, tensors, rows)
    for adapter, tensors in adapters:
        for name in [*tensors.factors, *tensors.matrices, *tensors.rows]:
            _check_place(source, adapter, tensors, name)
    touched = {name for _, t in adapters for name in [*t.factors, *t.matrices, *t.rows]}
    if rows > source.meta(EMBED)[0][0]:
        touched |= {name for name in (EMBED, HEAD) if name in source}
    touched = {name for name in touched if name in source}
    return {name: _change(source, adapters, name, rows) for name in sorted(touched)}


def _check_vocabulary(adapter: Adapter, tensors: Tensors, rows: int) -> int:
    wanted = tensors.vocabulary()
    if wanted is None:
        return rows
    has_matrix = any(name in tensors.matrices for name in (EMBED, HEAD))
    if has_matrix and wanted < rows:
        raise DoesNotFit(
            f"The adapter {adapter.name!r} has {wanted:,} embedding rows, what lies below it {rows:,}: a "
            "vocabulary never shrinks; check the base and the order of --loras."
        )
    return max(wanted, rows)


def _check_place(source: Weights, adapter: Adapter, tensors: Tensors, name: str) -> None:
    if name == HEAD and HEAD not in source and source.config().get("tie_word_embeddings"):
        _check_tied(source, adapter, tensors)
        return  # the embeddings' own tensor holds these rows
    if name not in source:
        raise DoesNotFit(
            f"The adapter {adapter.name!r} changes {name}, which {source.directory} does not have."
        )
    shape = source.meta(name)[0]
    if name in tensors.factors:
        pair = tensors.factors[name]
        delta = (pair.b.shape[0], pair.a.shape[1])
        if (delta[::-1] if pair.transposed else delta) != shape:
            raise DoesNotFit(f"The adapter {adapter.name!r} has {delta} for {name}, the base {shape}.")
    if name in tensors.matrices and name not in (EMBED, HEAD) and tensors.matrices[name].shape != shape:
        raise DoesNotFit(f"The adapter {adapter.name!r} has another shape for {name} than the base.")
    for hidden in [m.shape[1] for n, m in tensors.matrices.items() if n == name and m.dim() == 2]:
        if hidden != shape[1]:
            raise DoesNotFit(
                f"The adapter {adapter.name!r} has {hidden} columns in {name}, the base {shape[1]}."
            )
    if name in tensors.rows:
        ids, values = tensors.rows[name]
        if values.shape != (len(ids), shape[1]):
            raise DoesNotFit(f"The adapter {adapter.name!r}: the rows for {name} do not fit the base.")


def _check_tied(source: Weights, adapter: Adapter, tensors: Tensors) -> None:
    """On a tied base an adapter's output rows must be its input rows."""
    whole = [tensors.matrices.get(name) for name in (EMBED, HEAD)]
    rows = [tensors.rows.get(name, ([], None)) for name in (EMBED, HEAD)]
    same_ids = rows[1][1] is None or rows[0][0] == rows[1][0]
    for inputs, outputs in (whole, [values for _, values in rows]):
        differs = outputs is not None and (inputs is None or not torch.equal(inputs, outputs))
        if differs or not same_ids or HEAD in tensors.factors:
            raise DoesNotFit(
                f"The adapter {adapter.name!r} has an lm_head of its own, but {source.directory} ties it to "
                "the embeddings."
            )


def _change(source: Weights, adapters: Sequence[tuple[Adapter, Tensors]], name: str, rows: int) -> Change:
    shape, dtype = source.meta(name)
    if name in (EMBED, HEAD):
        shape = (rows, *shape[1:])
    parts = [tensors for _, tensors in adapters]
    _check_owned(source, adapters, name, rows)
    return Change(shape, dtype, lambda: _merge_one(source.load, parts, name, shape, dtype))


def _check_owned(source: Weights, adapters: Sequence[tuple[Adapter, Tensors]], name: str, rows: int) -> None:
    """Every row that the base does not have must come from an adapter."""
    have = source.meta(name)[0][0]
    if name not in (EMBED, HEAD) or rows == have:
        return
    parts = [tensors for _, tensors in adapters]
    last = _last_matrix(parts, name)
    owned = torch.zeros(rows, dtype=torch.bool)
    owned[: len(parts[last].matrices[name]) if last >= 0 else have] = True
    for part in parts[max(last, 0) :]:
        if name in part.rows:
            owned[part.rows[name][0]] = True
    if not owned.all():
        missing = int((~owned).sum())
        raise DoesNotFit(
            f"{name} must grow to {rows:,} rows, but no adapter has {missing:,} of them; merge into the "
            "extended base (chinese-llama extend-model) that the adapters were trained on."
        )


def _merge_one(
    load: Callable[[str], torch.Tensor],
    parts: Sequence[Tensors],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """One weight with everything that `parts` say of it, in their order: a matrix replaces what lies
    below, deltas are added in float32, rows hold final values. Rounded once, to `dtype`."""
    last = _last_matrix(parts, name)
    weight = parts[last].matrices[name] if last >= 0 else load(name)
    above = [part for part in parts[max(last, 0) :] if name in part.factors or name in part.rows]
    if weight.shape == shape and not above:
        return weight.to(dtype)
    total = torch.zeros(shape, dtype=torch.float32)
    total[: len(weight)] = weight
    for part in above:
        if name in part.factors:
            add_delta(total, part.factors[name])
        if name in part.rows:
            ids, values = part.rows[name]
            total[ids] = values.float()
    return total.to(dtype)


def _last_matrix(parts: Sequence[Tensors], name: str) -> int:
    """The last of `parts` that brings a whole matrix `name`; -1 if none does."""
    return max((i for i, part in enumerate(parts) if name in part.matrices), default=-1)


def bake(model: Any, adapters: Sequence[tuple[Adapter, Tensors]]) -> None:
    """Merge adapters into a loaded model in place, as `merge` does with files."""
    state = model.state_dict()
    parts = [tensors for _, tensors in adapters]
    names = {name for part in parts for name in [*part.factors, *part.matrices, *part.rows]}
    with torch.no_grad():
        for name in sorted(names & set(state)):
            here = state[name]
            merged = _merge_one(lambda key: state[key].cpu(), parts, name, tuple(here.shape), here.dtype)
            here.copy_(merged)
