"""extend-model: old rows and all other weights keep their bits; new rows start where they should."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chinese_llama.artifacts import input_record, read_manifest, sha256_file
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, DoesNotFit, OutputExists, UserError
from chinese_llama.model.initialise import METHODS, new_rows
from chinese_llama.model.resize import base_vocab_size, decompose, extend_model
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.vocab.proto import CONTROL, read_model
from chinese_llama.vocab.readers import sp_reader
from tests import tiny

MATRICES = (EMBED, HEAD)


def sizes(base: Path, tokenizer: Path) -> tuple[int, int]:
    return tuple(len(read_model(p / "tokenizer.model").pieces) for p in (base, tokenizer))  # type: ignore[return-value]


def assert_extends(base: Path, output: Path, old: int, rows: int) -> None:
    """Old rows and other weights are bit-identical; the vocabulary matrices have `rows` rows."""
    before, after = Weights(base), Weights(output)
    assert set(before) == set(after)
    for name in before:
        a, b = before.load(name), after.load(name)
        assert a.dtype == b.dtype
        assert len(b) == (rows if name in MATRICES else len(a))
        kept = [t[:old] if name in MATRICES else t for t in (a, b)]
        assert torch.equal(*[t.contiguous().view(torch.uint8) for t in kept]), name


def test_the_extended_model_is_the_base_plus_rows(base: Path, tokenizer: Path, extended: Path) -> None:
    old, new = sizes(base, tokenizer)
    assert new > old
    assert_extends(base, extended, old, new)
    manifest = read_manifest(extended)
    assert manifest is not None
    assert (manifest.kind, manifest.vocab_size) == ("model", new)
    assert manifest.metrics["base_vocab_size"] == old
    assert set(manifest.inputs) == {"base", "tokenizer"}


def test_it_loads_and_tokenizer_and_rows_agree(base: Path, extended: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(extended, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(extended)
    old = AutoModelForCausalLM.from_pretrained(base)
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == model.config.vocab_size
    ids = torch.tensor([tokenizer("The quick brown fox").input_ids])
    size = old.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :size], old(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_bases_of_every_precision_are_extended(
    base: Path, tokenizer: Path, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    source = tmp_path / "base"
    model.save_pretrained(str(source), max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    if kind == "bin":
        as_bin(source)
    shutil.copy(base / "tokenizer.model", source)
    extend_model(source, tokenizer, tmp_path / "out", pad_to_multiple_of=64)
    old, new = sizes(base, tokenizer)
    assert_extends(source, tmp_path / "out", old, -(-new // 64) * 64)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.inputs["base"] == input_record(source)
    assert {n: r["sha256"] for n, r in manifest.files.items()} == {
        file.name: sha256_file(file) for file in (tmp_path / "out").glob("*.safetensors")
    }  # also of files that were only copied
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def as_bin(directory: Path) -> None:
    """Turn sharded safetensors into shards as older programs wrote them."""
    weight_map = {}
    for number, file in enumerate(sorted(directory.glob("*.safetensors"))):
        tensors = load_file(file)
        torch.save(tensors, directory / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{number}.bin")
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_is_a_few_tensors(tokenizer: Path, tmp_path: Path) -> None:
    """Layers that are many times larger pass through, and are never held together."""
    wide = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4}
    base = tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), **wide)
    code = """if True:
        import sys
        from pathlib import Path
        import chinese_llama.vocab.bases, numpy
        from chinese_llama.model.resize import extend_model
        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) << 10
        before = peak()
        extend_model(*map(Path, sys.argv[1:]))
        print(peak() - before)
    """
    places = [str(base), str(tokenizer), str(tmp_path / "out")]
    told = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
    assert 0 < int(told.stdout) < (base / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("init", METHODS)
def test_a_tied_base_stays_tied(tokenizer: Path, tmp_path: Path, init: str) -> None:
    base = tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), tied=True)
    extend_model(base, tokenizer, tmp_path / "out", init=init)
    assert HEAD not in Weights(tmp_path / "out")
    assert_extends(base, tmp_path / "out", *sizes(base, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_new_row_is_the_mean_of_its_utf8_bytes_without_a_stray_space(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """The pico base has no Chinese, so a Chinese piece is its bytes and nothing else."""
    extended = tmp_path / "extended"
    extend_model(base, tokenizer, extended, init="subword-mean")
    pieces = read_model(tokenizer / "tokenizer.model").pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    old = sizes(base, tokenizer)[0]
    before, after = Weights(base), Weights(extended)
    checked = 0
    for name in MATRICES:
        was, now = before.load(name).double(), after.load(name).double()
        for index in range(old, len(pieces)):
            text = pieces[index].piece
            if any(character in ids and ids[character] < old for character in text):
                continue
            mean = was[[ids[f"<0x{byte:02X}>"] for byte in text.encode()]].mean(0)
            torch.testing.assert_close(now[index], mean, rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked > 50
    assert not torch.equal(before.load(EMBED), before.load(HEAD))


def test_decompose_is_what_sentencepiece_made_of_the_piece_before(base: Path, tokenizer: Path) -> None:
    """Compared by way of a leading space: cutting off its piece leaves the piece's own ids."""
    model = read_model(tokenizer / "tokenizer.model")
    old = sizes(base, tokenizer)[0]
    before = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    parts = decompose(tokenizer, sp_reader(model), old, len(model.pieces) + 3)
    assert parts[-3:] == [[], [], []]
    space = before.piece_to_id("▁")
    for piece, ids in zip(model.pieces[old:], parts, strict=False):
        assert before.encode(piece.piece) == [space, *ids]


