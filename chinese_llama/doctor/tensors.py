"""Files of weights: which cannot be read and why, and what one pass over the numbers of the others tells."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chinese_llama.doctor.finding import Finding, Severity, some
from chinese_llama.errors import BadFile
from chinese_llama.merging.registry import registry
from chinese_llama.model.shards import EMBED, HEAD, Block, InFiles, Named, Workers, block_of, blocks
from chinese_llama.model.tensors import TensorFile, open_tensors
from chinese_llama.progress import track

FP16 = 65504.0  # the largest number of float16
BLOCK = 1 << 20  # numbers that are looked at together
ALIKE = 0.01  # of its norm that a row is off another one which says the same; HF's mean_resizing: about 0.001
FEW = 16  # rows without meaning that a healthy vocabulary may have
SHARE = 0.05  # of the rows: more than any published vocabulary has that nobody trained
POINTER = re.compile(rb"version https://git-lfs[^\n]*\noid sha256:([0-9a-f]{64})\nsize (\d+)")
VOCABULARY = (EMBED, HEAD)
AGAIN = "Fetch the file again, and compare its size and sha256 with the source."


class Readable(InFiles):
    """The tensors of several files, as far as they can be read; `problems` tells what cannot. With an `index`
    (names to file names), only what it lists is there, `unlisted` (by file name) what else the files have, and
    `whole` is whether all of it is there. Has what `Named` wants."""

    def __init__(self, files: Iterable[Path], index: dict[str, str] | None = None) -> None:
        self.problems: list[Finding] = []
        self.unlisted: dict[str, list[str]] = {}
        self.files: dict[Path, TensorFile] = {}
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            try:
                self.files[file] = open_tensors(file)
            except (BadFile, OSError) as error:
                self.problems.append(unreadable(file, error))
                continue
            for name in self.files[file].keys():  # noqa: SIM118
                if index is None or index.get(name) == file.name:
                    self._file_of[name] = self.files[file]
                elif name not in index:
                    self.unlisted.setdefault(file.name, []).append(name)

        self.whole = not self.problems and (index or {}).keys() <= self._file_of.keys()


def unreadable(file: Path, error: Exception) -> Finding:
    """What a file of weights is that cannot be opened."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(1024)
    except OSError as problem:
        why = problem.strerror or str(problem)
        return Finding(
            "error",
            "file-not-readable",
            str(file),
            f"The file cannot be read ({why}).",
            [str(problem)],
            "Give yourself the right to read it, or copy it again.",
        )
    evidence = [f"{size:,} bytes, beginning with {head[:24]!r}"]
    if not size:
        return Finding("error", "file-empty", str(file), "The file of weights is empty.", evidence, AGAIN)
    if pointer := POINTER.match(head):
        known = registry().by_sha256(pointer[1].decode())
        name = f" ({known.name})" if known else ""
        evidence = [f"it points to {int(pointer[2]):,} bytes with sha256 {pointer[1].decode()}{name}"]
        return Finding(
            "error",
            "git-lfs-pointer",
            str(file),
            "The file is a git-lfs pointer, not the weights it stands for.",
            evidence,
            "Run `git lfs install` and `git lfs pull` in the repository, or download the file itself.",
        )
    if head.lstrip()[:1] in (b"<", b"{") and head.lstrip()[:1] != head[8:9]:
        return Finding(
            "error",
            "file-is-text",
            str(file),
            "The file is a web page or a message of a server, not weights.",
            evidence,
            "Download the file itself (on the hub: resolve/main instead of blob/main; log in where that is asked).",
        )
    if _cut_short(file, head, size):
        return Finding(
            "error",
            "file-truncated",
            str(file),
            "The file ends too early: the download or the copy was cut off.",
            evidence,
            AGAIN,
        )
    if "more than tensors" in str(error):
        return Finding(
            "error",
            "file-not-safe",
            str(file),
            "The file holds Python objects besides tensors and is not opened: loading them could execute anything.",
            evidence,
            "Have whoever made it save the tensors alone, as safetensors.",
        )
    return Finding(
        "error",
        "file-damaged",
        str(file),
        f"The file is no weights file: {_reason(error, file)}",
        evidence,
        AGAIN,
    )


def _reason(error: Exception, file: Path) -> str:
    """The words of an error without the path."""
    return str(error).removeprefix(f"{file}: ")


