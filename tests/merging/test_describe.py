"""What `merge --dry-run` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from chinese_llama.merging.adapter import Step
from chinese_llama.merging.describe import Contents, Cost, describe, size
from chinese_llama.merging.plan import Plan
from tests.merging.making import loaded, make, published

COST = Cost(
    tensors=291,
    changed=226,
    parameters=6_738_415_616,
    rows_before=32000,
    rows=49954,
    dtype_before="float32",
    dtype="float16",
    bytes_read=26_953_662_464,
    bytes_written=13_770_997_760,
    flops=2.1e12,
    memory=1_300_000_000,
    seconds=64,
)
WHOLE = Contents(pairs=224, matrices=2, vocabulary=49953)


def test_the_table(tmp_path: Path) -> None:
    plus, mine = published(tmp_path, "chinese-llama-plus-7b"), loaded(make(tmp_path / "mine"))[0]
    mine.weight = 0.7
    plan = Plan([Step([plus]), Step([mine])], format="meta")
    told = describe(
        plan, Path("llama"), Path("out"), COST, [WHOLE, Contents(rows=1)], ["It is another base."]
    )
    assert told.splitlines() == [
        "base      llama  float32, 32,000 rows, 6,738,415,616 numbers",
        f"1         chinese-llama-plus-7b  {plus.path}",
        "          LoRA, r 1, alpha 2, weight 1: 224 LoRA pairs, 2 whole matrices (vocabulary of 49,953 rows)",
        f"2         mine  {mine.path}",
        "          LoRA, r 1, alpha 2, weight 0.7: 1 single row",
        "result    out  meta format, float16, 49,954 rows",
        "changes   226 of 291 tensors; the vocabulary grows from 32,000 to 49,954 rows",
        "cost      27.0 GB read, 13.8 GB written, 2.1 TFLOP; about 1.3 GB of memory and 64 seconds",
        "forced    It is another base.",
    ]


def test_a_step_that_combines(tmp_path: Path) -> None:
    adapters = loaded(make(tmp_path / "a", use_dora=True, use_rslora=True), make(tmp_path / "b"))
    for method, words in (
        ("linear", "linear:"),
        ("ties", "ties, density 0.5:"),
        ("dare_linear", "dare_linear, density 0.5, seed 3:"),
        ("dare_ties", "dare_ties, density 0.5, seed 3:"),
    ):
        plan = Plan([Step(adapters, method, 0.5, 3)])
        lines = describe(
            plan, Path("base"), None, COST, [Contents(), Contents(pairs=1, matrices=1)]
        ).splitlines()
        assert lines[1] == f"1         combined by {words}"
        assert lines[2].startswith("1.1       a ")
        assert lines[3].endswith("rsLoRA and DoRA, r 1, alpha 2, weight 1: nothing")
        assert lines[4].startswith("1.2       b ")
        assert lines[5].endswith("1 LoRA pair, 1 whole matrix")
        assert lines[6] == "result    (no output given)  hf format, float16, 49,954 rows"


def test_a_published_adapter_under_another_name_is_told(tmp_path: Path) -> None:
    adapter = published(tmp_path, "chinese-alpaca-7b")
    adapter.name = "mine"
    lines = describe(Plan([Step([adapter])]), Path("base"), None, COST, [WHOLE]).splitlines()
    assert lines[1].endswith("(published: chinese-alpaca-7b)")


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (2.5e6, "2.5 MB"),
        (3e9, "3.0 GB"),
        (1e12, "1.0 TB"),
    ],
)
def test_sizes(count: float, told: str) -> None:
    assert size(count) == told


@pytest.mark.parametrize(
    ("flops", "seconds", "told"),
    [
        (10, 0.2, "10 FLOP; about 1.3 GB of memory and a second"),
        (2e6, 119, "2.0 MFLOP; about 1.3 GB of memory and 119 seconds"),
        (3e9, 200, "3.0 GFLOP; about 1.3 GB of memory and 3.3 minutes"),
        (4e15, 2, "4.0 PFLOP; about 1.3 GB of memory and 2 seconds"),
    ],
)
def test_operations_and_times(tmp_path: Path, flops: float, seconds: float, told: str) -> None:
    cost = Cost(**{**vars(COST), "flops": flops, "seconds": seconds, "rows_before": 49954})
    (adapter,) = loaded(make(tmp_path / "a"))
    lines = describe(Plan([Step([adapter])]), Path("base"), None, cost, [Contents()]).splitlines()
    assert lines[-1].endswith(told)
    assert lines[-2].endswith("the vocabulary keeps its 49,954 rows")
