"""What an adaptation may leave to report: realistic figures, made by rule."""

from __future__ import annotations

import math
from typing import Any

SUBJECTS = {
    "STEM": 20,
    "Social Science": 10,
    "Humanities": 11,
    "Other": 11,
}
PROMPTS = (
    ("中国的首都是哪里？", "北京", "\n\nThe capital of the\n", "中国的首都是北京，故宫和长城都在那里。"),
    (
        "小孩换牙掉的牙叫什么？",
        "乳牙",
        "a ? ?\n",
        "小孩换牙时掉的牙叫乳牙。乳牙一般有二十颗，从六岁左右开始脱落。",
    ),
    (
        "“亡羊补牢”是什么意思？",
        "补救",
        "is the first time",
        "比喻出了问题以后想办法补救，可以防止继续受损失。",
    ),
    ("请把下面的句子改成被字句：\n小猫打碎了花瓶。", "被", "1. 2. 3.", "花瓶被小猫打碎了。"),
    (
        "写一段三句话的自我介绍。",
        "",
        "I am a student",
        "大家好，我叫李明。\n我来自北京，今年二十岁。\n我喜欢读书和打篮球。",
    ),
    ("水的化学式是什么？", "H2O", "the the the", "水的化学式是二氧化碳。"),
)


def figures(zh: float | None, en: float | None, code: float | None, per_token: float) -> dict[str, Any]:
    """{set: figures}; zh is per character, the others per byte. The intervals are two per cent wide."""
    told = {}
    for name, bits, size, held in (
        ("zh", zh, 3.0, per_token),
        ("en", en, 1.0, 4.1),
        ("code", code, 1.02, 2.9),
    ):
        if bits is not None:
            per = {
                "bits_per_character": bits if size == 3 else bits * size,
                "bits_per_byte": bits / size if size == 3 else bits,
            }
            told[name] = {
                **per,
                "interval": {key: [value * 0.985, value * 1.018] for key, value in per.items()},
                "characters_per_token": held,
                "perplexity": 2 ** (per["bits_per_character"] * held),
                "characters": 211_480,
                "bytes": int(211_480 * size),
                "tokens": int(211_480 / held),
                "documents": 412,
                "window": 512,
                "stride": 256,
                "context": 271.5,
            }
    return told


def exam(right: float) -> dict[str, Any]:
    """C-Eval with 52 subjects in four categories around a share of right answers."""
    subjects, categories = {}, {}
    for index, (category, many) in enumerate(SUBJECTS.items()):
        for n in range(many):
            accuracy = right + 0.02 * index + 0.05 * math.sin(3 * n + index)
            subjects[f"{category.lower().replace(' ', '_')}_subject_{n + 1}"] = {
                "accuracy": accuracy,
                "stderr": 0.09,
                "questions": 22 + n,
                "category": category,
            }
        categories[category] = {
            "accuracy": right + 0.02 * index,
            "stderr": 0.5 / math.sqrt(many * 26),
            "questions": many * 26,
        }
    return {
        "exam": "ceval",
        "place": "data/ceval",
        "shots": 5,
        "questions": 1346,
        "source": "lm-eval 0.4.13",
        "average": {"accuracy": right + 0.03, "stderr": 0.0123},
        "categories": categories,
        "subjects": subjects,
    }


def stage(name: str, label: str, texts: dict[str, Any], speed: float, right: float) -> dict[str, Any]:
    held = texts["zh"]["characters_per_token"]
    return {
        "name": name,
        "label": label,
        "texts": texts,
        "choices": [exam(right)] if right else [],
        "speed": {
            "characters_per_second": speed, "tokens_per_second": speed / held, "characters_per_token": held,
            "characters": 600, "device": "cpu", "dtype": "float32",
        },
        "wikitext": {"word_perplexity": 61.2 - right, "byte_perplexity": 2.16, "bits_per_byte": 1.111, "documents": 62},
    }  # fmt: skip


