"""merge and convert through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chinese_llama.artifacts import Manifest, input_record, read_manifest, write_manifest
from chinese_llama.directories import MANIFEST
from chinese_llama.model.shards import Weights
from chinese_llama.workspace import FILE
from tests import test_errors, tiny
from tests.convert.checkpoints import assert_same, assert_same_checkpoint, checkpoint
from tests.merging.test_stream import ALL
from tests.model.test_adapters import peft_adapter
from tests.test_errors import sentence, tree

Run = test_errors.Run
run = test_errors.run  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


def recorded(place: Path, base: Path, *below: Path) -> Path:
    """An adapter with the manifest that the recipes write."""
    inputs = {"base": input_record(base)} | {f"parent:{i}": input_record(p) for i, p in enumerate(below)}
    write_manifest(place, Manifest("adapter", "pt_lora", inputs))
    return place


@pytest.fixture(scope="module")
def plus(extended: Path, folder: Path) -> Path:
    return recorded(peft_adapter(extended, folder / "plus", target_modules=ALL), extended)


@pytest.fixture(scope="module")
def alpaca(extended: Path, plus: Path, folder: Path) -> Path:
    return recorded(peft_adapter(extended, folder / "alpaca", seed=2, target_modules=ALL), extended, plus)


@pytest.fixture(scope="module")
def beside(extended: Path, folder: Path) -> Path:
    """Trained on the bare base, as plus was: the two can be combined."""
    return recorded(peft_adapter(extended, folder / "beside", seed=3, target_modules=ALL), extended)


def tensors(place: Path) -> dict[str, torch.Tensor]:
    weights = Weights(place)
    return {name: weights.load(name) for name in weights}


def bytes_of(place: Path) -> int:
    return sum(tensor.nbytes for tensor in tensors(place).values())


def manifest_of(place: Path) -> Manifest:
    found = read_manifest(place)
    assert found is not None
    return found


# --- merge


def test_merge_tells_what_it_did_and_records_it(run: Run, extended: Path, plus: Path, alpaca: Path) -> None:
    argv = [
        "merge",
        "--base",
        extended,
        "--loras",
        f"{plus},{alpaca}",
        "--weights",
        "1,0.7",
        "--output",
        "out",
    ]
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    rows = Weights(extended).config()["vocab_size"]
    assert first == f"out: plus + alpaca merged into {extended}; 14 of 21 tensors changed, {rows:,} rows."
    assert second.startswith("Verified: 21 tensors")
    found = manifest_of(Path("out"))
    assert (found.kind, found.command, found.vocab_size) == ("model", "merge", rows)
    wanted = {
        "loras": ["plus", "alpaca"],
        "weights": [1.0, 0.7],
        "combined": [],
        "dtype": None,
        "format": "hf",
    }
    assert found.settings == wanted
    verified = found.metrics.pop("verified")
    assert verified["tensors"] == 21
    assert verified["logits"]["difference"] < 1e-3 and verified["logits"]["same_next_token"] == 16
    base_size = manifest_of(extended).metrics["base_vocab_size"]
    assert found.metrics == {"rows": rows, "changed_tensors": 14, "tensors": 21, "base_vocab_size": base_size}
    assert "weight 0.7" in Path("out/README.md").read_text()


def test_what_is_not_verified_is_told(run: Run, extended: Path, plus: Path) -> None:
    argv = ["merge", "--base", extended, "--loras", plus, "--output", "out", "--no-verify", "--resume"]
    code, out, err = run(*argv)
    assert (code, err, out.splitlines()[1]) == (0, "", "Not verified.")
    assert "verified" not in manifest_of(Path("out")).metrics
    assert {path.name for path in Path().iterdir()} == {"out"}


def test_a_plan_that_combines(run: Run, extended: Path, plus: Path, beside: Path, tmp_path: Path) -> None:
    """Shown without writing anything, then followed; what it showed is what comes out."""
    both = {"combine": "dare_ties", "density": 0.5, "seed": 3, "adapters": [str(plus), str(beside)]}
    plan = {"base": str(extended), "adapters": [both], "output": "made", "dtype": "float16"}
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "p.yaml").write_text(json.dumps(plan))
    before = tree(tmp_path)
    code, out, err = run("merge", "--plan", "plans/p.yaml", "--dry-run")
    assert (code, err, tree(tmp_path)) == (0, "", before)
    assert "1         combined by dare_ties, density 0.5, seed 3:" in out
    assert f"1.2       beside  {beside}" in out
    assert run("merge", "--plan", "plans/p.yaml")[0] == 0
    made = tmp_path / "plans" / "made"
    assert f"{bytes_of(made) / 1e3:.1f} kB written" in out
    assert "changes   21 of 21 tensors" in out
    found = manifest_of(made)
    assert found.metrics["changed_tensors"] == 21
    assert found.settings["combined"] == [
        {"method": "dare_ties", "density": 0.5, "seed": 3, "loras": ["plus", "beside"]}
    ]
    assert (found.settings["dtype"], found.settings["weights"]) == ("float16", [1.0, 1.0])
    assert {tensor.dtype for tensor in tensors(made).values()} == {torch.float16}
    assert run("merge", "--plan", "plans/p.yaml", "--output", "again")[0] == 0
    assert_same([tensors(tmp_path / "again")], [tensors(made)])


def test_a_dry_run_needs_no_room_for_the_output(run: Run, extended: Path, plus: Path, tmp_path: Path) -> None:
    """Nor does it mind one that is there: it only tells."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    before = tree(tmp_path)
    code, out, _ = run("merge", "--base", extended, "--loras", plus, "--output", "out", "--dry-run")
    assert (code, tree(tmp_path)) == (0, before)
    assert "result    out  hf format, float32" in out


