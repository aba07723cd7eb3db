"""Texts of every kind that tokenizers part over."""

from __future__ import annotations

from hypothesis import strategies as st

from chinese_llama.vocab.proto import SPACE

SPECIAL = ["<s>", "</s>", "<unk>", "[PAD]", "<0x41>", SPACE, SPACE * 3, "\u3000", "\xa0", "\ufeff", "\0"]
CLASSES = {
    "empty": "",
    "leading spaces": "   the sea",
    "a leading space before Chinese": " 中国",
    "trailing spaces": "the sea   ",
    "a trailing space behind Chinese": "中国 ",
    "repeated spaces": "the  quick   brown    fox" + " " * 40 + "end",
    "spaces only": " " * 7,
    "tabs": "\tthe\t\tsea\t中国\t",
    "CR and LF": "the\r\nsea\n\n中国\r\r\n\r",
    "emoji": "😀 ❤️ 中国🎉",
    "ZWJ sequences": "👨‍👩‍👧‍👦中👩🏽‍💻a🏳️‍🌈",
    "rare Han": "䶮、𠮷、𪚥、龘；𰻝",
    "compatibility Han": "豈更車賈滑\U0002f800中国",
    "kana": "ひらがなカタカナｱｲｳヶゝ中国",
    "full width": "ＡＢＣ１２３，；：？！［］｛｝～￥",
    "the ideographic space": "　中国　　the",
    "combining marks": "e\u0301n\u0303 中\u0301国\u20dd ก็ ́",
    "literal control tokens": "<s>中国</s> <unk>[PAD] <s><s></s>[PAD]",
    "literal byte tokens": "<0xE4><0xB8><0xAD> 中",
    "zero widths and the byte-order mark": "\ufeff中\u200b国\u2060a\u200d",
    "private use and the last character": "\ue000中\U0010ffff",
    "control characters": "\0\x01中\x7f\x85a",
    "marks that are shared with English": "“中国”——‘北京’……“the” · …",
    "right to left": "العربية中国עברית",
}
PARTS = st.one_of(
    st.text(st.characters(codec="ascii"), max_size=12),
    st.text("中国的首都是北京长江越来多人，。！？（）“”", max_size=12),
    st.text("のカタｱ繁體龘䶮𠮷豈ＡＢ１", max_size=6),
    st.text("😀👨‍👩‍👧❤️é\u0301한ह", max_size=6),
    st.text(" \t\n\r", max_size=20),
    st.sampled_from(SPECIAL),
    st.sampled_from(sorted(CLASSES.values())),
    st.builds(lambda unit, times: unit * times, st.text("ab -=的中国 ▁", min_size=1, max_size=3), st.integers(2, 20)),
    st.text(max_size=8),
)  # fmt: skip
TEXTS = st.lists(PARTS, max_size=6).map("".join)
