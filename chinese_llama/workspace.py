"""The workspace file `chinese-llama.yaml`: what a command line leaves out.

It is found in the current directory or above it. Each section is named after the command that it
speaks for; relative paths are relative to the file. A workspace needs `base`, a corpus and
instructions; everything else has a default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama.config import load_yaml, typed
from chinese_llama.errors import UserError
from chinese_llama.hub import is_hub_id

FILE = "chinese-llama.yaml"


@dataclass
class TrainVocab:
    corpus: Any = None  # a path or a list of paths
    vocab_size: int = 20_000
    model_type: str = "bpe"
    output: str = "work/chinese_sp"


@dataclass
class ExtendVocab:
    chinese_sp: str | None = None  # default: what train_vocab makes; else those that come along
    corpus: Any = None  # a path or a list of paths
    size: int | None = None
    min_count: int = 0
    policy: str = "strict"
    pad_token: str | None = None
    output: str = "work/tokenizer"


@dataclass
class ExtendModel:
    init: str = "asymmetric"
    pad_to_multiple_of: int = 1
    output: str = "work/extended"


@dataclass
class Merge:
    loras: Any = None  # a list, or "plus,alpaca"; default: those that the recipes make
    output: str = "work/merged"


@dataclass
class Eval:
    """`text`: {name: file}; default: what pt_lora's eval_split holds out. `prompts`: a file of questions, of which
    `samples` are shown; a field `keyword` holds the word of a right answer. `choices`: {ceval: directory}."""

    text: dict[str, str] = field(default_factory=dict)
    stride: int | None = None
    window: int | None = None
    prompts: str | None = None
    samples: int = 6
    max_new_tokens: int = 128
    choices: dict[str, str] = field(default_factory=dict)
    shots: int = 5
    wikitext: str | None = None
    speed: bool = True
    max_regression: dict[str, float] = field(default_factory=dict)
    output: str = "work/report"


@dataclass
class Settings:
    title: str | None = None
    base: str | None = None
    launch: str | None = None  # accelerate's configuration for the recipes that `adapt` starts
    train_vocab: TrainVocab = field(default_factory=TrainVocab)
    extend_vocab: ExtendVocab = field(default_factory=ExtendVocab)
    extend_model: ExtendModel = field(default_factory=ExtendModel)
    pt_lora: dict[str, Any] = field(default_factory=dict)
    sft_lora: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] | None = None  # pt_lora on the base as it was; fields that differ from pt_lora's
    merge: Merge = field(default_factory=Merge)
    eval: Eval = field(default_factory=Eval)
    adapters: dict[str, str] = field(default_factory=dict)


SECTIONS = ("train_vocab", "extend_vocab", "extend_model", "merge", "eval")  # whose settings are all ours


def _without_blanks(values: dict[str, Any]) -> dict[str, Any]:
    """Names that were left without a value mean the default."""
    return {name: value for name, value in values.items() if value is not None}


class Workspace:
    """A loaded workspace file. `settings` are as written; the methods give whole paths."""

    def __init__(self, file: Path, values: dict[str, Any] | None = None) -> None:
        self.file = file.absolute()
        values = load_yaml(file) if values is None else values
        values = _without_blanks(values)
        values |= {
            name: _without_blanks(values[name]) for name in SECTIONS if isinstance(values.get(name), dict)
        }
        self.settings: Settings = typed(Settings, values, str(file))
        pt, sft, section = self.settings.pt_lora, self.settings.sft_lora, self.settings.eval
        pt["output_dir"] = pt.get("output_dir") or "work/plus"
        sft["output_dir"] = sft.get("output_dir") or "work/alpaca"
        sft["adapters"] = self._list("sft_lora.adapters", sft.get("adapters", ["plus"]) or [])
        loras = self.settings.merge.loras
        if loras is None:
            loras = ["plus"] if pt.get("data") and not sft.get("data") else [*sft["adapters"], "alpaca"]
        self.settings.merge.loras = self._list("merge.loras", loras)
        for name, places in (
            ("pt_lora", {"output_dir": pt["output_dir"]}),
            ("sft_lora", {"output_dir": sft["output_dir"]}),
            ("control", {"output_dir": (self.settings.control or {}).get("output_dir") or ""}),
            ("eval.text", section.text),
            ("eval.choices", section.choices),
            ("adapters", self.settings.adapters),
        ):
            for key, place in places.items():
                if not isinstance(place, str):
                    raise UserError(f"{file}: {name}.{key}: {place!r} is no path.")

    def _list(self, where: str, value: Any) -> list[str]:
        """A list of adapters, or text with commas between them."""
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
            raise UserError(
                f"{self.file}: {where}: {value!r}: write a list of adapters, such as [plus, alpaca]."
            )
        return [item.strip() for item in items]

    @classmethod
    def empty(cls) -> Workspace:
        """Defaults only, for a command line that leaves nothing out."""
        return cls(Path(FILE), {})

    def path(self, value: str) -> Path:
        """`value` relative to the workspace file."""
        return self.file.parent / Path(value).expanduser()

    def shown(self, path: Path) -> str:
        """A path as it is told: relative to the workspace file where it lies below."""
        here = self.file.parent
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    def place(self, value: str) -> str:
        """Like `path`, but a hub id ("organisation/name" that is no path) stays as it is."""
        path = self.path(value)
        return value if is_hub_id(value) and not path.parent.exists() else str(path)

    def item(self, value: str) -> str:
        """An item of a list of adapters: a directory, also that in `name=directory`, made whole."""
        name, equals, place = str(value).partition("=")
        if equals:
            return f"{name}={self.place(place)}"
        return str(self.path(name)) if name not in self.adapters() and self.path(name).is_dir() else name

    def adapter_place(self, value: str) -> str:
        """The path where the adapter of such an item would lie, if it is one of this workspace's."""
        name, _, place = value.partition("=")
        return str(self.path(place or self.adapters().get(name, name)))

    def paths(self, value: Any) -> Any:
        """Whole paths in a path, a list of paths, or a list of {path, weight}."""
        if isinstance(value, list):
            return [self.paths(item) for item in value]
        if isinstance(value, dict):
            return {key: self.place(item) if key == "path" else item for key, item in value.items()}
        return self.place(str(value))

    def base(self) -> str:
        if not self.settings.base:
            raise UserError(f"{self.file} names no base: add `base: DIRECTORY` (the HF model to adapt).")
        return self.place(self.settings.base)

    def adapters(self) -> dict[str, str]:
        """Names of this workspace's adapters and where they lie: those that its recipes make, and
        those under `adapters:`."""
        made = {
            "plus": str(self.path(self.settings.pt_lora["output_dir"])),
            "alpaca": str(self.path(self.settings.sft_lora["output_dir"])),
        }
        return made | {name: self.place(value) for name, value in self.settings.adapters.items()}


