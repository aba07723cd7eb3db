"""merge stopped, killed or refused half way: what is kept of it, what is taken up again, and that nobody sees a
difference in the end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import OutputExists, UserError
from chinese_llama.merging import journal, stream
from chinese_llama.merging.plan import Step, load
from chinese_llama.model.shards import Weights
from tests import tiny
from tests.merging.breaking import (
    INDEX,
    SHARDS,
    Case,
    Files,
    after,
    assert_same,
    content,
    copy,
    finished,
    merge,
    signalled,
    stats,
    stopped,
    stopping,
)
from tests.model.test_adapters import FILE, peft_adapter
from tests.test_directories import DEAD, worked_in


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Large enough that a shard takes some milliseconds: time to come between."""
    folder = tmp_path_factory.mktemp("case")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    whole = tiny.write_base(folder / "whole", tiny.base_tokenizer(), **sizes)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float16)
    model.save_pretrained(str(folder / "base"), max_shard_size="20KB")
    for file in whole.glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    adapter = peft_adapter(folder / "base", folder / "a", target_modules=["q_proj", "v_proj", "down_proj"])
    merge(folder / "base", adapter, folder / "unbroken")
    return Case(folder / "base", adapter, folder / "unbroken")


@pytest.fixture(scope="module")
def left(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped(case.base, case.adapter, tmp_path_factory.mktemp("left"), 8)


def test_a_merge_that_is_killed_twice_is_finished(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second time while the result is verified: all shards are there."""
    kept: Files = {}
    moments = [after(case.shards // 2), lambda partial: (partial / INDEX).is_file()]
    for count, moment in zip((case.shards // 2, case.shards), moments, strict=True):
        code, err = signalled(case, tmp_path, signal.SIGKILL, moment, *(["--resume"] if kept else []))
        assert code == -signal.SIGKILL
        assert (f"Going on: {len(kept)} finished files" in err) == bool(kept)
        (partial,) = tmp_path.iterdir()
        assert not (tmp_path / "out").exists()
        now = finished(partial)
        assert len(now) >= count
        assert kept.items() <= now.items()
        kept = now
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert f"Going on: {case.shards} finished files of a broken merge are kept." in capsys.readouterr().err
    assert stats(tmp_path / "out") == kept
    assert_same(tmp_path / "out", case.unbroken)


def test_a_stop_tells_how_to_go_on(case: Case, tmp_path: Path) -> None:
    """By SIGTERM, of which the command makes what Ctrl-C is; `stopped` is the same in this process."""
    code, err = signalled(case, tmp_path, signal.SIGTERM, after(3))
    assert code == 130, err
    assert err == (
        "Stopped; what is finished is kept beside the output, and the same command with --resume goes on from it.\n"
    )
    (partial,) = tmp_path.iterdir()
    kept = finished(partial)
    assert 3 <= len(kept) < case.shards
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert kept.items() <= stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


# --- what is taken up


def test_resume_keeps_finished_files(
    case: Case, left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(copy(left, tmp_path))
    assert 8 <= len(kept) < case.shards
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert f"Going on: {len(kept)} finished files" in capsys.readouterr().err
    assert kept.items() <= stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


def test_without_resume_what_was_left_is_removed(
    case: Case, left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(copy(left, tmp_path))
    merge(case.base, case.adapter, tmp_path / "out")
    assert capsys.readouterr().err == ""
    assert not kept.items() & stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


def test_resume_with_nothing_to_resume(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert capsys.readouterr().err == ""
    assert_same(tmp_path / "out", case.unbroken)


def flip(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flip", "truncate", "unlink"])
def test_a_finished_file_that_is_damaged_is_made_again(
    damage: Callable[[Path], None],
    case: Case,
    left: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partial = copy(left, tmp_path)
    kept = finished(partial)
    victim = sorted(kept)[3]
    damage(partial / victim)
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert f"Going on: {len(kept) - 1} finished files" in capsys.readouterr().err
    del kept[victim]
    assert kept.items() <= stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": {}}', '{"plan": "x"}'])
def test_a_damaged_journal_is_nothing_to_go_on_from(
    text: str, case: Case, left: Path, tmp_path: Path
) -> None:
    """And what else lies there goes too: the result has the files of a merge only."""
    partial = copy(left, tmp_path)
    kept = finished(partial)
    (partial / journal.FILE).write_text(text)
    (partial / "sub").mkdir()
    (partial / "sub" / "file").write_text("x")
    merge(case.base, case.adapter, tmp_path / "out", resume=True, verify=False)
    assert not kept.items() & stats(tmp_path / "out").items()
    assert set(content(tmp_path / "out")) == set(content(case.unbroken))


OTHER: dict[str, dict[str, Any]] = {"weight": {"weight": 0.5}, "dtype": {"dtype": "float32"}}


@pytest.mark.parametrize("what", ["adapter", *OTHER])
def test_what_another_merge_left_is_not_taken(
    what: str, case: Case, left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(copy(left, tmp_path))
    adapter = shutil.copytree(case.adapter, tmp_path / "b") if what == "adapter" else case.adapter
    merge(case.base, adapter, tmp_path / "out", resume=True, **OTHER.get(what, {}))
    assert capsys.readouterr().err == (
        "What a broken merge left is of other inputs or settings; starting afresh.\n"
    )
    assert not kept.items() & stats(tmp_path / "out").items()
    merge(case.base, adapter, tmp_path / "fresh", **OTHER.get(what, {}))
    assert_same(tmp_path / "out", tmp_path / "fresh")


def test_a_base_that_changed_meanwhile_is_seen(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(case.base, tmp_path / "base")
    stopped(base, case.adapter, tmp_path)
    shard = sorted(base.glob(SHARDS))[0]
    held = load_file(shard)
    save_file({name: tensor * 2 for name, tensor in held.items()}, shard)
    merge(base, case.adapter, tmp_path / "out", resume=True)
    assert "of other inputs or settings; starting afresh" in capsys.readouterr().err
    name = next(iter(held))
    merged, before = Weights(tmp_path / "out").load(name), Weights(case.unbroken).load(name)
    assert not torch.equal(merged, before)


def test_of_two_leftovers_the_newer_is_taken_and_both_are_gone(
    case: Case, left: Path, tmp_path: Path
) -> None:
    older, newer = copy(left, tmp_path, DEAD), copy(left, tmp_path, DEAD + 1)
    kept = finished(newer)
    for place, seconds in ((older, 1), (newer, 2)):
        os.utime(place, (seconds, seconds))
    merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert kept.items() <= stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


@pytest.mark.parametrize("resume", [True, False])
def test_the_work_of_a_process_that_runs_is_not_touched(
    resume: bool, case: Case, left: Path, tmp_path: Path
) -> None:
    partial = copy(left, tmp_path, DEAD + 1)
    before = stats(partial, "*")
    with worked_in(partial):
        merge(case.base, case.adapter, tmp_path / "out", resume=resume)
    assert stats(partial, "*") == before
    assert not before.items() & stats(tmp_path / "out", "*").items()
    assert content(tmp_path / "out") == content(case.unbroken)


def test_force_keeps_the_old_result_until_the_new_one_is_there(case: Case, tmp_path: Path) -> None:
    merge(case.base, case.adapter, tmp_path / "out", weight=0.5)
    old = content(tmp_path / "out")
    kept = finished(stopped(case.base, case.adapter, tmp_path, force=True))
    assert content(tmp_path / "out") == old
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        merge(case.base, case.adapter, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == old
    merge(case.base, case.adapter, tmp_path / "out", resume=True, force=True)
    assert kept.items() <= stats(tmp_path / "out").items()
    assert_same(tmp_path / "out", case.unbroken)


def test_an_error_leaves_nothing_not_even_of_what_was_left(case: Case, tmp_path: Path) -> None:
    """The overflow shows only in one of the last shards."""
    bad = shutil.copytree(case.adapter, tmp_path / "bad")
    held = load_file(bad / FILE)
    save_file({k: t * 1e5 if "layers.3.mlp.down" in k else t for k, t in held.items()}, bad / FILE)
    stopped(case.base, bad, tmp_path)
    with pytest.raises(UserError, match=r"layers.3.mlp.down_proj.weight overflows"):
        merge(case.base, bad, tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_stop_while_metas_files_are_written_leaves_nothing(case: Case, tmp_path: Path) -> None:
    """They cannot be taken up again, and nothing promises it."""

    def begun(partial: Path) -> bool:
        return sum(file.stat().st_size for file in partial.glob("consolidated.*")) > 1_000_000

    with pytest.raises(KeyboardInterrupt), stopping(tmp_path, begun):
        merge(case.base, case.adapter, tmp_path / "out", format="meta")
    assert list(tmp_path.iterdir()) == []


# --- disk space


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=count)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_without_space_is_told_before_anything_is_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stream.Work(case.base, [Step([load("a", case.adapter)])], stream.Options())
    free(monkeypatch, work.bytes - 1)
    with pytest.raises(UserError, match=r"out: .* GB are to be written, and the disk has .* GB free"):
        merge(case.base, case.adapter, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    free(monkeypatch, work.bytes)
    merge(case.base, case.adapter, tmp_path / "out", verify=False)


@pytest.mark.parametrize("resume", [True, False])
def test_what_was_left_counts_as_space(
    resume: bool, case: Case, left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken up or removed first; and a merge that is refused leaves it there."""
    work = stream.Work(case.base, [Step([load("a", case.adapter)])], stream.Options())
    partial = copy(left, tmp_path)
    kept, before = finished(partial), stats(partial, "*")
    free(monkeypatch, work.bytes - sum(file.stat().st_size for file in partial.iterdir()) - 1)
    with pytest.raises(UserError, match="are to be written"):
        merge(case.base, case.adapter, tmp_path / "out", resume=resume)
    assert stats(partial, "*") == before
    free(monkeypatch, work.bytes - sum(file.stat().st_size for file in partial.iterdir()))
    merge(case.base, case.adapter, tmp_path / "out", resume=resume, verify=False)
    assert (kept.items() <= stats(tmp_path / "out").items()) == resume


def test_the_manifest_of_a_resumed_merge_has_all_hashes(case: Case, left: Path, tmp_path: Path) -> None:
    """Those of kept files are of their bytes, not only of what a journal says."""
    import xxhash

    copy(left, tmp_path)
    merge(case.base, case.adapter, tmp_path / "out", resume=True, verify=False)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and len(manifest.files) == case.shards
    for name, record in manifest.files.items():
        assert record["xxh3_128"] == xxhash.xxh3_128((tmp_path / "out" / name).read_bytes()).hexdigest()