def _cut_short(file: Path, head: bytes, size: int) -> bool:
    if head[:2] == b"PK":
        return not zipfile.is_zipfile(file)
    length = int.from_bytes(head[:8], "little")
    if file.suffix != ".safetensors" or head[8:9] != b"{":
        return False
    if 8 + length > size:
        return True
    with open(file, "rb") as stream:
        ends = re.findall(rb'"data_offsets":\s*\[\s*\d+,\s*(\d+)\s*\]', stream.read(8 + length))
    return 8 + length + max(map(int, ends), default=0) > size


@dataclass
class Measured:
    """The numbers of one tensor: how many there are and how many are not finite, their bounds (of the finite
    ones); of a matrix of the vocabulary for each row its norm, and whether it is the row above, all but."""

    count: int = 0
    nans: int = 0
    infinities: int = 0
    low: float = torch.inf
    high: float = -torch.inf
    norms: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    alike: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @property
    def zero(self) -> bool:
        return bool(self.count) and self.low == self.high == 0 and not (self.nans or self.infinities)

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0

    def take(self, part: Measured) -> None:
        """Add what is known of the next rows."""
        self.count, self.nans = self.count + part.count, self.nans + part.nans
        self.infinities += part.infinities
        self.low, self.high = min(self.low, part.low), max(self.high, part.high)
        self.norms, self.alike = torch.cat([self.norms, part.norms]), torch.cat([self.alike, part.alike])


def measure(
    source: Named, names: Sequence[str], vocabulary: Sequence[str], what: str
) -> tuple[dict[str, Measured], list[Finding]]:
    """The numbers of the tensors `names` that hold fractions, read once, block by block, by several threads; of those
    in `vocabulary` the rows too. What cannot be read is told by findings."""
    names = [name for name in names if source.meta(name)[1].is_floating_point]
    todo = list(blocks(source, names, BLOCK))
    found = {name: Measured() for name in names}
    lost: dict[str, Finding] = {}

    def look(block: Block) -> tuple[str, Measured | Exception]:
        try:
            return block[0], _block(source, block, block[0] in vocabulary)
        except (OSError, BadFile, RuntimeError) as error:
            return block[0], error

    with Workers(0) as workers:
        for name, part in track(workers.each(look, todo), what, len(todo), "blocks"):
            if isinstance(part, Measured):
                found[name].take(part)
            else:
                lost[name] = Finding(
                    "error",
                    "file-not-readable",
                    name,
                    f"The tensor cannot be read: {part}",
                    [str(part)],
                    AGAIN,
                )
    return {name: one for name, one in found.items() if name not in lost}, list(lost.values())


def _block(source: Named, block: Block, rows: bool) -> Measured:
    tensor = block_of(source, block)
    if not tensor.numel():
        return Measured()
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    found = Measured(tensor.numel(), 0, 0, low, high)
    if not (abs(low) < torch.inf and abs(high) < torch.inf):  # a NaN is neither
        found.nans, found.infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        finite = tensor[tensor.isfinite()]
        found.low, found.high = (
            (float(finite.min()), float(finite.max())) if finite.numel() else (torch.inf, -torch.inf)
        )
    if rows and tensor.dim() == 2:
        name, start, _ = block
        matrix = tensor.float()
        found.norms = torch.linalg.vector_norm(matrix, dim=1)
        above = source.rows(name, start - 1, start).float() if start else torch.zeros_like(matrix[:1])
        off = torch.linalg.vector_norm(matrix - torch.cat([above, matrix[:-1]]), dim=1)
        found.alike = (off <= ALIKE * found.norms) & (found.norms > 0)
    return found


def check_numbers(found: dict[str, Measured], where: str, said: Any = None) -> Iterator[Finding]:
    """Numbers that are none, tensors of nothing but zeros, numbers that float16 does not hold. `said`: the dtype in
    config.json."""
    wrong = {name: one for name, one in found.items() if one.nans or one.infinities}
    if wrong:
        lines = [f"{n}: {o.nans:,} NaN, {o.infinities:,} inf of {o.count:,}" for n, o in wrong.items()]
        yield Finding(
            "error",
            "not-finite",
            where,
            f"{_tensors(wrong)} NaN or infinite values, and everything they touch becomes NaN.",
            some(lines),
            "Take an earlier checkpoint; train in bfloat16 or with a lower learning rate; merge in float32 (chinese-llama merge does).",
        )
    zero = [name for name, one in found.items() if one.zero and not name.endswith("bias")]
    if zero:
        grave = any(not re.search(r"\.(o_proj|down_proj)\.", name) for name in zero)  # new blocks begin so
        yield Finding(
            "error" if grave else "warning",
            "zero-tensors",
            where,
            f"{_tensors(zero)} nothing but zeros.",
            some(zero),
            "Such tensors are what ZeRO-3 leaves where a weight was not gathered: save again with stage3_gather_16bit_weights_on_model_save: true, or run zero_to_fp32.py of the checkpoint.",
        )
    large = {name: one for name, one in found.items() if one.largest > FP16}
    if large:
        lines = [f"{name}: up to {one.largest:,.6g}" for name, one in large.items()]
        grave = str(said).removeprefix("torch.") == "float16"
        what = f"{_tensors(large)} numbers that float16 does not hold (more than {FP16:,.0f})"
        remedy = "Use bfloat16 or float32: set dtype in config.json to bfloat16."
        yield Finding(
            "error" if grave else "note",
            "fp16-overflow",
            where,
            f"{what}{', and config.json says float16' if grave else ''}.",
            some(lines),
            remedy,
        )