def find(start: Path | None = None) -> Workspace | None:
    """The workspace of the nearest `chinese-llama.yaml` in or above `start` (default: here)."""
    start = (start or Path.cwd()).absolute()
    for directory in [start, *start.parents]:
        if (directory / FILE).is_file():
            return Workspace(directory / FILE)
    return None


def required(command: str, needs: str) -> Workspace:
    """The workspace, for a command whose options leave `needs` out. Raises UserError if none."""
    workspace = find()
    if workspace is None:
        raise UserError(
            f"{command}: there is no {FILE} in or above {Path.cwd()} to say what is left out; "
            f"give {needs}, or make a workspace with `chinese-llama init DIR`."
        )
    return workspace


TEMPLATE = """\
# Workspace of chinese-llama: what the commands below read where their options leave it out.
# Relative paths are relative to this file. `chinese-llama adapt` runs every stage that is missing or
# stale, in this order, and ends with a report (`--dry-run` shows the plan). One by one:
#
#   chinese-llama extend-vocab              your base's tokenizer with Chinese pieces added
#   chinese-llama extend-model              your base's weights with rows for them
#   accelerate launch recipes/pt_lora.py    continued pretraining  -> adapter "plus"
#   accelerate launch recipes/sft_lora.py   instruction tuning     -> adapter "alpaca"
#   chinese-llama merge --loras plus,alpaca plain HF weights
#   chinese-llama eval                      bits per character, base against result
#
# A step makes the ones before it that are still missing; a result that stands is kept.

base: {base}               # the HF model to adapt: a directory, or a hub id

extend_vocab:
  corpus: [{corpus}]       # .txt (a document a line), .jsonl, .json, .parquet; also .gz, .zst
  # size: 49920            # most pieces of the finished tokenizer; its report has the curve
  # chinese_sp: FILE       # another Chinese model than the 20,000 pieces that come along
  output: work/tokenizer

# train_vocab:             # `chinese-llama train-vocab`: a Chinese model of your own for extend-vocab
#   corpus: [{corpus}]
#   vocab_size: 20000

extend_model:
  output: work/extended

pt_lora:                   # fields of recipes/pt_lora.py, TrainingArguments included
  data:                    # weights are shares of the tokens; the English keeps the model's English
    - {{path: {corpus}, weight: 0.8}}
    {hash}- {{path: {replay}, weight: 0.2}}
  eval_split: 0.01         # of the documents, by hash: held out, and measured while training
  # max_regression: {{en: 0.02}}   # how much the bits per byte of a text may rise; on_regression: stop
  block_size: 512
  lora_r: 8
  lora_alpha: 32
  embeddings: new-rows
  learning_rate: 2e-4
  num_train_epochs: 1
  output_dir: work/plus

sft_lora:                  # fields of recipes/sft_lora.py
  data: {instructions}     # records with instruction, input (may be empty), output
  adapters: [plus]         # trained on base + plus
  template: chinese-alpaca
  max_seq_length: 512
  learning_rate: 1e-4
  num_train_epochs: 2
  output_dir: work/alpaca

merge:
  loras: [plus, alpaca]
  output: work/merged

# control: {{}}              # also: the same pretraining on the base without new pieces, to compare with

eval:                      # what `adapt` measures at the end, and `chinese-llama eval`
  # text: {{zh: held-out-zh.jsonl, en: held-out-en.jsonl}}     # default: what pt_lora's eval_split holds out
  # prompts: questions.txt                                   # answered by base and result, side by side
  # choices: {{ceval: data/ceval, cmmlu: data/cmmlu}}          # needs chinese-llama[eval]
  # max_regression: {{en: 0.02}}                               # exit code 1 if bits per byte rise by more
  output: work/report

# launch: recipes/launch/single_gpu.yaml     # accelerate's configuration for `adapt`

# adapters:                # more names for --loras
#   pro: path/to/adapter
"""


def template(base: str | None, corpus: str | None, replay: str | None, instructions: str | None) -> str:
    """The commented workspace file that `chinese-llama init` writes; None leaves a place to fill in."""
    places = {
        "base": base or "path/to/base",
        "corpus": corpus or "path/to/zh.jsonl",
        "replay": replay or "path/to/en.jsonl",
        "instructions": instructions or "path/to/instructions.jsonl",
    }
    return TEMPLATE.format(
        hash="" if replay else "# ", **{name: json.dumps(p, ensure_ascii=False) for name, p in places.items()}
    )
