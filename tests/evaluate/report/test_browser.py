"""The page in a real browser: on a phone and a desk, light and dark, in Chinese; skipped where there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.evaluate.report import page
from tests.evaluate.report.adaptations import odd, whole

PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in ("whole", "odd", "nothing")}
    for name, told in (("whole", whole()), ("odd", odd()), ("nothing", {})):
        made[name].write_text(page.html(told), encoding="utf-8")
    return made


def show(browser: Any, file: Path, width: int = PHONE, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())


@pytest.mark.parametrize("name", ["whole", "odd", "nothing"])
def test_it_loads_nothing_and_complains_of_nothing(browser: Any, files: dict[str, Path], name: str) -> None:
    show(browser, files[name])
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
@pytest.mark.parametrize("name", ["whole", "odd"])
def test_nothing_scrolls_sideways(browser: Any, files: dict[str, Path], name: str, width: int) -> None:
    show(browser, files[name], width)
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_words_of_plots_can_be_read(browser: Any, files: dict[str, Path]) -> None:
    """At least 10 px, inside the window, and none over another."""
    show(browser, files["whole"])
    found = browser.execute_script(
        """return [...document.querySelectorAll('svg.plot')].map(plot => {
             const scale = plot.getBoundingClientRect().width / plot.viewBox.baseVal.width;
             return [...plot.querySelectorAll('text')].map(text => {
               const at = text.getBoundingClientRect();
               return [text.textContent, parseFloat(getComputedStyle(text).fontSize) * scale,
                       at.left, at.right, at.top, at.bottom]; }); });"""
    )
    assert len(found) >= 12
    for texts in found:
        for text, size, left, right, _, _ in texts:
            assert size >= 10, text
            assert left >= 0 and right <= PHONE, (text, left, right)
        for index, (text, _, left, right, top, bottom) in enumerate(texts):
            for other, _, l2, r2, t2, b2 in texts[index + 1 :]:
                over = min(right, r2) - max(left, l2) > 1 and min(bottom, b2) - max(top, t2) > 4
                assert not over, (text, other)


def test_light_and_dark_differ_and_both_can_be_read(browser: Any, files: dict[str, Path]) -> None:
    """All text has a contrast of 4.5 or more against the paper (WCAG 2.1, success criterion 1.4.3)."""
    papers = []
    for scheme in ("light", "dark"):
        show(browser, files["whole"], DESK, scheme)
        paper, inks = browser.execute_script(
            """const inks = new Set();
               for (const one of document.querySelectorAll('body *')) {
                 const own = [...one.childNodes].some(node => node.nodeType == 3 && node.data.trim());
                 const style = getComputedStyle(one), named = ['title', 'desc'].includes(one.tagName);
                 if (own && !named) inks.add(one.closest('svg') ? style.fill : style.color);
               }
               return [getComputedStyle(document.body).backgroundColor, [...inks]];"""
        )
        papers.append(light(paper))
        assert len(inks) >= 5
        for ink in inks:
            high, low = sorted((light(ink), light(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink)
    assert papers[0] > 0.9 and papers[1] < 0.02


def light(colour: str) -> float:
    """Relative luminance of 'rgb(r, g, b)'."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_chinese_has_glyphs(browser: Any, files: dict[str, Path]) -> None:
    """Different characters give different pictures, in the fonts of text, of code and of plots; empty boxes
    would be alike."""
    fonts = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True).stdout
    if not fonts:
        pytest.skip("no Chinese font on this system")
    show(browser, files["whole"], DESK)
    pictures = browser.execute_script(
        """return ['body', 'code', 'svg.plot text'].flatMap(place => {
             const face = getComputedStyle(document.querySelector(place)).fontFamily;
             return ['中', '国', '语', '\u9fff'].map(character => {
               const sheet = document.createElement('canvas'); sheet.width = sheet.height = 32;
               const pen = sheet.getContext('2d'); pen.font = '24px ' + face; pen.fillText(character, 2, 26);
               return sheet.toDataURL(); }); });"""
    )
    for first in (0, 4, 8):
        assert len(set(pictures[first : first + 3])) == 3


def test_details_open_without_script_and_long_answers_stay_in_their_box(
    browser: Any, files: dict[str, Path]
) -> None:
    show(browser, files["odd"])
    browser.execute_script("document.querySelector('summary').click()")
    assert browser.execute_script("return document.querySelector('details').open")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.said')].map(one => one.getBoundingClientRect().height)"
    )
    assert len(heights) == 4 and max(heights) < 400


def test_print_shows_what_is_folded(browser: Any, files: dict[str, Path]) -> None:
    show(browser, files["whole"], 760)
    seen = "return [...document.querySelectorAll('details table')].map(one => one.checkVisibility())"
    assert not any(browser.execute_script(seen))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert all(browser.execute_script(seen))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 760
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
