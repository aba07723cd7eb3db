"""merge as a command line and a workspace ask for it: what holds over what, and what it will cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.convert.convert import to_hf
from chinese_llama.errors import DoesNotFit, UserError
from chinese_llama.merging.cost import cost
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stage import described, merged_model, planned
from chinese_llama.merging.stream import Options, Work, merge
from chinese_llama.model.shards import EMBED, Weights
from chinese_llama.model.tensors import nbytes
from chinese_llama.workspace import FILE, Workspace
from tests import tiny
from tests.convert.checkpoints import checkpoint
from tests.merging import making
from tests.merging.test_stream import ALL, KINDS
from tests.model.test_adapters import peft_adapter
from tests.test_errors import tree


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def space(here: Path) -> Workspace:
    """A workspace with its extended model and both adapters, of which only what is read without torch is there."""
    making.write_base(here / "work" / "extended")
    making.make(here / "work" / "plus", tag=1)
    making.make(here / "work" / "alpaca", tag=2)
    making.make(here / "others" / "pro", tag=3)
    (here / FILE).write_text("base: x\nadapters: {pro: others/pro}\n")
    return Workspace(here / FILE)


def names(given: dict[str, Any], space: Workspace | None) -> list[tuple[str, float]]:
    return [(adapter.name, adapter.weight) for adapter in planned(space, given)[0].adapters]


# --- what holds over what


def test_a_workspace_says_everything(space: Workspace, here: Path) -> None:
    plan, base, output, keep = planned(space, {})
    assert [(a.name, a.weight) for a in plan.adapters] == [("plus", 1.0), ("alpaca", 1.0)]
    assert (base, output, keep) == (here / "work/extended", here / "work/merged", True)
    assert (plan.dtype, plan.format) == (None, None)


def test_what_is_given_holds_over_the_workspace(space: Workspace, here: Path) -> None:
    assert names({"loras": "pro"}, space) == [("pro", 1.0)]
    assert names({"weights": "0.5,2"}, space) == [("plus", 0.5), ("alpaca", 2.0)]
    assert names({"loras": "plus,mine=others/pro", "weights": "1,-1"}, space) == [
        ("plus", 1.0),
        ("mine", -1.0),
    ]
    making.write_base(here / "other")
    _, base, output, keep = planned(space, {"base": "other", "output": Path("out")})
    assert (base, output, keep) == (Path("other"), Path("out"), False)


def write_plan(file: Path, **content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def test_what_is_given_holds_over_the_plan_and_the_plan_over_the_workspace(
    space: Workspace, here: Path
) -> None:
    """Paths of the plan are relative to it, those that are given to where one is."""
    making.write_base(here / "plans" / "base")
    making.write_base(here / "own")
    content = {"base": "base", "output": "../made", "dtype": "float16", "format": "meta"}
    file = write_plan(here / "plans" / "p.yaml", adapters=["../others/pro", "plus"], **content)
    plan, base, output, keep = planned(space, {"plan": "plans/p.yaml"})
    assert [adapter.name for adapter in plan.adapters] == ["pro", "plus"]
    assert [place.resolve() for place in (base, output)] == [here / "plans" / "base", here / "made"]
    assert (plan.dtype, plan.format, keep) == ("float16", "meta", False)
    given = {"base": "own", "output": Path("out"), "dtype": "float32", "format": "hf", "resume": True}
    plan, base, output, _ = planned(space, {"plan": str(file), **given})
    assert (base, output, plan.dtype, plan.format) == (Path("own"), Path("out"), "float32", "hf")
    write_plan(file, adapters=["plus"])
    _, base, output, keep = planned(space, {"plan": str(file)})
    assert (base, output, keep) == (here / "work/extended", here / "work/merged", True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"plan": "p", "loras": "plus"}, "--plan says which adapters and weights; leave out --loras and"),
        ({"plan": "p", "weights": "1"}, "--plan says which adapters and weights; leave out --loras and"),
        ({"plan": "wieghted"}, r"--plan wieghted: no such file \(did you mean 'weighted'\?\)"),
        (
            {"dtype": "float61"},
            r"--dtype 'float61' \(did you mean 'float16'\?\); one of float32, float16, bf",
        ),
        ({"format": "mata"}, r"--format 'mata' \(did you mean 'meta'\?\); one of hf, meta"),
        ({"format": "meta", "resume": True}, "--resume is for --format hf: .*; leave it out"),
        ({"weights": "1"}, r"--weights has 1 numbers for 2 adapters \(plus, alpaca\)"),
        ({"base": "./nope"}, r"nope: no such directory \(--base\)"),
        ({"loras": "plsu"}, r"No adapter 'plsu' \(did you mean 'plus'\?\)"),
    ],
)
def test_what_makes_no_sense_is_said(space: Workspace, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        planned(space, given)


def test_resume_is_refused_where_the_plan_says_meta(space: Workspace, here: Path) -> None:
    file = write_plan(here / "p.yaml", adapters=["plus"], format="meta")
    with pytest.raises(UserError, match="--resume is for --format hf"):
        planned(space, {"plan": str(file), "resume": True})
    assert planned(space, {"plan": str(file), "resume": False})[0].format == "meta"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "--base and --loras and --output"),
        ({"loras": "a"}, "--base and --output"),
        ({"base": "b", "loras": "a"}, "--output"),
        ({"plan": "p.yaml", "base": "b"}, "--output"),
        ({"plan": "p.yaml", "output": Path("o")}, "--base"),
    ],
)
def test_without_a_workspace_what_is_missing_is_named(
    here: Path, given: dict[str, Any], missing: str
) -> None:
    making.write_base(here / "b")
    making.make(here / "a")
    write_plan(here / "p.yaml", adapters=["a"])
    with pytest.raises(
        UserError, match=rf"merge: there is no {FILE} .*; give {missing}, or make a workspace"
    ):
        planned(None, given)


def test_without_a_workspace_everything_can_be_given(here: Path) -> None:
    making.write_base(here / "b")
    making.make(here / "a")
    write_plan(here / "p.yaml", adapters=["a"], base="b", output="o")
    for given in ({"base": "b", "loras": "a", "output": Path("o")}, {"plan": "p.yaml"}):
        plan, base, output, keep = planned(None, given)
        assert ([a.name for a in plan.adapters], base, output, keep) == (["a"], Path("b"), Path("o"), False)


def test_a_workspace_without_its_extended_model_says_so(space: Workspace, here: Path) -> None:
    shutil.rmtree(here / "work" / "extended")
    with pytest.raises(UserError, match="extended does not exist; make it with chinese-llama extend-model"):
        planned(space, {})


# --- what it costs


def steps(*places: Path) -> list[Step]:
    return [Step([load(place.name, place)]) for place in places]


def written(output: Path) -> int:
    weights = Weights(output)
    return sum(nbytes(*weights.meta(name)) for name in weights)


# hidden 32, feed-forward 64, 4 heads of 8, 2 groups, 2 layers, 420 rows: (out, in) of each weight
SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)} | {
    "gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)
}  # fmt: skip
BASE_NUMBERS = 2 * (sum(out * into for out, into in SHAPES.values()) + 2 * 32) + 2 * 420 * 32 + 32


def flops(targets: list[str], rank: int) -> int:
    """A multiplication and an addition for each number of B @ A and each rank, in both layers."""
    return 2 * sum(2 * SHAPES[name][0] * SHAPES[name][1] * rank for name in targets)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_figures_are_those_of_the_result(base: Path, tmp_path: Path, dtype: str | None) -> None:
    first = peft_adapter(base, tmp_path / "first", target_modules=ALL)
    second = peft_adapter(base, tmp_path / "second", seed=2, r=2, target_modules=["q_proj", "up_proj"])
    work = Work(base, steps(first, second), Options(dtype=dtype))
    total, contents = cost(work)
    size = sum((place / "adapter_model.safetensors").stat().st_size for place in (first, second))
    assert (total.tensors, total.parameters) == (21, BASE_NUMBERS)
    assert total.flops == flops(ALL, 4) + flops(["q_proj", "up_proj"], 2)
    assert (total.rows_before, total.rows) == (420, 420)
    assert (total.dtype_before, total.dtype) == ("float32", dtype or "float32")
    assert total.bytes_read == 4 * BASE_NUMBERS + size
    assert total.bytes_written == (2 if dtype else 4) * BASE_NUMBERS
    assert [(held.pairs, held.matrices, held.rows, held.vocabulary) for held in contents] == [
        (14, 0, 0, None), (4, 0, 0, None)
    ]  # fmt: skip
    assert total.seconds > 0
    assert total.memory > 50e6  # Python alone has that
    manifest = merge(base, work.steps, tmp_path / "out", Options(dtype=dtype))
    assert total.changed == manifest.metrics["changed_tensors"] == (21 if dtype else 14)
    assert total.tensors == manifest.metrics["tensors"]
    assert total.bytes_written == written(tmp_path / "out")


def test_the_figures_of_a_vocabulary_that_grows(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "a", 430, **KINDS["full"])
    work = Work(
        shutil.copytree(base, tmp_path / "b", ignore=shutil.ignore_patterns("tok*")), steps(place), Options()
    )
    total, (held,) = cost(work)
    assert (total.rows_before, total.rows) == (420, 430)
    assert (held.matrices, held.vocabulary) == (2, 430)
    assert total.changed == 4 + 2
    assert total.bytes_written == 4 * (BASE_NUMBERS + 2 * 10 * 32)
    merge(work.base, work.steps, tmp_path / "out", Options(verify=False))
    assert total.bytes_written == written(tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_figures_of_adapters_that_are_combined(base: Path, tmp_path: Path, method: str) -> None:
    """Whole weights are held then, three and three more for each adapter."""
    places = [
        peft_adapter(base, tmp_path / f"{seed}", seed=seed, target_modules=["q_proj"]) for seed in (1, 2)
    ]
    together = Step([load(place.name, place) for place in places], method, 0.5)
    combined, one = (
        Work(base, [step], Options(workers=1)) for step in (together, Step(together.adapters[:1]))
    )
    total, alone = cost(combined)[0], cost(one)[0]
    assert (total.changed, total.flops) == (2, 2 * alone.flops)
    assert total.flops == 2 * flops(["q_proj"], 4)
    more = 4 * 32 * 32 * (3 * 2 + 3) if method == "ties" else 0
    assert 0 <= total.memory - alone.memory - more <= 1 << 20  # what the process has may have grown
    merge(base, [together], tmp_path / "out", Options(verify=False))
    assert total.bytes_written == written(tmp_path / "out") == 4 * BASE_NUMBERS


def test_the_figures_of_single_rows(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "a", **KINDS["rows"])
    total, (held,) = cost(Work(base, steps(place), Options()))
    assert (held.pairs, held.rows, total.changed) == (4, 4, 6)
    assert total.flops == flops(["q_proj", "v_proj"], 4)


def test_described_writes_nothing(base: Path, here: Path, tmp_path: Path) -> None:
    peft_adapter(base, here / "a")
    before = tree(here)
    told = described(
        None, {"base": str(base), "loras": "a", "output": Path("out"), "dtype": "bfloat16"}, False
    )
    assert tree(here) == before
    lines = told.splitlines()
    assert lines[0] == f"base      {base}  float32, 420 rows, {BASE_NUMBERS:,} numbers"
    assert lines[1:3] == ["1         a  a", " " * 10 + "LoRA, r 4, alpha 8, weight 1: 4 LoRA pairs"]
    assert lines[3] == "result    out  hf format, bfloat16, 420 rows"
    assert lines[4] == "changes   21 of 21 tensors; the vocabulary keeps its 420 rows"
    assert f"{2 * BASE_NUMBERS / 1e3:.1f} kB written" in lines[5]


def test_described_refuses_what_merge_would(base: Path, here: Path) -> None:
    place = peft_adapter(base, here / "a", target_modules=["q_proj"])
    bad = tiny.write_llama(here / "wide", 420, hidden_size=64)
    with pytest.raises(DoesNotFit, match=r"the base \(64, 64\)"):
        described(None, {"base": str(bad), "loras": str(place), "output": Path("out")}, False)


# --- bases and adapters of other forms


def test_a_checkpoint_of_metas_is_a_base(here: Path) -> None:
    """Its tokenizer lies one directory above, as Meta lays them out."""
    base = checkpoint(here / "llama" / "7B", 2, vocab=420)
    tiny.write_model(here / "llama" / "tokenizer.model", tiny.base_tokenizer())
    to_hf(base, here / "hf")
    peft_adapter(here / "hf", here / "a", target_modules=ALL)
    for source in ("llama/7B", "hf"):
        given = {"base": source, "loras": "a", "output": Path(f"out-{source[:2]}")}
        assert merged_model(None, given, False)[1].vocab_size == 420
    one, other = Weights(here / "out-ll"), Weights(here / "out-hf")
    assert set(one) == set(other)
    assert all(torch.equal(one.load(name), other.load(name)) for name in one)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (here / "out-ll" / name).read_bytes() == (here / "out-hf" / name).read_bytes(), name
    assert one.meta(EMBED)[1] == torch.float16


def test_old_files_of_base_and_adapter_are_read(base: Path, here: Path) -> None:
    """pytorch_model-*.bin with an index, adapter_model.bin: the same bits come out as of safetensors."""
    peft_adapter(base, here / "a")
    source = Weights(base)
    old = shutil.copytree(base, here / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    names, shards = list(source), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    weight_map = {name: shards[index % 2] for index, name in enumerate(names)}
    for shard in shards:
        torch.save({n: source.load(n) for n in names if weight_map[n] == shard}, old / shard)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (here / "b").mkdir()
    shutil.copy(here / "a" / "adapter_config.json", here / "b")
    torch.save(load_file(here / "a" / "adapter_model.safetensors"), here / "b" / "adapter_model.bin")
    merged_model(None, {"base": str(base), "loras": "a", "output": Path("new")}, False)
    merged_model(None, {"base": "old", "loras": "b", "output": Path("out")}, False)
    made = sorted(file.name for file in (here / "out").glob("*.safetensors"))
    assert made == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert not list((here / "out").glob("*.bin*"))
    one, other = Weights(here / "new"), Weights(here / "out")
    assert set(one) == set(other) == set(names)
    assert all(torch.equal(one.load(name), other.load(name)) for name in names)


@pytest.mark.parametrize("kind", ["tied", "buffers"])
def test_what_metas_form_has_otherwise_is_verified_all_the_same(here: Path, kind: str) -> None:
    """A head that is a copy of the embeddings; buffers that old conversions of LLaMA have, and Meta's form not."""
    base = tiny.write_base(here / "base", tiny.base_tokenizer(), tied=kind == "tied")
    if kind == "buffers":
        held = load_file(base / "model.safetensors")
        held |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    peft_adapter(base, here / "a", target_modules=ALL)
    given = {"base": "base", "loras": "a", "output": Path("out"), "format": "meta"}
    manifest = merged_model(None, given, False)[1]
    assert manifest.metrics["verified"]["logits"]["difference"] < 1e-3
    assert manifest.metrics["verified"]["logits"]["same_next_token"] == 16
    merged_model(None, {"base": "base", "loras": "a", "output": Path("hf")}, False)
    to_hf(here / "out", here / "back")
    one, other = Weights(here / "back"), Weights(here / "hf")
    for name in one:
        assert torch.equal(one.load(name), other.load(name if name in other else EMBED)), name


def test_what_metas_form_cannot_say_comes_back(base: Path, here: Path) -> None:
    """The longest text and the special ids, as convert keeps them."""
    peft_adapter(base, here / "a")
    merged_model(None, {"base": str(base), "loras": "a", "output": Path("meta"), "format": "meta"}, False)
    merged_model(None, {"base": str(base), "loras": "a", "output": Path("hf")}, False)
    to_hf(here / "meta", here / "back")
    found, wanted = (json.loads((here / place / "config.json").read_text()) for place in ("back", "hf"))
    for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert found.get(name) == wanted.get(name), name
