"""What lies beside merged weights: the right tokenizer and no other, and settings that agree with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chinese_llama.artifacts import Manifest, write_manifest
from chinese_llama.data.templates import find_template
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.belongings import card, check_tokenizer, pieces_of, tokenizer_of
from chinese_llama.merging.plan import Adapter, Step, load
from chinese_llama.merging.verify import told
from chinese_llama.model.resize import copy_tokenizer, save_chat_template
from chinese_llama.model.shards import read_json
from chinese_llama.vocab.proto import read_model
from tests import tiny
from tests.merging import making
from tests.merging.test_stream import KINDS, merge
from tests.model.test_adapters import peft_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("belongings")


@pytest.fixture(scope="module")
def plain(base: Path, folder: Path) -> Path:
    """An adapter that brings no tokenizer."""
    return peft_adapter(base, folder / "plain")


@pytest.fixture(scope="module")
def grown(base: Path, tokenizer: Path, folder: Path) -> Path:
    """An adapter with a larger vocabulary and its tokenizer, as the recipes save it."""
    size = len(read_model(tokenizer / "tokenizer.model").pieces)
    place = peft_adapter(base, folder / "grown", size, **KINDS["full"])
    copy_tokenizer(tokenizer, place)
    return place


def rewrite(file: Path, **changes: Any) -> Path:
    """A JSON file with some of its keys changed, or removed (None)."""
    content = {**(read_json(file) if file.is_file() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def copied(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a model whose config.json says something else."""
    shutil.copytree(source, target)
    rewrite(target / "config.json", **config)
    return target


def adapters(folder: Path, *tokenizers: str) -> list[Adapter]:
    """Adapters of which each has the file of a tokenizer, or ""."""
    found = []
    for number, name in enumerate(tokenizers):
        place = making.make(folder / f"{number}")
        if name:
            (place / name).write_text("x")
        found.append(load(f"{number}", place))
    return found


@pytest.mark.parametrize(
    ("tokenizers", "own", "wanted"),
    [
        (["tokenizer.model", "tokenizer.json"], "tokenizer.model", "1"),
        (["tokenizer.json", ""], "tokenizer.model", "0"),
        (["tokenizer.model"], "", "0"),
        ([""], "tokenizer.model", "base"),
        ([], "tokenizer.json", "base"),
        (["", "tokenizer_config.json"], "", None),
    ],
)
def test_the_tokenizer_is_that_of_the_last_adapter_that_has_one(
    tmp_path: Path, tokenizers: list[str], own: str, wanted: str | None
) -> None:
    (tmp_path / "base").mkdir()
    if own:
        (tmp_path / "base" / own).write_text("x")
    found = tokenizer_of(tmp_path / "base", adapters(tmp_path, *tokenizers))
    assert found == (tmp_path / wanted if wanted else None)