def curve(start: float, end: float, steps: int, evals: bool, zh: tuple[float, float]) -> list[dict[str, Any]]:
    """A log of `steps` entries that falls as logs do, with a little noise, measured five times."""
    log = []
    for step in range(1, steps + 1):
        part = step / steps
        noise = 0.13 * math.sin(12.9898 * step) * math.cos(78.233 * step)
        entry: dict[str, Any] = {
            "step": step,
            "loss": end + (start - end) * math.exp(-5 * part) + noise,
            "learning_rate": 1e-3 * (1 - part),
            "characters": step * 2_048,
        }
        if evals and (step == 1 or step % (steps // 5) == 0):
            bits = zh[1] + (zh[0] - zh[1]) * math.exp(-4 * part)
            entry["eval"] = {
                "zh": {"bits_per_character": bits, "bits_per_byte": bits / 3},
                "en": {"bits_per_character": 2.15 - 0.02 * part, "bits_per_byte": 2.15 - 0.02 * part},
            }
        log.append(entry)
    return log


def comparison(
    stage: str, zh: tuple[float, ...], en: tuple[float, ...], code: tuple[float, ...]
) -> dict[str, Any]:
    """Each text: relative change, low, high."""
    texts = {}
    for name, (found, low, high) in (("zh", zh), ("en", en), ("code", code)):
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        texts[name] = {"difference": found, "interval": [low, high], "verdict": verdict}
    limits = {"en": 0.02, "code": 0.05}
    broken = [name for name, limit in limits.items() if texts[name]["interval"][0] > limit]
    return {"stage": stage, "baseline": "base", "texts": texts, "limits": limits, "broken": broken}


def whole() -> dict[str, Any]:
    """Everything that `told` may hold."""
    stages = [
        stage("base", "base", figures(17.80, 2.150, 2.61, 0.52), 31.2, 0.24),
        stage("extended", "extended", figures(19.31, 2.151, 2.61, 1.51), 88.0, 0),
        stage("plus", "plus (continued pretraining)", figures(7.41, 2.131, 2.60, 1.51), 86.4, 0.27),
        stage("alpaca", "alpaca, unmerged", figures(8.10, 2.181, 2.83, 1.51), 71.9, 0),
        stage("merged", "merged", figures(8.10, 2.181, 2.83, 1.51), 90.3, 0.31),
        stage("control", "control without new pieces", figures(14.1, 2.148, 2.62, 0.52), 30.9, 0.25),
    ]
    samples = [
        {"prompt": prompt, "keyword": keyword or None, "answers": {"base": before, "merged": after}}
        for prompt, keyword, before, after in PROMPTS
    ]
    roles = ("base", "Chinese vocabulary", "tokenizer", "extended", "plus", "alpaca", "merged", "text zh")
    return {
        "title": "From base-proxy to Chinese",
        "created": "2026-05-04T12:31:07Z",
        "tool": "chinese-llama 0.6.0",
        "seconds": 8_063.4,
        "artifacts": [
            {
                "role": role, "path": f"/data/models/experiments/spring/chinese/{role.replace(' ', '-')}",
                "sha256": f"{index:x}7c0de5a" * 8, "vocab_size": None if "text" in role else 32_000 if role == "base" else 49_920,
                "made_by": "given" if role in ("base", "text zh") else f"make-{role.split()[0]}",
            }
            for index, role in enumerate(roles)
        ],
        "vocabulary": {
            "base_size": 32_000, "size": 49_920, "added": 17_920, "policy": "lossless",
            "scripts": {
                "Chinese": {"characters": 180_211, "base_tokens": 348_802, "tokens": 112_210},
                "Chinese marks": {"characters": 21_007, "base_tokens": 38_021, "tokens": 15_002},
                "Latin": {"characters": 8_204, "base_tokens": 2_702, "tokens": 2_702},
                "digits": {"characters": 2_058, "base_tokens": 2_058, "tokens": 2_058},
            },
            "tokens_per_character": {"base": 1.923, "extended": 0.662},
        },
        "stages": stages,
        "comparisons": [
            comparison("plus", (-0.584, -0.590, -0.577), (-0.0088, -0.012, -0.005), (-0.0038, -0.010, 0.004)),
            comparison("alpaca", (-0.545, -0.552, -0.538), (0.0144, 0.0102, 0.0187), (0.084, 0.071, 0.097)),
            comparison("merged", (-0.545, -0.552, -0.538), (0.0144, 0.0102, 0.0187), (0.084, 0.071, 0.097)),
        ],
        "curves": {
            "plus": curve(7.2, 3.4, 200, True, (19.31, 7.41)),
            "alpaca": curve(3.9, 2.2, 40, True, (7.41, 8.10)),
        },
        "right": {
            "base": {"questions": 120, "right": 1, "share": 1 / 120, "interval": [0.0015, 0.0457]},
            "merged": {"questions": 120, "right": 100, "share": 100 / 120, "interval": [0.756, 0.889]},
        },
        "samples": samples,
        "settings": {
            "pt_lora": {
                "learning_rate": 0.001, "lora_r": 8, "data": ["data/zh.jsonl.gz", {"path": "data/en.jsonl.gz", "weight": 0.2}],
                "block_size": 512, "embeddings": "new-rows", "seed": 42,
            },
            "sft_lora": {"learning_rate": 0.0005, "template": "chinese-alpaca", "max_seq_length": 512},
            "merge": {"loras": ["plus", "alpaca"], "dtype": None},
        },
        "notes": ["The control read the same 409,600 characters as plus, with the base's own tokenizer."],
    }  # fmt: skip


ODD = "<script>alert('x')</script> & \"q\" | `a` **b** _c_ [l](u) \x1b[31m\x00 \u202eevil\u202c 👩‍👩‍👧 مرحبا \ud800 第一行\n第二行\r\n# 1. x"


def odd() -> dict[str, Any]:
    """`whole` with every name and text of others turned into ODD."""
    told = whole()
    told |= {"title": ODD, "tool": ODD, "notes": [ODD]}
    for stage_ in told["stages"]:
        stage_["label"] = f"{stage_['name']} {ODD}"
        stage_["texts"][ODD] = stage_["texts"]["en"]
    told["comparisons"][0]["texts"][ODD] = told["comparisons"][0]["texts"]["en"]
    told["artifacts"][0] |= {"path": "/long" * 80 + ODD, "role": ODD, "made_by": ODD}
    told["curves"][ODD] = told["curves"].pop("alpaca")
    told["settings"] = {ODD: {ODD: ODD, "list": [ODD]}}
    told["vocabulary"]["scripts"][ODD] = told["vocabulary"]["scripts"]["Latin"]
    told["samples"] = [
        {"prompt": ODD, "keyword": "<script>", "answers": {"base": ODD, "merged": "", ODD: "字" * 3000, "plus": ODD * 9}}
    ]  # fmt: skip
    return told


def damaged(value: Any, random: Any) -> Any:
    """`value` with some of its parts missing, empty, of another type or not finite."""
    if random.random() < 0.04:
        return random.choice(
            [None, math.nan, math.inf, -1, 0, 1e308, 1e-320, True, "", ODD, [], {}, [None], {"": None}]
        )
    if isinstance(value, dict):
        return {key: damaged(item, random) for key, item in value.items() if random.random() > 0.03}
    if isinstance(value, list):
        return [damaged(item, random) for item in value if random.random() > 0.03]
    return value
