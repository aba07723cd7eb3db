"""The rating page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.evaluate.answers import VOTES, Answered
from chinese_llama.evaluate.rating import Server, page, shown
from tests.evaluate.rated import NASTY, PAIRS


def find(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements("css selector", selector))


def click(browser: Any, selector: str) -> None:
    (found,) = find(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
    found.click()


def until(browser: Any, there: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10, 0.02).until(lambda _: there())


def wait(browser: Any, progress: str) -> None:
    until(browser, lambda: find(browser, "#progress")[0].text == progress)


def pressed(browser: Any) -> dict[str, str]:
    return {
        button.find_element("xpath", "ancestor::section").get_attribute("data-number"): button.get_attribute(
            "data-vote"
        )
        for button in find(browser, "button[aria-pressed=true]")
    }


def complaints(browser: Any) -> list[str]:
    """What the console says, but for the icon of the tab that browsers ask for."""
    return [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


def test_votes_are_in_the_file_and_there_after_a_reload(browser: Any, server: Server, tmp_path: Path) -> None:
    browser.get(server.url)
    wait(browser, "已评 0 / 5")
    click(browser, "#p2 button[data-vote=second]")
    wait(browser, "已评 1 / 5")
    click(browser, "#p4 button[data-vote=bad]")
    wait(browser, "已评 2 / 5")
    click(browser, "#p2 button[data-vote=first]")
    until(browser, lambda: pressed(browser) == {"2": "first", "4": "bad"})
    browser.refresh()
    wait(browser, "已评 2 / 5")
    assert pressed(browser) == {"2": "first", "4": "bad"}
    assert [a.get_attribute("class") for a in find(browser, "#p2 article")] == ["better", ""]
    votes = [json.loads(line) for line in (tmp_path / VOTES).read_text(encoding="utf-8").splitlines()]
    assert [(v["number"], v["vote"]) for v in votes] == [
        (2, shown(2, "AB", 0)[1]),
        (4, "bad"),
        (2, shown(2, "AB", 0)[0]),
    ]
    assert complaints(browser) == []


def test_keys_vote_on_the_marked_prompt(browser: Any, server: Server) -> None:
    browser.get(server.url)
    body = find(browser, "body")[0]
    for done, key in enumerate("34", 1):
        body.send_keys(key)
        wait(browser, f"已评 {done} / 5")
    assert pressed(browser) == {"1": "tie", "2": "bad"}
    click(browser, "#p1 h2")
    body.send_keys("2")
    until(browser, lambda: pressed(browser) == {"1": "second", "2": "bad"})
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    body.send_keys("1")
    until(browser, lambda: bool(browser.execute_script("return scrollY") < 200))
    assert pressed(browser) == {"1": "second", "2": "bad"}, "out of sight it is brought back first"
    browser.refresh()
    assert find(browser, "section.current")[0].get_attribute("id") == "p3"


def test_a_vote_that_is_not_kept_is_told(browser: Any, server: Server, tmp_path: Path) -> None:
    browser.get(server.url)
    (tmp_path / VOTES).mkdir()
    click(browser, "#p1 button[data-vote=tie]")
    until(browser, lambda: "cannot be written" in find(browser, "#trouble")[0].text)
    assert pressed(browser) == {}
    browser.get_log("browser")


def test_no_script_of_an_answer_runs(browser: Any, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "answers.html"
    file.write_text(page(server.votes.answers, server.votes.names, 0), encoding="utf-8")
    for place in (server.url, file.as_uri()):
        browser.get(place)
        assert "owned" not in browser.title
        assert NASTY in [text.text for text in find(browser, "#p2 .text")]
        assert find(browser, "main img, main script") == []
        # and if one were not escaped, the policy would stop it
        browser.execute_script("document.querySelector('main').innerHTML = arguments[0]", NASTY)
        browser.execute_script(
            "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\";"
            "document.body.append(s)"
        )
        assert len(find(browser, "main img")) == 1
        assert "owned" not in browser.title
        browser.get_log("browser")


@pytest.mark.parametrize("voting", [True, False])
def test_a_phone_does_not_scroll_sideways(voting: bool, browser: Any, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "answers.html"
    file.write_text(page(server.votes.answers, server.votes.names, 0), encoding="utf-8")
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(server.url if voting else file.as_uri())
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [
            390,
            390,
        ]
        one, two = (article.rect for article in find(browser, "#p1 article"))
        assert one["x"] == two["x"] and two["y"] > one["y"] + one["height"]
        buttons = find(browser, "#p1 button")
        assert len(buttons) == 4 * voting and all(button.rect["height"] >= 40 for button in buttons)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    one, two = (article.rect for article in find(browser, "#p1 article"))
    assert one["y"] == two["y"] and two["x"] > one["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: str, browser: Any, server: Server) -> None:
    """A contrast of 4.5 at least (WCAG 2.2, 1.4.3) of every text and its ground."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    server.votes.add(1, "first")
    try:
        browser.get(server.url)
        assert pressed(browser) == {"1": "first"}
        found = browser.execute_script(CONTRASTS)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(found) > 30
    assert min(found) >= 4.5
    assert len({round(ratio, 3) for ratio in found}) > 3


CONTRASTS = """
const light = colour => {
  const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
return [...document.querySelectorAll("body *")]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.offsetParent)
  .map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
"""


def test_one_model_is_read(browser: Any, tmp_path: Path) -> None:
    answered = [Answered(n, f"问 {n}", {"A": pair[0]}) for n, pair in enumerate(PAIRS, 1)]
    (tmp_path / "a.html").write_text(page(answered, {"A": "work/merged"}, 0), encoding="utf-8")
    browser.get((tmp_path / "a.html").as_uri())
    assert "work/merged" in find(browser, "header")[0].text
    assert len(find(browser, "article")) == 5 and find(browser, "button") == []
    assert complaints(browser) == []
