"""What is told before the first stage runs, so that no later one trips over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt import check, plan
from chinese_llama.errors import OutputExists, UserError
from chinese_llama.workspace import Workspace
from tests.adapt import spaces


@pytest.fixture
def whole(work: Path, base: Path, chinese_sp: Path) -> dict[str, Any]:
    return spaces.settings(work, base, chinese_sp)


def checked(folder: Path, values: dict[str, Any], **sections: Any) -> Workspace:
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **section} if merge else section
    space = spaces.write(folder, values)
    check.check(space, plan.stages_of(space))
    return space


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"control": {"lerning_rate": 1}}, "control: .*'lerning_rate'.*did you mean 'learning_rate'"),
        ({"control": {"embeddings": "ful"}}, "control: .*'ful' is none of"),
        ({"pt_lora": {"block_size": 4096}}, "4096 tokens is longer than the model's limit"),
        ({"sft_lora": {"template": "bele"}}, "template 'bele' is unknown.*'belle'"),
        ({"sft_lora": {"adapters": ["plsu"]}}, r"sft_lora\.adapters: No adapter 'plsu'.*'plus'"),
        ({"pt_lora": {"data": None}}, r"sft_lora\.adapters: The adapter 'plus' is not trained yet"),
        ({"merge": {"loras": ["plsu"]}}, r"merge\.loras: No adapter 'plsu'.*did you mean 'plus'"),
        ({"merge": {"loras": ["plus", "old=/no/where"]}}, r"merge\.loras: /no/where: no such directory"),
        ({"merge": {"loras": ["plus", "plus"]}}, r"merge\.loras: 'plus' is there twice"),
        ({"merge": {"loras": ["alpaca", "plus"]}}, r"plus is to be merged before what it makes"),
        ({"merge": {"loras": ["base=work/plus", "alpaca"]}}, "'base' is the name of another model"),
        ({"merge": {"output": "work/plus"}}, "pt_lora writes .*plus and merge .*plus; give each"),
        ({"eval": {"output": "."}}, "none in another"),
        ({"control": {"output_dir": "work/plus"}}, "control writes .*plus and pt_lora"),
        ({"eval": {"samples": -1}}, r"eval\.samples: -1 is less than 0"),
        ({"eval": {"max_new_tokens": 0}}, r"eval\.max_new_tokens: 0 is less than 1"),
        ({"eval": {"window": 4096}}, "eval: A window of 4,096 tokens is longer"),
        ({"eval": {"window": 64, "stride": 64}}, "eval: A stride of 64 does not fit"),
        ({"eval": {"max_regression": {"en": float("nan")}}}, "en: nan is no share"),
        ({"eval": {"max_regression": {"ex": 0.1}}}, "no text is named 'ex'"),
        ({"eval": {"text": None, "max_regression": {"en": 0.1}}}, "none is measured: add eval.text"),
        ({"launch": "ours.yaml"}, r"ours\.yaml, line \d: is not valid YAML"),
        ({"launch": "cpus.yaml"}, r"cpus\.yaml: MULTI_CPU starts one process .*cpu_2\.yaml"),
        ({"extend_model": {"init": "asymetric"}}, r"extend_model\.init: .*did you mean 'asymmetric'"),
        ({"extend_model": {"pad_to_multiple_of": 0}}, "must be at least 1"),
        ({"extend_vocab": {"policy": "strickt"}}, r"extend_vocab\.policy: .*did you mean 'strict'"),
        ({"extend_vocab": {"chinese_sp": "ours.yaml"}}, r"ours\.yaml: is not a SentencePiece model"),
        ({"extend_vocab": {"corpus": ["no.jsonl"]}}, r"no\.jsonl: no such file"),
        ({"pt_lora": {"lora": 1}, "control": {}}, "^pt_lora: 'lora' is no field"),
    ],
)
def test_a_setting_that_a_later_stage_refuses(
    tmp_path: Path, whole: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    (tmp_path / "ours.yaml").write_text("a: b\nc: [\n")
    (tmp_path / "cpus.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with pytest.raises(UserError, match=message):
        checked(tmp_path, whole, **sections)
    assert not (tmp_path / "work").exists()


def test_what_will_be_there_is_no_error(tmp_path: Path, whole: dict[str, Any], extended: Path) -> None:
    checked(tmp_path, whole, control={"block_size": 64, "learning_rate": 1e-4})
    checked(tmp_path, whole, merge={"loras": "plus, alpaca"})
    checked(tmp_path, whole, merge={"loras": ["plus=work/plus", "alpaca=work/alpaca"]})
    checked(tmp_path, whole, pt_lora={"eval_split": 0.2}, eval={"text": {}, "max_regression": {"en": 0.1}})
    space = checked(
        tmp_path,
        whole,
        control=None,
        pt_lora={"data": None},
        sft_lora={"adapters": []},
        merge={"loras": None},
        eval={"max_regression": {}},
    )
    assert space.settings.sft_lora["adapters"] == []


def test_an_output_that_is_not_ours_is_told_before_training(tmp_path: Path, whole: dict[str, Any]) -> None:
    place = tmp_path / "work" / "merged"
    place.mkdir(parents=True)
    checked(tmp_path, whole)
    (place / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputExists, match=r"merged, the output of merge, is there and no result"):
        checked(tmp_path, whole)
    (tmp_path / "work" / "report").write_text("a file")
    with pytest.raises(OutputExists, match=r"report, the output of eval, is there"):
        checked(tmp_path, whole, merge={"output": "work/other"})


def test_a_base_that_is_no_model(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="holds no model"):
        checked(tmp_path, whole, base=str(tmp_path))