def _tensors(names: Iterable[str]) -> str:
    count = len(list(names))
    return "One tensor holds" if count == 1 else f"{count:,} tensors hold"


def check_rows(
    found: dict[str, Measured], where: str, first_new: int | None = None, pieces: int | None = None
) -> Iterator[Finding]:
    """Rows of the vocabulary that mean nothing: zero, like their neighbours, or of another size than the old ones
    (those before `first_new`). Rows from `pieces` on only fill up."""
    for name, one in found.items():
        norms, alike = one.norms[:pieces], one.alike[:pieces]
        if not len(norms) or one.zero or one.nans or one.infinities:
            continue
        here = f"{where}: {name}"
        zero = (norms == 0).nonzero()[:, 0].tolist()
        if zero:
            yield Finding(
                _grave(zero, norms),
                "zero-rows",
                here,
                f"{len(zero):,} of {len(norms):,} rows of the vocabulary are zero.",
                [f"ids {_runs(zero)}"],
                "Initialise them from the old rows: chinese-llama extend-model.",
            )
        same = alike.nonzero()[:, 0].tolist()
        if len(same) > FEW:
            yield Finding(
                _grave(same, norms),
                "similar-rows",
                here,
                f"{len(same):,} of {len(norms):,} rows of the vocabulary are all but the same as the row above (as HF's mean_resizing leaves them): those tokens cannot be told apart.",
                [f"ids {_runs(same)}"],
                "Extend again with `chinese-llama extend-model`, or train those rows (embeddings: new-rows).",
            )
        yield from _sizes(norms, here, first_new)


def _grave(ids: list[int], norms: torch.Tensor) -> Severity:
    """A few rows that nobody trained are in many healthy models."""
    return "warning" if len(ids) > max(FEW, SHARE * len(norms)) else "note"


def _sizes(norms: torch.Tensor, where: str, first_new: int | None) -> Iterator[Finding]:
    if first_new is None:  # of the published sizes it is known
        known = registry().tokenizers
        chinese = [known[name].pieces for name in ("Chinese-LLaMA", "Chinese-Alpaca")]
        first_new = known["LLaMA"].pieces if len(norms) in chinese else 0
    if not 0 < first_new < len(norms):
        return
    old, new = (
        float(part[part > 0].median()) if (part > 0).any() else 0.0
        for part in (norms[:first_new], norms[first_new:])
    )
    if old and new and not 0.1 <= new / old <= 10:
        lines = [f"median norm of the rows from {first_new:,} on: {new:.3g}; of those before: {old:.3g}"]
        yield Finding(
            "warning",
            "row-norms",
            where,
            f"New rows are {new / old:.2g} times the size of old ones: their tokens drown out the others, or are never heard.",
            lines,
            "Initialise them again with `chinese-llama extend-model`, or lower the learning rate of the embeddings.",
        )


def _runs(ids: list[int]) -> str:
    """Ids in words.

    >>> _runs([3, 4, 5, 9])
    '3-5, 9'
    """
    runs: list[list[int]] = []
    for index in ids:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return ", ".join(words[:8]) + (f" ... ({len(words)} ranges)" if len(words) > 8 else "")


def check_shapes(source: Named, where: str) -> Iterator[Finding]:
    """Tensors without numbers."""
    empty = [f"{name}: {list(source.meta(name)[0])}" for name in source if 0 in source.meta(name)[0]]
    if empty:
        yield Finding(
            "error",
            "empty-tensors",
            where,
            f"{len(empty):,} tensors are empty, as ZeRO-3 leaves weights that were not gathered.",
            some(empty),
            "Save again with stage3_gather_16bit_weights_on_model_save: true, or run zero_to_fp32.py of the checkpoint and save from that.",
        )
