"""The estimated memory is what tensors really take: counted on models of every kind, and at the width of 7B."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import UserError
from chinese_llama.model.lean import lean
from chinese_llama.model.load import load_model
from chinese_llama.model.lora import add_lora, lora_config
from chinese_llama.model.rows import LOGITS
from chinese_llama.train.estimate import Settings, estimate, settings_of
from chinese_llama.train.fields import PROJECTIONS, PretrainingFields
from tests import tiny
from tests.test_layout import HEAVY, closure
from tests.train.counting import FIXED, Norm, Run, size_of

ROWS, NEW = 1000, 100
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
NF4 = {
    "quantization": "nf4",
    "dropout": True,
}  # without dropout PEFT casts on a CPU what it does not on a GPU
FLOAT32 = {"dtype": "float32", "half": False}
LAYER = {"rows": 64, "new_rows": 10}  # where the backward pass of a layer is the fullest moment
HEAD = {"rows": 8000, "new_rows": 1000, "block": 8}  # that of lm_head


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dropout keeps a byte for each number, that of the CPU a float; its norm what `Norm` keeps."""

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0] if p else x

    def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return Norm.apply(x, weight, epsilon)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", rms_norm)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    def run(rows: int = ROWS, tied: bool = False, optimizer: Any = torch.optim.AdamW, **values: Any) -> Run:
        shape = {name: values.pop(name) for name in list(values) if name.startswith("num_")}
        given = {"new_rows": NEW, "dropout": False, "batch": 2, "block": 64, "logits": 1 << 15, **values}
        chosen = Settings(**given)
        monkeypatch.setitem(LOGITS, "cpu", chosen.logits)
        place = tiny.write_llama(tmp_path / "base", rows, tied, **{**SHAPE, **shape})
        model = load_model(place, chosen.dtype, chosen.quantization)
        model.config.use_cache = False
        new = list(range(rows - chosen.new_rows, rows))
        targets, dropout = list(chosen.targets), 0.05 * chosen.dropout
        config = lora_config(
            model, chosen.rank, 8, dropout, targets, chosen.embeddings, new, use_dora=chosen.dora
        )
        model = lean(add_lora(model, config)).train()
        if chosen.checkpointing:
            model.gradient_checkpointing_enable()
        made = Run(model, chosen, None, packed(rows, chosen))
        made.optimizer = optimizer(made.trained)
        made.loss().backward()
        made.optimizer.step()
        return made

    yield run


