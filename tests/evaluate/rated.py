"""Made answers of two models, to be rated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chinese_llama.evaluate.answers import ANSWERS

NASTY = "</div></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PAIRS = [("北京。", "上海。"), ("《秋》\n\n叶落", NASTY), ("", "x" * 300), ("一", "二"), ("a", "b")]


def write(directory: Path, pairs: Any = PAIRS) -> Path:
    records = [
        {"number": n, "prompt": f"问题 {n} & <b>", "answers": dict(zip("AB", pair, strict=False))}
        for n, pair in enumerate(pairs, 1)
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (directory / ANSWERS).write_text(text, encoding="utf-8")
    return directory