def test_a_wrong_order_is_refused_and_merged_by_force(
    run: Run, extended: Path, plus: Path, alpaca: Path, tmp_path: Path
) -> None:
    argv = ["merge", "--base", extended, "--loras", f"{alpaca},{plus}", "--output", "out"]
    told = sentence(run(*argv))
    assert "--loras plus,alpaca; --force merges it all the same." in told
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*argv, "--force", "--dry-run")
    shown = [line for line in out.splitlines() if line.startswith("forced")]
    assert (code, len(shown)) == (0, 2)
    code, _, err = run(*argv, "--force")
    assert code == 0
    forced = manifest_of(tmp_path / "out").metrics["forced"]
    assert err.splitlines() == [f"Merged all the same (--force): {one}" for one in forced]
    assert len(forced) == 2
    assert forced[0] in told.replace("; --force merges it all the same.", ".")
    right = ["merge", "--base", extended, "--loras", f"{plus},{alpaca}", "--output", "right", "--no-verify"]
    assert run(*right)[0] == 0
    for name, tensor in tensors(tmp_path / "right").items():  # the sum is still the sum
        torch.testing.assert_close(tensors(tmp_path / "out")[name], tensor)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dtype", "float61"], "--dtype 'float61' (did you mean 'float16'?); one of float32,"),
        (["--format", "mata"], "--format 'mata' (did you mean 'meta'?); one of hf, meta."),
        (["--weights", "1,2"], "--weights has 2 numbers for 1 adapters"),
        (["--plan", "pro"], "--plan says which adapters and weights; leave out --loras and --weights."),
        (["--format", "meta", "--resume"], "--resume is for --format hf"),
    ],
)
def test_options_that_make_no_sense(
    run: Run, extended: Path, plus: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    argv = ["merge", "--base", extended, "--loras", plus, "--output", "out", *options]
    assert sentence(run(*argv)).startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_an_output(run: Run, extended: Path, plus: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(json.dumps({"adapters": [str(plus)], "base": str(extended)}))
    assert "give --output" in sentence(run("merge", "--plan", "p.yaml"))
    (tmp_path / "p.yaml").write_text(json.dumps({"adapters": [str(plus)], "output": "out"}))
    assert "give --base" in sentence(run("merge", "--plan", "p.yaml"))


# --- the workspace


@pytest.fixture
def space(extended: Path, plus: Path, alpaca: Path, tmp_path: Path) -> Path:
    """A workspace in which everything is made but the merged model."""
    for source in (extended, plus, alpaca):
        shutil.copytree(source, tmp_path / "work" / source.name)
    (tmp_path / FILE).write_text("base: x\n")
    return tmp_path


def test_merge_alone_merges_the_workspaces_and_keeps_what_stands(run: Run, space: Path) -> None:
    code, out, _ = run("merge")
    assert code == 0
    merged = space / "work" / "merged"
    assert out.startswith(f"{merged}: plus + alpaca merged into {space / 'work' / 'extended'}; 14 of 21")
    record = json.loads((merged / MANIFEST).read_text())
    (merged / MANIFEST).write_text(json.dumps({**record, "created": "2024-01-01T00:00:00Z"}))
    before = tree(space)
    code, again, err = run("merge")
    assert (code, again, tree(space)) == (0, out, before)
    assert (
        err == f"{merged} stands: made 2024-01-01T00:00:00Z from the same inputs; --force makes it again.\n"
    )
    assert "was made with weights [1.0, 1.0], and [1.0, 0.5]" in sentence(run("merge", "--weights", "1,0.5"))
    assert "work/alpaca) too; give another output" in sentence(run("merge", "--loras", "plus"))
    assert tree(space) == before
    assert run("merge", "--weights", "1,0.5", "--force")[0] == 0
    assert manifest_of(merged).settings["weights"] == [1.0, 0.5]


def test_an_output_of_ones_own_is_not_kept(run: Run, space: Path) -> None:
    argv = ["merge", "--loras", "plus", "--output", "out"]
    assert run(*argv)[0] == 0
    assert "out exists; --force replaces it" in sentence(run(*argv))
    assert not (space / "work" / "merged").exists()


# --- Meta's form


def test_merge_writes_metas_form(run: Run, extended: Path, plus: Path, tmp_path: Path) -> None:
    argv = ["merge", "--base", extended, "--loras", plus]
    assert run(*argv, "--output", "hf")[0] == 0
    code, out, _ = run(*argv, "--output", "meta", "--format", "meta")
    assert (code, out.splitlines()[1].split(":")[0]) == (0, "Verified")
    names = {"consolidated.00.pth", "params.json", "tokenizer.model", "README.md", MANIFEST}
    assert names <= {path.name for path in (tmp_path / "meta").iterdir()}
    assert not list((tmp_path / "meta").glob("*.safetensors"))
    assert manifest_of(tmp_path / "meta").settings["format"] == "meta"
    assert set(manifest_of(tmp_path / "meta").files) == {"consolidated.00.pth"}
    assert run("convert", "--from", "meta", "--to", "hf", "meta", "--output", "back")[0] == 0
    assert_same([tensors(tmp_path / "back")], [tensors(tmp_path / "hf")])
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_metas_checkpoint_is_a_base(run: Run, tmp_path: Path) -> None:
    """And what is merged from it has its layout again."""
    checkpoint(tmp_path / "llama", 2, vocab=420, custom="kept")
    tiny.write_model(tmp_path / "llama" / "tokenizer.model", tiny.base_tokenizer())
    assert run("convert", "--to", "hf", "llama", "--output", "hf")[0] == 0
    peft_adapter(tmp_path / "hf", tmp_path / "a", target_modules=ALL)
    for base in ("llama", "hf"):
        argv = ["merge", "--base", base, "--loras", "a", "--format", "meta", "--output", f"from-{base}"]
        code, out, _ = run(*argv)
        assert code == 0
        assert f"a merged into {tmp_path / base}; 14 of 21 tensors changed, 420 rows." in out
        assert len(list((tmp_path / f"from-{base}").glob("consolidated.*.pth"))) == 2
        assert json.loads((tmp_path / f"from-{base}" / "params.json").read_text())["custom"] == "kept"
    assert_same_checkpoint(tmp_path / "from-llama", tmp_path / "from-hf")
    argv = ["merge", "--base", "llama", "--loras", "a", "--output", "merged"]
    assert run(*argv)[0] == 0
    assert run("convert", "--to", "meta", "merged", "--output", "converted")[0] == 0
    assert_same_checkpoint(tmp_path / "converted", tmp_path / "from-llama")


# --- convert


def test_convert_both_ways(run: Run, base: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "llama", 2)
    code, out, _ = run(
        "convert", "--from", "meta", "--to", "hf", "llama", "--output", "hf", "--context", "99"
    )
    assert code == 0
    assert out.startswith("hf: 21 tensors, 421 rows, 0.00 GB.")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 99
    assert run("convert", "--to", "meta", "hf", "--output", "meta")[0] == 0
    assert_same_checkpoint(tmp_path / "meta", tmp_path / "llama")
    assert run("convert", "--to", "meta", base, "--output", "two", "--shards", "2")[0] == 0
    assert len(list((tmp_path / "two").glob("*.pth"))) == 2
    assert run("convert", "--to", "hf", "two", "--output", "back")[0] == 0
    assert_same([tensors(tmp_path / "back")], [tensors(base)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--from mta --to hf x", "--from 'mta' (did you mean 'meta'?); one of hf, meta."),
        ("--to gguf x", "--to 'gguf'; one of hf, meta."),
        ("--from meta --to hf {base}", "is not in Meta's form, but in Hugging Face's: --from hf."),
        ("--to hf {base}", "is in Hugging Face's form already."),
        ("--to meta --context 5 {base}", "--context is for --to hf"),
        ("--to meta --shards 3 {base}", "do not divide over 3 shards"),
        ("--to hf nowhere", "nowhere"),
    ],
)
def test_conversions_that_make_no_sense(run: Run, base: Path, tmp_path: Path, words: str, told: str) -> None:
    argv = ["convert", *words.format(base=base).split(), "--output", "out"]
    assert told in sentence(run(*argv))
    assert list(tmp_path.iterdir()) == []


def test_convert_replaces_by_force_only(run: Run, base: Path, tmp_path: Path) -> None:
    argv = ["convert", "--to", "meta", base, "--output", "out"]
    assert run(*argv)[0] == 0
    before = tree(tmp_path)
    assert "out exists; --force replaces it" in sentence(run(*argv))
    assert tree(tmp_path) == before
    assert run(*argv, "--force")[0] == 0
    assert tree(tmp_path) != before