def test_the_result_has_the_adapters_tokenizer_and_ids(base: Path, grown: Path, tmp_path: Path) -> None:
    """Also where the base's config.json has other ids, as early conversions of LLaMA have."""
    wrong = copied(base, tmp_path / "base", bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    rewrite(wrong / "generation_config.json", bos_token_id=0, eos_token_id=1, pad_token_id=0, top_p=0.5)
    (wrong / "chat_template.jinja").write_text("of the base")
    (wrong / "added_tokens.json").write_text('{"of": 3}')
    (wrong / "LICENSE").write_text("theirs")
    merge(wrong, [grown], tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (grown / name).read_bytes(), name
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config, settings = read_json(out / "config.json"), read_json(out / "generation_config.json")
    size = len(read_model(grown / "tokenizer.model").pieces)
    assert config["vocab_size"] == size > 420
    assert {name: config[name] for name in ids} == ids
    assert {name: settings[name] for name in ids} == ids
    assert settings["top_p"] == 0.5
    assert (out / "LICENSE").read_text() == "theirs"
    assert not {"chat_template.jinja", "added_tokens.json"} & {file.name for file in out.iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    given = tokenizer("中国的首都是", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert given.input_ids[0, 0] == 1
    assert given.input_ids.shape[1] < made.shape[1] <= given.input_ids.shape[1] + 4
    assert tokenizer.decode(made[0], skip_special_tokens=True).startswith("中国的首都是")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype(base: Path, plain: Path, tmp_path: Path, name: str) -> None:
    """Under the key that it has, of transformers 4 or of 5."""
    own = copied(base, tmp_path / "base", **{"dtype": None, "torch_dtype": None, name: "float32"})
    merge(own, [plain], tmp_path / "out", dtype="bfloat16")
    config = read_json(tmp_path / "out" / "config.json")
    assert {key: config[key] for key in ("dtype", "torch_dtype") if key in config} == {name: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    merge(own, [plain], tmp_path / "same")
    assert read_json(tmp_path / "same" / "config.json")[name] == "float32"


def test_without_any_tokenizer_the_config_stays(base: Path, plain: Path, tmp_path: Path) -> None:
    own = copied(base, tmp_path / "base", bos_token_id=7, eos_token_id=8)
    for file in own.glob("tokenizer*"):
        file.unlink()
    merge(own, [plain], tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, 8)
    assert not list((tmp_path / "out").glob("tokenizer*"))


# --- chat templates


@pytest.mark.parametrize("files", [("tokenizer.model",), ("tokenizer.model", "tokenizer.json")])
def test_a_chat_template_travels_with_its_tokenizer(
    base: Path, grown: Path, tmp_path: Path, files: tuple[str, ...]
) -> None:
    adapter = shutil.copytree(grown, tmp_path / "chat")
    save_chat_template(adapter, find_template("chinese-alpaca"))
    for file in adapter.glob("tokenizer*"):
        if file.name not in (*files, "tokenizer_config.json"):
            file.unlink()
    merge(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == find_template("chinese-alpaca")
    assert read_json(out / "generation_config.json")["eos_token_id"] == 2
    found = AutoTokenizer.from_pretrained(out)
    text = found.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert "### Instruction:\n你好" in text


@pytest.fixture(scope="module")
def chatting(folder: Path) -> Path:
    """A base whose tokenizer has a control token for the end of a turn, and a template that writes it."""
    place = folder / "chatting"
    own = tiny.byte_level()
    own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tiny.write_byte_level(place, own)
    save_chat_template(place, find_template("chatml"))
    tiny.write_llama(place, own.get_vocab_size())
    return place


def test_what_ends_a_turn_ends_generation(chatting: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(chatting, tmp_path / "a")
    merge(chatting, [adapter], tmp_path / "out")
    ids = pieces_of(chatting)
    ends = sorted([ids["<|end|>"], ids["<|im_end|>"]])
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == ends
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == ids["<|end|>"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == ends


def test_the_ends_that_an_adapters_manifest_names_are_taken(chatting: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(chatting, tmp_path / "a")
    copy_tokenizer(chatting, adapter)
    write_manifest(adapter, Manifest("adapter", "sft_lora", metrics={"stop_ids": [5, 7]}))
    merge(chatting, [adapter], tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [5, 7]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", "{{ bos_token }}"])
def test_a_template_that_cannot_be_rendered_does_not_stop_a_merge(
    chatting: Path, tmp_path: Path, template: str
) -> None:
    """It is the base's; what ends an answer is then what the tokenizer says."""
    own = copied(chatting, tmp_path / "base")
    (own / "chat_template.jinja").write_text(template)
    merge(own, [peft_adapter(own, tmp_path / "a")], tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    eos = pieces_of(chatting)["<|end|>"]
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == eos


def test_a_template_without_bos_does_not_stop_a_merge(chatting: Path, tmp_path: Path) -> None:
    """Qwen's tokenizers have none."""
    own = copied(chatting, tmp_path / "base")
    rewrite(own / "tokenizer_config.json", bos_token=None)
    merge(own, [peft_adapter(own, tmp_path / "a")], tmp_path / "out")
    ids = pieces_of(chatting)
    assert ids["<|end|>"] in [read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"]]


@pytest.mark.parametrize("template", [True, False])
def test_several_ends_of_the_base_stay(chatting: Path, tmp_path: Path, template: bool) -> None:
    """As Llama 3 and Qwen have them: what the tokenizer and the template say is among them."""
    own, ids = copied(chatting, tmp_path / "base"), pieces_of(chatting)
    if not template:
        (own / "chat_template.jinja").unlink()
    ends = [ids["<|end|>"], 5, ids["<|im_end|>"]]
    for name in ("generation_config.json", "config.json"):
        rewrite(own / name, eos_token_id=ends)
    merge(own, [peft_adapter(chatting, tmp_path / "a")], tmp_path / "out")
    for name in ("generation_config.json", "config.json"):
        assert read_json(tmp_path / "out" / name)["eos_token_id"] == ends
    rewrite(own / "generation_config.json", eos_token_id=[5, 7])
    merge(own, [peft_adapter(chatting, tmp_path / "b")], tmp_path / "other")
    wanted = sorted([ends[0], ends[2]]) if template else ends[0]
    assert read_json(tmp_path / "other" / "generation_config.json")["eos_token_id"] == wanted


# --- tokenizers that belong to other rows


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("pieces", "rows", "fits"),
    [
        (53, 53, True),
        (53, 54, False),  # Chinese-LLaMA's tokenizer, Chinese-Alpaca's rows
        (54, 53, False),  # and the other way
        (53, 56, True),  # rounded up to eights
        (53, 64, True),
        (53, 55, False),
        (53, 48, False),
        (56, 56, True),
    ],
)
def test_pieces_and_rows_must_agree(tmp_path: Path, kind: str, pieces: int, rows: int, fits: bool) -> None:
    place = making.write_tokenizer(tmp_path, pieces)
    if kind == "tokenizer.json":
        vocabulary = {f"p{i}": i for i in range(pieces - 2)}
        added = [{"content": f"a{i}", "id": i} for i in (pieces - 2, pieces - 1)]
        (place / kind).write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
        (place / "tokenizer.model").unlink()
    if fits:
        assert check_tokenizer(place, rows, "the merged model") == pieces
        return
    sentence = (
        rf"has {pieces} pieces, the merged model {rows} rows: it is the tokenizer of something else; put"
    )
    with pytest.raises(DoesNotFit, match=sentence):
        check_tokenizer(place, rows, "the merged model")


def test_padding_has_a_limit(tmp_path: Path) -> None:
    """LLaMA's tokenizer on rows of an extended model that happen to be a multiple of eight."""
    place = making.write_tokenizer(tmp_path, 53)
    assert check_tokenizer(place, 2048, "it") == 53
    with pytest.raises(DoesNotFit, match="has 53 pieces, it 17,968 rows"):
        check_tokenizer(place, 17_968, "it")
    assert check_tokenizer(place, 17_969, "it", padded=53) == 53


def test_a_tokenizer_of_one_piece_less_is_refused_by_merge(base: Path, grown: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(grown, tmp_path / "a")
    model = read_model(adapter / "tokenizer.model")
    if len(model.pieces) % 8 == 0:
        model.pieces.add(piece="more", score=0.0)
    del model.pieces[-1]
    (adapter / "tokenizer.json").unlink()
    tiny.write_model(adapter / "tokenizer.model", model)
    with pytest.raises(
        DoesNotFit, match=r"pieces, the merged model .* rows: it is the tokenizer of something"
    ):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("multiple", [4, 64])
def test_a_base_that_was_padded_is_merged(base: Path, tokenizer: Path, tmp_path: Path, multiple: int) -> None:
    """extend-model pads to any multiple, and its manifest says how many pieces there are."""
    from chinese_llama.model.resize import extend_model

    manifest = extend_model(base, tokenizer, tmp_path / "extended", pad_to_multiple_of=multiple)
    assert manifest.metrics["rows"] % multiple == 0
    merged = merge(
        tmp_path / "extended", [peft_adapter(tmp_path / "extended", tmp_path / "a")], tmp_path / "out"
    )
    assert merged.vocab_size == manifest.vocab_size
    assert merged.metrics["rows"] == manifest.metrics["rows"]


def test_added_tokens_need_a_tokenizer_json(tmp_path: Path) -> None:
    place = making.write_tokenizer(tmp_path, 53)
    (place / "added_tokens.json").write_text('{"piece52": 52}')
    assert check_tokenizer(place, 53, "it") == 53
    (place / "added_tokens.json").write_text('{"[PAD]": 53}')
    for rows in (53, 54):
        with pytest.raises(DoesNotFit, match=r"adds '\[PAD\]', which .*tokenizer.model does not have"):
            check_tokenizer(place, rows, "it")
    vocabulary = {f"p{i}": i for i in range(53)}
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "[PAD]", "id": 53}]}
    (place / "tokenizer.json").write_text(json.dumps(content))
    assert check_tokenizer(place, 54, "it") == 54


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_tokenizer_json_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadFile, match=r"tokenizer\.json: "):
        check_tokenizer(tmp_path, 53, "it")


def test_a_unigram_tokenizer_json_is_read(tmp_path: Path) -> None:
    """Its vocabulary is a list of pieces and scores."""
    content = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"content": "c", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert pieces_of(tmp_path) == {"a": 0, "b": 1, "c": 2}


# --- the card


def test_the_card_names_what_was_merged(tmp_path: Path) -> None:
    """In order, with weights where they are not 1 and methods where there is one."""
    found = [load(name, making.make(tmp_path / name, r=8, lora_alpha=32)) for name in ("plus", "law", "med")]
    found[1].weight, found[2].weight = 0.5, -1.25
    steps = [Step([found[0]]), Step(found[1:], "ties", 0.5)]
    assert card(Path("models/llama"), steps, "The figures.").splitlines() == [
        "# llama + plus + law + med",
        "",
        "Merged by `chinese-llama merge` from, in this order:",
        "",
        "- base `models/llama`",
        "- adapter `plus` (r=8, lora_alpha=32)",
        "- adapter `law` (r=8, lora_alpha=32, weight 0.5, combined by ties)",
        "- adapter `med` (r=8, lora_alpha=32, weight -1.25, combined by ties)",
        "",
        "The figures.",
        "",
        "Hashes: `chinese_llama.json`.",
    ]


@pytest.mark.parametrize("verify", [True, False])
def test_the_card_says_what_was_verified(base: Path, plain: Path, tmp_path: Path, verify: bool) -> None:
    manifest = merge(base, [plain], tmp_path / "out", verify=verify)
    line = (tmp_path / "out" / "README.md").read_text().splitlines()[-3]
    if not verify:
        assert line == "Not verified."
        assert "verified" not in manifest.metrics
        return
    figures = manifest.metrics["verified"]
    assert line == told(figures)
    assert line.startswith(f"Verified: {figures['tensors']} tensors")
    assert f"{100 * figures['logits']['difference']:.2g} %" in line
    assert figures["tensors"] == 21
    assert figures["logits"]["same_next_token"] == figures["logits"]["tokens"] > 0
    assert 0 <= figures["logits"]["difference"] < 1e-3