def test_control_pieces_and_padding_start_at_the_mean(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    from chinese_llama.vocab.merge import extend_vocab

    extend_vocab(base, chinese_sp, tmp_path / "tokenizer", pad_token="[PAD]")
    extend_model(base, tmp_path / "tokenizer", tmp_path / "out", "subword-mean", pad_to_multiple_of=64)
    model = read_model(tmp_path / "out" / "tokenizer.model")
    assert model.pieces[-1].type == CONTROL
    rows = Weights(tmp_path / "out").load(EMBED)
    mean = Weights(base).load(EMBED).double().mean(0)
    for row in rows[len(model.pieces) - 1 :]:
        torch.testing.assert_close(row.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiple", [8, 64, 1000])
def test_rows_are_padded_to_a_multiple(base: Path, tokenizer: Path, tmp_path: Path, multiple: int) -> None:
    extend_model(base, tokenizer, tmp_path / "out", pad_to_multiple_of=multiple)
    old, new = sizes(base, tokenizer)
    rows = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    assert rows % multiple == 0
    assert new <= rows < new + multiple
    assert_extends(base, tmp_path / "out", old, rows)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight) == rows


def test_input_and_output_rows_start_in_ways_of_their_own(
    base: Path, tokenizer: Path, extended: Path
) -> None:
    """The default: each matrix by its own rule from its own old rows."""
    old, new = sizes(base, tokenizer)
    parts = decompose(tokenizer, sp_reader(read_model(tokenizer / "tokenizer.model")), old, new)
    assert read_manifest(extended).settings["init"] == "asymmetric"  # type: ignore[union-attr]
    for name, side in ((EMBED, "input"), (HEAD, "output")):
        wanted = new_rows("asymmetric", Weights(base).load(name), parts, side)  # type: ignore[arg-type]
        assert torch.equal(Weights(extended).load(name)[old:], wanted)


@pytest.mark.parametrize("init", ["subword-mean", "mean-resizing", "random"])
def test_the_other_methods_touch_new_rows_only(
    base: Path, tokenizer: Path, extended: Path, tmp_path: Path, init: str
) -> None:
    extend_model(base, tokenizer, tmp_path / "out", init=init)
    old, new = sizes(base, tokenizer)
    assert_extends(base, tmp_path / "out", old, new)
    ours, default = Weights(tmp_path / "out").load(EMBED)[old:], Weights(extended).load(EMBED)[old:]
    assert not torch.allclose(ours, default)


def test_what_lies_beside_the_weights_travels_but_no_old_tokenizer(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(base, tmp_path / "base")
    (source / "LICENSE").write_text("free")
    (source / "added_tokens.json").write_text(
        json.dumps({"<extra>": len(read_model(base / "tokenizer.model").pieces)})
    )
    (source / "special_tokens_map.json").write_text('{"pad_token": "<extra>"}')
    extend_model(source, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    ours, wanted = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", tokenizer))
    assert ours.get_vocab() == wanted.get_vocab()
    assert ours.pad_token == wanted.pad_token


def test_a_tokenizer_of_another_base_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", tiny.base_tokenizer(vocab_size=400))
    with pytest.raises(
        DoesNotFit, match=r"does not extend the tokenizer of .*other: id \d+ is .*extend-vocab"
    ):
        extend_model(other, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_extend_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="there is nothing to extend"):
        extend_model(base, base, tmp_path / "out")


def test_without_the_old_tokenizer_the_manifest_says_what_is_new(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    old, new = sizes(base, tokenizer)
    assert base_vocab_size(bare, tokenizer, sp_reader(read_model(tokenizer / "tokenizer.model"))) == old
    extend_model(bare, tokenizer, tmp_path / "out")
    assert_extends(base, tmp_path / "out", old, new)
    unknown = shutil.copytree(tokenizer, tmp_path / "unknown", ignore=shutil.ignore_patterns(MANIFEST))
    with pytest.raises(DoesNotFit, match=r"unknown which pieces are new; put the base's tokenizer.model"):
        extend_model(bare, unknown, tmp_path / "other")


def test_a_base_with_fewer_rows_than_pieces_is_refused(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(300)
    model.save_pretrained(str(tmp_path / "base"))
    shutil.copy(base / "tokenizer.model", tmp_path / "base")
    with pytest.raises(DoesNotFit, match=r"model.embed_tokens.weight has 300 rows, its tokenizer 420 pieces"):
        extend_model(tmp_path / "base", tokenizer, tmp_path / "out")


@pytest.mark.parametrize(("lost", "told"), [(EMBED, "only LLaMA-family models"), (HEAD, "does not tie it")])
def test_a_base_without_its_matrices_is_refused(
    base: Path, tokenizer: Path, tmp_path: Path, lost: str, told: str
) -> None:
    from safetensors.torch import save_file

    source = shutil.copytree(base, tmp_path / "base")
    tensors = {n: t for n, t in load_file(base / "model.safetensors").items() if n != lost}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(DoesNotFit, match=told):
        extend_model(source, tokenizer, tmp_path / "out")


def test_unknown_settings_are_refused(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--init 'zero': known are asymmetric, .*, distill"):
        extend_model(base, tokenizer, tmp_path / "out", init="zero")
    with pytest.raises(UserError, match=r"--init distill reads the new pieces in texts; .* with --corpus"):
        extend_model(base, tokenizer, tmp_path / "out", init="distill")
    with pytest.raises(UserError, match="--corpus is for --init distill; asymmetric reads none"):
        extend_model(base, tokenizer, tmp_path / "out", corpus=[tmp_path])
    with pytest.raises(UserError, match="--pad-to-multiple-of must be at least 1"):
        extend_model(base, tokenizer, tmp_path / "out", pad_to_multiple_of=0)
    with pytest.raises(BadFile, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        extend_model(base, tmp_path, tmp_path / "out")


def test_an_existing_output_is_kept_unless_forced(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out" / MANIFEST).write_text('{"kind": "x", "command": "x"}')
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        extend_model(base, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    extend_model(base, tokenizer, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert extend_model(base, tokenizer, tmp_path / "out", keep=True) == read_manifest(tmp_path / "out")
    with pytest.raises(OutputExists, match="was made with init "):
        extend_model(base, tokenizer, tmp_path / "out", init="random", keep=True)
