"""The report of a tokenizer: as a page, as a picture, and in a few lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chinese_llama.vocab import report
from chinese_llama.vocab.audit import audit_vocab
from chinese_llama.vocab.merge import extend_vocab
from tests import tiny

CELLS = re.compile(r"(?<!\\)\|")  # a bar that ends a cell


@pytest.fixture(scope="module")
def learnt(
    base: Path, chinese_sp: Path, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The report of a tokenizer learnt from a corpus."""
    out = tmp_path_factory.mktemp("report") / "out"
    return extend_vocab(base, chinese_sp, out, corpus=[work / "zh.jsonl"], size=500)


@pytest.fixture(scope="module")
def reference(base: Path, chinese_sp: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("report") / "out"
    return extend_vocab(base, chinese_sp, out, policy="reference")


@pytest.fixture(scope="module")
def standard(tokenizer: Path) -> dict[str, Any]:
    return report.read(tokenizer)


@pytest.fixture(scope="module")
def audited(base: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    return audit_vocab(tokenizer, [work / "zh.jsonl", work / "en.jsonl"], base)


@pytest.fixture(scope="module")
def alone(base: Path, work: Path) -> dict[str, Any]:
    return audit_vocab(base, [work / "zh.jsonl"])


@pytest.fixture(params=["learnt", "reference", "standard", "audited", "alone"])
def told(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def tables(page: str) -> list[list[str]]:
    """The lines of each table of a page."""
    found: list[list[str]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def assert_well_formed(page: str) -> None:
    """All rows of a table have as many cells as its head, and a rule stands under that."""
    for lines in tables(page):
        assert len({len(CELLS.findall(line)) for line in lines}) == 1, lines
        assert re.fullmatch(r"\| --- (\| ---: )*\|", lines[1])
        assert all(line.endswith(" |") for line in lines)


@pytest.mark.parametrize("hidden", [None, 32, 4096])
def test_every_table_is_well_formed(told: dict[str, Any], hidden: int | None) -> None:
    page = report.markdown(told, hidden)
    assert len(tables(page)) >= 2
    assert_well_formed(page)
    assert page.startswith("# Vocabulary report\n\n")
    assert page.endswith("\n") and not page.endswith("\n\n")
    assert "\n\n\n" not in page


def test_every_set_of_texts_has_a_row_and_its_scripts(told: dict[str, Any]) -> None:
    page = report.markdown(told)
    named = report.sets(told)
    for name, figures in named.items():
        [row] = [line for line in tables(page)[0] if line.startswith(f"| {name} |")]
        assert f"| {figures['characters_per_token']:.3f} |" in row
        assert f"### By script: {name}\n" in page
    scripts = tables(page)[1 : 1 + len(named)]
    for lines, figures in zip(scripts, named.values(), strict=True):
        assert len(lines) == 2 + len(figures["scripts"])


def test_which_texts_are_told_of(
    learnt: dict[str, Any],
    standard: dict[str, Any],
    audited: dict[str, Any],
    work: Path,
) -> None:
    assert list(report.sets(learnt)) == ["probe texts", "kept apart from the corpus"]
    assert list(report.sets(standard)) == ["probe texts"]
    assert list(report.sets(audited)) == [str(work / "zh.jsonl"), str(work / "en.jsonl")]


def test_a_page_says_where_the_pieces_come_from(
    learnt: dict[str, Any],
    standard: dict[str, Any],
    reference: dict[str, Any],
    audited: dict[str, Any],
    alone: dict[str, Any],
    base: Path,
    chinese_sp: Path,
    work: Path,
) -> None:
    page = report.markdown(learnt)
    assert f"Chosen from `{chinese_sp}` and from 100 documents" in page
    assert f"of `{work / 'zh.jsonl'}`." in page
    assert f"Chosen from `{chinese_sp}`." in report.markdown(standard)
    assert f"All pieces of `{chinese_sp}` appended with score 0" in report.markdown(reference)
    assert f"Base: `{base}`." in report.markdown(audited)
    assert f"`{base}`: **420** pieces." in report.markdown(alone)
    assert "## Price" not in report.markdown(alone)


def test_the_curve_tells_the_gain_and_the_parameters(learnt: dict[str, Any]) -> None:
    [lines] = [t for t in tables(report.markdown(learnt, 1000)) if t[0].startswith("| pieces |")]
    assert lines[0].endswith("parameters at hidden size 1,000 |")
    assert lines[2].startswith("| 420 |") and lines[2].endswith("|  | 0.0 M |")
    assert lines[-1].startswith("| 500 |") and lines[-1].endswith("| 0.2 M |")
    first, second = (point["characters_per_token"] for point in learnt["curve"][:2])
    assert f"| {second / first - 1:+.1%} |" in lines[3]


def test_the_price_names_the_hidden_size_of_the_base(learnt: dict[str, Any]) -> None:
    assert "| 32 | 64 | 0.0 M |" in report.markdown(learnt, 32)
    page = report.markdown(learnt)
    assert "| 4,096 | 8,192 | 0.7 M |" in page
    figures = learnt["held_out"]
    saved = 1 - figures["tokens"] / figures["base_tokens"]
    assert f"- kept apart from the corpus: {saved:.1%} fewer tokens than under the base." in page


def test_faults_are_counted_with_their_first_examples(reference: dict[str, Any]) -> None:
    page = report.markdown(reference)
    checks = reference["checks"]
    assert f"- Pieces that no text can produce: {len(checks['dead'])}." in page
    for problem, what in report.PROBLEMS.items():
        of = checks["without_chinese" if problem == "changed" else "documents"]
        assert f"- probe texts: {what}: {checks[problem]} of {of}." in page


def test_lists_are_cut_on_the_page_and_whole_in_the_json(
    standard: dict[str, Any], audited: dict[str, Any]
) -> None:
    told = {**audited, "unused": [f"片{number}" for number in range(report.LISTED + 5)]}
    page = report.markdown(told)
    assert f"### Unused on these texts ({report.LISTED + 5})" in page
    assert "`片39` … and 5 more in vocab_report.json" in page
    assert "片40" not in page
    dropped = {**standard, "dropped": {"a": "not Chinese", "b": "worth less", "c": "not Chinese"}}
    page = report.markdown(dropped)
    assert "### Dropped: not Chinese (2)\n\n`a`, `c`" in page
    assert "### Dropped: worth less (1)\n\n`b`" in page


def test_repaired_pieces_are_told_with_what_they_needed(standard: dict[str, Any]) -> None:
    told = {**standard, "repaired": {"越来越多": ["越来", "越来越"]}}
    assert "`越来越多` needed `越来` `越来越`" in report.markdown(told)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
@example(text="a`b")
@example(text="``")
@example(text="`")
@example(text="a|b\n\tc\\")
def test_any_example_and_any_piece_stays_on_its_line(text: str) -> None:
    size = {"tokenizer": "a", "base": None, "vocab_size": 9, "base_vocab_size": None}
    files = {"b": {"documents": 1, "characters": 1, "scripts": {}}}
    told = {**size, "files": files, "examples": {"changed": [text]}, "unused": [text], "dead": [text]}
    page = report.markdown(told)
    assert_well_formed(page)
    [line] = [line for line in page.split("\n") if "for example: " in line]
    shown = line.split("for example: ", 1)[1]
    fence = re.match("`+", shown)
    assert fence is not None
    inside = shown[len(fence[0]) : -len(fence[0])]
    assert shown == fence[0] + inside + fence[0]
    assert fence[0] not in re.findall("`+", inside), "the code span ends where the example does"


@pytest.mark.parametrize("name", ["a|b.jsonl", "语料.jsonl", "with space.jsonl", "a`b.jsonl"])
def test_a_corpus_of_any_name_has_its_row(base: Path, tmp_path: Path, name: str) -> None:
    path = tiny.write_texts(tmp_path / name, ["北京"])
    page = report.markdown(audit_vocab(base, [path], base))
    assert_well_formed(page)


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert report.table(["a", "b"], [["x", "1"], ["", "2"]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
        "|  | 2 |",
    ]


def test_the_summary_tells_sizes_lengths_and_faults(told: dict[str, Any]) -> None:
    lines = report.summary(told).splitlines()
    size, base = told["vocab_size"], told["base_vocab_size"]
    assert lines[0].startswith(f"{base} + {size - base} = {size} pieces" if base else f"{size} pieces")
    dead = told["checks"]["dead"] if "checks" in told else told["dead"]
    assert f", {len(dead)} dead" in lines[0]
    for name, figures in report.sets(told).items():
        [line] = [line for line in lines if line.startswith(f"  {name}: ")]
        assert f"{figures['documents']:,} texts" in line
        assert f"{figures['characters_per_token']:.3f}" in line
        if base:
            assert f"{figures['base_characters_per_token']:.3f}" in line
        for problem in report.PROBLEMS:
            if figures.get(problem):
                assert f"{figures[problem]:,}" in line
    assert not any(len(line) > 1000 for line in lines)


def test_what_is_written_is_read_again(told: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path, told, 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        report.REPORT, report.PAGE, report.PICTURE
    ]  # fmt: skip
    assert report.read(tmp_path) == json.loads(json.dumps(told))
    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert page.startswith(report.markdown(told, 64))
    assert page.endswith(f"![{report.PICTURE}]({report.PICTURE})\n")
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_of_texts_without_any_token_is_drawn_too(audited: dict[str, Any], tmp_path: Path) -> None:
    """A byte-for-byte reading may be impossible for all of them."""
    path, figures = next(iter(audited["files"].items()))
    scripts = {name: {"characters": 3, "tokens": 0, "base_tokens": 0} for name in figures["scripts"]}
    report.picture({**audited, "files": {path: {**figures, "scripts": scripts}}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_hidden_size_is_read_where_there_is_one(base: Path, work: Path, tmp_path: Path) -> None:
    assert report.hidden_size(base) == 32
    assert report.hidden_size(tmp_path) is None
    assert report.hidden_size(base / "tokenizer.model") is None
    for content in ("", "{}", "[]", '{"hidden_size": null}', '{"hidden_size": "many"}'):
        (tmp_path / "config.json").write_text(content)
        assert report.hidden_size(tmp_path) is None
