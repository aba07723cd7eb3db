"""`eval` through the command line: tables, files, the gate, and one sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chinese_llama.workspace import FILE
from tests import test_errors, tiny
from tests.evaluate.exam_files import write_exam
from tests.model.test_adapters import peft_adapter
from tests.test_errors import sentence

Run = test_errors.Run
run = test_errors.run  # a fixture


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    zh = tiny.write_texts(tmp_path / "zh.jsonl", tiny.CHINESE[:5])
    en = tiny.write_texts(tmp_path / "en.jsonl", [*tiny.ENGLISH[:4], " ".join(tiny.ENGLISH)])
    return ["--text", f"zh={zh}", "--text", f"en={en}"]


def _bits(value: float) -> str:
    return f"{value:.3f}" if value < 9.9995 else f"{value:.2f}"


def test_two_tokenizers_side_by_side(
    run: Run, base: Path, extended: Path, texts: list[str], tmp_path: Path
) -> None:
    code, out, err = run(
        *(
            "eval",
            "--model",
            extended,
            "--baseline",
            base,
            *texts,
            "--speed",
            "--stride",
            "40",
            "--json",
            "f.json",
        )
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[2:])) <= 80 and out.isascii()
    assert lines[:2] == [f"base      {base}", f"extended  {extended}"]
    told = json.loads((tmp_path / "f.json").read_text())
    assert [model["name"] for model in told["models"]] == ["base", "extended"]
    (comparison,) = told["comparisons"]
    assert (comparison["stage"], comparison["baseline"]) == ("extended", "base")
    assert (comparison["limits"], comparison["broken"]) == ({}, [])
    for name in ("zh", "en"):
        assert any(line.startswith(f"{name}: 5 documents, ") for line in lines)
        found = comparison["texts"][name]
        for model in told["models"]:
            figures = model["texts"][name]
            low, high = (_bits(v) for v in figures["interval"]["bits_per_character"])
            cells = [
                model["name"],
                f"{figures['characters_per_token']:.3f}",
                _bits(figures["bits_per_character"]),
                f"{low}-{high}",
                _bits(figures["bits_per_byte"]),
                f"{figures['perplexity']:.2f}",
                f"{figures['context']:.0f}",
            ]
            assert cells in [line.split() for line in lines]
        change, low, high = (f"{100 * v:+.1f}" for v in (found["difference"], *found["interval"]))
        cells = ["extended", change, "%", low, "to", high, *found["verdict"].split()]
        assert cells in [line.split() for line in lines] or abs(float(low)) < 1
    speeds = [model["speed"] for model in told["models"]]
    ratio = speeds[1]["characters_per_second"] / speeds[0]["characters_per_second"]
    assert "times base" in out and lines[-1].split()[0] == "extended" and lines[-1].endswith(f" {ratio:.2f}")
    assert "Windows of 128 tokens, stride 40.\nContext: how many tokens are seen before" in out
    assert "Only 5 documents" in out


def test_one_model_has_no_comparison(run: Run, base: Path, texts: list[str]) -> None:
    code, out, _ = run("eval", "--model", base, *texts)
    assert code == 0
    assert "Bits against" not in out and "Only 5 documents: intervals" in out


def test_the_gate(run: Run, base: Path, extended: Path, texts: list[str], tmp_path: Path) -> None:
    """Untrained, the base needs more bits for Chinese than the extended model: it has more tokens to guess."""
    argv = ["eval", "--model", base, "--baseline", extended, *texts, "--json", tmp_path / "f.json"]
    code, out, err = run(*argv, "--max-regression", "zh=0.02", "--max-regression", "en=9")
    assert code == 1
    assert "zh: 5 documents" in out  # everything is told all the same
    assert "fewer than 6 documents show nothing  over 2 %" in out and "within 900 %" in out
    comparison = json.loads((tmp_path / "f.json").read_text())["comparisons"][0]
    assert comparison["broken"] == ["zh"] and comparison["limits"] == {"zh": 0.02, "en": 9}
    rise = comparison["texts"]["zh"]["difference"]
    assert err.startswith(f"base: zh: {rise:+.2%} bits per byte (95 % interval ")
    assert err.rstrip().endswith("over the limit of +2.00%.") and len(err.splitlines()) == 1
    assert run(*argv, "--max-regression", f"zh={rise + 0.01}")[::2] == (0, "")


def test_adapters_unmerged_beside_the_model(
    run: Run, extended: Path, texts: list[str], tmp_path: Path
) -> None:
    place = peft_adapter(extended, tmp_path / "plus")
    code, out, _ = run(
        *(
            "eval",
            "--model",
            extended,
            "--base",
            extended,
            "--loras",
            place,
            *texts[:2],
            "--baseline",
            extended,
        )
    )
    assert code == 0
    assert f"{extended} + plus" in out
    assert out.count("fewer than 6 documents show nothing") == 2


def test_a_workspace_compares_base_and_merged(
    run: Run, base: Path, extended: Path, texts: list[str], tmp_path: Path
) -> None:
    shutil.copytree(extended, tmp_path / "work" / "merged")
    (tmp_path / FILE).write_text(f"base: {base}\neval: {{text: {{zh: zh.jsonl}}, window: 64}}\n")
    code, out, _ = run("eval")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["base", "merged"]
    assert "Windows of 64 tokens, stride 32" in out


def test_a_workspace_measures_what_pretraining_holds_out(
    run: Run, base: Path, extended: Path, texts: list[str], tmp_path: Path
) -> None:
    """As `adapt` does, where eval.text names nothing."""
    shutil.copytree(extended, tmp_path / "work" / "merged")
    section = f"pt_lora: {{data: zh.jsonl, eval_split: 0.3, block_size: 32, model_name_or_path: {extended}}}"
    (tmp_path / FILE).write_text(f"base: {base}\n{section}\neval: {{max_regression: {{zh: 9}}}}\n")
    code, out, err = run("eval")
    assert code == 0, err
    assert "zh: " in out and "within 900 %" in out


def test_exams_and_wikitext_without_texts(run: Run, tmp_path: Path, texts: list[str]) -> None:
    pytest.importorskip("lm_eval")
    long = tiny.write_base(tmp_path / "long", tiny.base_tokenizer(), max_position_embeddings=2048)
    exam = write_exam(tmp_path / "exam", "ceval", {"law": 3, "logic": 2})
    argv = ["eval", "--model", long, "--choices", f"ceval={exam}", "--shots", "1", "--wikitext", "en.jsonl"]
    code, out, err = run(*argv, "--json", "f.json")
    assert code == 0, err
    assert "ceval, 1-shot, 5 questions: % right" in out and "Humanities" in out
    (told,) = json.loads((tmp_path / "f.json").read_text())["models"]
    assert told["texts"] == {} and told["choices"][0]["shots"] == 1
    assert f" {told['wikitext']['byte_perplexity']:.3f}\n" in out
    assert "unknown (did you mean 'ceval'?)" in sentence(run("eval", "--model", long, "--choices", "cevla=x"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--window", "129"], "base: A window of 129 tokens is longer than the model's context of 128"),
        (["--stride", "128"], "A stride of 128 does not fit windows of 128 tokens; give 1 to 127"),
        (["--stride", "0"], "A stride of 0"),
        (["--baseline", "none"], "none: no such directory; a model is wanted here"),
        (["--text", "no=no.txt"], "no.txt: no such file"),
        (["--text", "zh=no.txt"], "'zh' is given twice"),
        (["--text", "e=empty.txt"], "empty.txt: holds no text"),
        (["--json", "no/f.json"], "--json no/f.json cannot be written"),
        (["--json", "."], "--json . cannot be written"),
        (["--max-regression", "en=0.02"], "needs a model to compare with"),
        (["--loras", "no", "--base", "x"], "No adapter 'no'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence(
    run: Run, base: Path, texts: list[str], tmp_path: Path, more: list[str], said: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert said in sentence(run("eval", "--model", base, *texts, *more))


def test_a_model_without_a_tokenizer(run: Run, base: Path, texts: list[str], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(base / name, tmp_path / "bare")
    assert "bare: has no tokenizer" in sentence(run("eval", "--model", "bare", *texts))


def test_nan_is_one_sentence(run: Run, base: Path, texts: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = shutil.copytree(base, tmp_path / "bad")
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    told = sentence(run("eval", "--model", "bad", *texts, "--json", "f.json"))
    assert "bad gives document" in told and "of zh no number (nan): its model.norm.weight" in told
    assert not (tmp_path / "f.json").exists()