def packed(rows: int, chosen: Settings) -> dict[str, torch.Tensor]:
    """Blocks of two documents each."""
    ids = torch.randint(0, rows, (chosen.batch, chosen.block), generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(chosen.block) % (chosen.block // 2)).repeat(chosen.batch, 1)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def told(run: Run) -> dict[str, int]:
    return estimate(run.model.config.to_dict(), run.settings).parts


def kept(parts: dict[str, int], run: Run) -> int:
    """Of an estimate, what is there after the forward pass; the gradient of lm_head's rows is."""
    rows = {"new-rows": run.settings.new_rows, "full": run.model.config.vocab_size, "frozen": 0}
    size = 4 * rows[run.settings.embeddings] * run.model.config.hidden_size
    return parts["activations"] + parts["copies of weights"] + size


CASES: list[dict[str, Any]] = [
    {},
    {"dropout": True},
    FLOAT32,
    {**FLOAT32, "dropout": True},
    {"dtype": "float32"},
    {"embeddings": "full"},
    {"embeddings": "full", **FLOAT32},
    {"embeddings": "frozen"},
    {"embeddings": "frozen", "dropout": True},
    {"tied": True},
    {"tied": True, "embeddings": "full"},
    {"targets": ("q_proj", "v_proj"), "dropout": True, "rank": 4},
    {"num_key_value_heads": 4, "batch": 1, "block": 512},
    NF4,
    {**NF4, "embeddings": "full"},
    {**NF4, "embeddings": "frozen"},
    {**NF4, "quantization": "int8"},
    {"dora": True},
    {"dora": True, "dropout": True},
    {"dora": True, **NF4},
    LAYER,
    {**LAYER, "dropout": True},
    {**LAYER, **FLOAT32},
    {**LAYER, **FLOAT32, "targets": ("o_proj",)},
    {**LAYER, **NF4},
    HEAD,
    {**HEAD, "embeddings": "full"},
    {**HEAD, "embeddings": "full", **FLOAT32},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_every_part_is_what_is_there(case: dict[str, Any], build: Callable[..., Run]) -> None:
    """Without gradient checkpointing and with it."""
    if "quantization" in case:
        pytest.importorskip("bitsandbytes")
    run = build(**case)
    for checkpointing in (False, True):
        run.settings = dataclasses.replace(run.settings, checkpointing=checkpointing)
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        parts = told(run)
        assert {part: parts[part] for part in FIXED} == run.fixed()
        after, peak = run.step()
        assert kept(parts, run) == pytest.approx(after, rel=0.05)
        assert sum(parts.values()) - sum(parts[part] for part in FIXED) == pytest.approx(peak, rel=0.15)


def test_of_some_layers_everything_is_kept(build: Callable[..., Run]) -> None:
    run = build(**LAYER, num_hidden_layers=5, every=3)
    run.settings = dataclasses.replace(run.settings, checkpointing=True)
    run.model.get_base_model().gradient_checkpointing_enable(every_n_layers=3)
    parts = told(run)
    after, peak = run.step()
    assert kept(parts, run) == pytest.approx(after, rel=0.05)
    assert sum(parts.values()) - sum(parts[part] for part in FIXED) == pytest.approx(peak, rel=0.15)


def test_as_many_logits_as_are_there() -> None:
    assert Settings().logits == LOGITS["cuda"]


def test_what_is_offloaded_is_not_there() -> None:
    own, offloaded = (parts_of(checkpointing=True, offload=value)["activations"] for value in (False, True))
    assert own - offloaded == SMALL["num_hidden_layers"] * 8 * 512 * 128 * 2


def test_a_quantized_weight_is_once_there_in_full(build: Callable[..., Run]) -> None:
    """With few tokens it is a large share, which is never left out."""
    pytest.importorskip("bitsandbytes")
    run = build(**LAYER, **NF4, block=8)
    parts = told(run)
    _, peak = run.step()
    assert peak < sum(parts.values()) - sum(parts[part] for part in FIXED) < 1.3 * peak


def test_each_moment_can_be_the_fullest(build: Callable[..., Run]) -> None:
    tied = {"rows": 8000, "tied": True, "embeddings": "full", "batch": 1, "block": 8}
    names = [tuple(told(build(**case))) for case in (LAYER, HEAD, tied)]
    assert ["one layer" in found for found in names] == [True, False, False]
    assert ["logits" in found for found in names] == [False, True, False]


@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_autograd_keeps_as_much(case: dict[str, Any], build: Callable[..., Run]) -> None:
    """The same by another count: what autograd itself is given to keep, and the gradients that the head makes ahead."""
    run = build(**case)
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss()
    counted = size_of(tensor for key, tensor in saved.items() if key not in own)
    assert loss.isfinite()
    ahead = size_of(
        tensor for tensor in loss.grad_fn.next_functions[0][0].gradients[:2] if tensor is not None
    )
    assert kept(told(run), run) == pytest.approx(counted + ahead, rel=0.1)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "paged_adamw_32bit", "sgd"])
def test_states_of_other_optimizers(name: str, build: Callable[..., Run]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
        "paged_adamw_32bit": bitsandbytes.optim.AdamW32bit,
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }
    run = build(optim=name, optimizer=made[name], rank=32)
    tables = {id(t): t for s in run.optimizer.state.values() for n, t in s.items() if "qmap" in n}
    counted = run.fixed()["optimizer"] - size_of(tables.values())  # two tables of a KiB for all tensors
    assert told(run)["optimizer"] == counted


@pytest.mark.parametrize("embeddings", ["new-rows", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_at_the_width_of_7b(embeddings: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of it, with tensors that have a shape but no numbers (no seed for dropout, so; it takes nothing)."""
    monkeypatch.setitem(LOGITS, "cpu", LOGITS["cuda"])
    from torch._subclasses import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    config = LlamaConfig(vocab_size=49_920, num_hidden_layers=2, use_cache=False, **wide)
    chosen = Settings(new_rows=17_920, embeddings=embeddings, checkpointing=checkpointing)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    new = list(range(32_000, 49_920))
    model = lean(add_lora(model, lora_config(model, 8, 32, 0.0, PROJECTIONS, embeddings, new))).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        trains = tensor.requires_grad
                        held[name] = torch.nn.Parameter(fake, trains) if held is module._parameters else fake
        ids = torch.zeros((chosen.batch, chosen.block), dtype=torch.long)
        mask = torch.ones((chosen.batch, 1, chosen.block, chosen.block), dtype=torch.bool)
        run = Run(model, chosen, None, {"input_ids": ids, "labels": ids, "attention_mask": mask})
        for parameter in run.trained:
            parameter.grad = torch.zeros_like(parameter)
        after, peak = run.step()
    parts = told(run)
    assert kept(parts, run) == pytest.approx(after, rel=0.02)
    assert sum(parts.values()) - sum(parts[part] for part in FIXED) == pytest.approx(peak, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_takes_as_much(checkpointing: bool, build: Callable[..., Run]) -> None:
    case = {"rows": 32_000, "new_rows": 8000, "batch": 8, "block": 512, "dropout": True}
    run = build(**case, checkpointing=checkpointing)
    run.model.cuda()
    run.batch = {name: tensor.cuda() for name, tensor in run.batch.items()}
    run.optimizer = torch.optim.AdamW(run.trained)
    run.model.zero_grad()
    run.loss().backward()
    run.optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    run.loss().backward()
    taken = torch.cuda.max_memory_allocated()
    assert sum(told(run).values()) == pytest.approx(taken, rel=0.15)


SMALL = {**SHAPE, "num_attention_heads": 4, "vocab_size": 1000}


def parts_of(**values: Any) -> dict[str, int]:
    return estimate(SMALL, Settings(new_rows=100, **values)).parts


def test_processes_share_what_is_divided() -> None:
    alone = parts_of()
    for sharding, divided in (("zero2", FIXED[2:]), ("zero3", FIXED), ("fsdp", FIXED)):
        shared = parts_of(sharding=sharding, processes=4)
        for part in FIXED:
            assert shared[part] == -(-alone[part] // (4 if part in divided else 1))
        assert ("gathered weights" in shared) == (sharding != "zero2")
    copies = parts_of(processes=4)
    assert copies["gradient buckets"] == copies["gradients"] == alone["gradients"]
    quantized = parts_of(quantization="nf4", sharding="fsdp", processes=4)
    assert quantized["frozen weights"] == parts_of(quantization="nf4")["frozen weights"]


def test_settings_come_from_a_recipe_and_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = PretrainingFields(lora_r=4, block_size=256, quantization="nf4", dtype="float16", use_dora=True)
    training = {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "optim": "sgd"}
    expected = Settings(
        dtype="float16", quantization="nf4", new_rows=7, rank=4, targets=tuple(PROJECTIONS), dora=True,
        batch=2, block=256, checkpointing=True, optim="sgd",
    )  # fmt: skip
    assert settings_of(fields, training, 7) == expected
    for name in ("activation", "gradient"):
        more = {f"{name}_checkpointing_kwargs": {"every_n_layers": 2, "offload": True}}
        found = settings_of(fields, {**training, **more}, 7)
        assert found == dataclasses.replace(expected, every=2, offload=True)
    fields = PretrainingFields(dtype="float32", lora_dropout=0.0)
    assert not settings_of(fields, training, 7).half
    assert settings_of(fields, {**training, "bf16": True}, 7).half
    assert not settings_of(fields, training, 7).dropout
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert dataclasses.replace(expected, processes=8).processes == settings_of(fields, training, 7).processes
    for variables, sharding in (
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({}, "none"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert settings_of(fields, training, 7).sharding == sharding


@given(
    batch=st.integers(1, 8),
    block=st.integers(1, 512),
    rank=st.integers(1, 64),
    quantization=st.sampled_from(["none", "nf4", "int8"]),
    embeddings=st.sampled_from(["new-rows", "full", "frozen"]),
    checkpointing=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_more_of_anything_takes_more(**values: Any) -> None:
    total = sum(parts_of(**values).values())
    for name in ("batch", "block", "rank"):
        assert sum(parts_of(**{**values, name: values[name] + 1}).values()) > total
    assert parts_of(**{**values, "checkpointing": True})["activations"] <= parts_of(**values)["activations"]
    assert parts_of(**{**values, "embeddings": "full"})["optimizer"] > parts_of(**values)["optimizer"] or (
        values["embeddings"] == "full"
    )


@pytest.mark.parametrize(("batch", "unit", "scale"), [(8, "MiB", 2**20), (800, "GiB", 2**30)])
def test_the_table_adds_up(batch: int, unit: str, scale: int) -> None:
    found = estimate(SMALL, Settings(batch=batch))
    lines = found.table().splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [*found.parts, "together"]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[-1].endswith(f" {found.total / scale:.2f} {unit}")


def test_another_kind_of_model_is_told() -> None:
    with pytest.raises(UserError, match="no 'intermediate_size'; memory is estimated for LLaMA's kind"):
        estimate({"hidden_size": 8}, Settings())


def test_the_arithmetic_needs_no_torch() -> None:
    assert not closure("chinese_llama.train.estimate") & HEAVY
