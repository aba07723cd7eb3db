"""The first screen: did it work, and what did it cost?"""

from __future__ import annotations

from chinese_llama.evaluate.report.blocks import Card, Summary
from chinese_llama.evaluate.report.exams import accuracy, title
from chinese_llama.evaluate.report.made import rights
from chinese_llama.evaluate.report.values import (
    Measure,
    changes,
    count,
    decimals,
    duration,
    fixed,
    mapping,
    number,
    share,
    share_ends,
)
from chinese_llama.evaluate.report.view import Change, Stage, View, text_label

BETTER, SAME = "better", "no difference shown"
LOST = ("bad", "less")  # kinds of cards
SENTENCES = 2  # on texts that got worse; more of them share one


def summary(view: View) -> Summary:
    hoped = [_chinese(view), _tokens(view), _speed(view), _right(view), *_exams(view)]
    others = _others(view)
    gained = [card for card in hoped if card and card.kind not in LOST]
    gained += [card for card in others if card.kind == "good"]
    lost = [card for card in hoped if card and card.kind in LOST]
    lost += [card for card in others if card.kind != "good"]
    paid = [*lost, *(card for card in (_pieces(view), _time(view)) if card)]
    named = "What was gained" if _pair(view) else "What was measured"
    groups = ((named, gained), ("What it cost", paid))
    return Summary(_verdict(view), [(name, cards) for name, cards in groups if cards])


def _pair(view: View) -> tuple[Stage, Stage] | None:
    return (view.base, view.final) if view.base and view.final else None


def _changes(view: View) -> dict[str, Change]:
    """The final stage's, against the base."""
    compared = view.comparison(view.final)
    return compared.texts if compared else {}


def _said(one: Change) -> str:
    figure, between = changes(one.difference)
    return f"{figure} {between}".strip()


def _verdict(view: View) -> list[tuple[str, str]]:
    """A sentence for the Chinese text, for what was lost and kept of the others, for the control."""
    found, said = _changes(view), []
    chinese = found.get(view.chinese) if view.chinese else None
    if view.chinese and chinese and chinese.difference:
        kind = "bad" if chinese.verdict == "worse" else ""
        said.append((kind, _got(text_label(view.chinese), chinese)))
    elif not view.stages:
        said.append(("", "Nothing was measured."))
    elif not found:
        said.append(("", _uncompared(view)))
    said += _kept({text: one for text, one in found.items() if text != view.chinese and one.difference})
    return [*said, *(("", sentence) for sentence in _control(view))]


def _uncompared(view: View) -> str:
    text, pair = view.chinese, _pair(view)
    first, last = (stage.bits(text, "character") for stage in pair) if text and pair else (None, None)
    if not text or not first or not last:
        return "No comparison was made, so there is no verdict."
    places = decimals([first, last])
    return (
        f"{text_label(text)} went from {fixed(first.value, places)} to {fixed(last.value, places)} bits per "
        "character; the documents were not compared one by one."
    )


def _got(name: str, one: Change) -> str:
    if one.verdict not in ("better", "worse"):
        return f"{name}: {one.verdict or SAME} ({_said(one)})."
    return f"{name} got {one.verdict}: it takes {_more(one)[0]}."


def _kept(others: dict[str, Change]) -> list[tuple[str, str]]:
    """What exceeded its limit, what got worse otherwise, what did not, and what cannot be told."""
    broken = {text: one for text, one in others.items() if one.broken}
    worse = {text: one for text, one in others.items() if one.verdict == "worse" and not one.broken}
    rest = {text: one for text, one in others.items() if text not in broken and text not in worse}
    gained, kept = (
        [text_label(text) for text, one in rest.items() if one.verdict == verdict]
        for verdict in (BETTER, SAME)
    )
    said = [("bad", _lost(text, one, "exceeded")) for text, one in broken.items()]
    if len(worse) <= SENTENCES:
        said += [(one.kind, _lost(text, one, "got worse, within")) for text, one in worse.items()]
    else:
        named = ", ".join(f"{text_label(text)} {changes(one.difference)[0]}" for text, one in worse.items())
        said.append(("", f"More bits, but beyond no limit: {named}."))
    if gained:
        said.append(("", f"Fewer bits than before in {', '.join(gained)}."))
    if kept:
        said.append(("", f"Nothing was shown to be lost in {', '.join(kept)}."))
    for text, one in rest.items():
        if one.verdict not in (BETTER, SAME):
            said.append(("", f"{text_label(text)}: {_said(one)} bits{one.verdict and f', {one.verdict}'}."))
    return said


def _lost(text: str, one: Change, what: str) -> str:
    limit = f"{what} the limit of {_percent(one.limit)}" if one.limit is not None else "got worse"
    return f"{text_label(text)} {limit}: it takes {' '.join(_more(one)).strip()}."


def _more(one: Change) -> tuple[str, str]:
    """('1.4 % more bits', '[+1.0, +1.9]')."""
    figure, between = changes(one.difference)
    fewer = bool(one.difference and one.difference.value < 0)
    return f"{figure.lstrip('+−')} {'fewer' if fewer else 'more'} bits", between


def _percent(limit: float) -> str:
    return f"{100 * limit:.3g} %"


def _control(view: View) -> list[str]:
    """What the new vocabulary contributes: of comparisons with a control, else of the figures."""
    if not view.chinese or not view.final:
        return []
    compared = [
        one for one in view.comparisons if one.baseline.kind == "control" and view.chinese in one.texts
    ]
    if compared:
        pairs = [(one.stage.label, one.texts[view.chinese]) for one in compared]
        return [
            f"Against the control, the same training without the new vocabulary, {label} takes "
            f"{' '.join(_more(one)).strip()} in {text_label(view.chinese)}."
            for label, one in pairs
            if one.difference
        ]
    final = view.final.bits(view.chinese, "character")
    found = [(stage, stage.bits(view.chinese, "character")) for stage in view.controls]
    places = decimals([final, *(one for _, one in found)])
    return [
        f"The control without the new vocabulary came to {fixed(one.value, places)} bits per character, "
        f"{view.final.label} to {fixed(final.value, places)}."
        for _, one in found
        if one and final
    ]


def _chinese(view: View) -> Card | None:
    text, pair = view.chinese, _pair(view)
    if not text or not view.base:
        return None
    first, last = (stage.bits(text, "character") for stage in pair or (view.base, view.base))
    if not first or not last:
        return None
    places = decimals([first, last])
    one = _changes(view).get(text) if pair else None
    line = "What the model needs to spell out unseen text; lower is better."
    unit = "bits per character" + (f", {_said(one)}" if one and one.difference else "")
    before = fixed(first.value, places) if pair else ""
    return Card(text_label(text), before, fixed(last.value, places), unit, line, one.kind if one else "")


def _tokens(view: View) -> Card | None:
    pair, text = _pair(view), view.chinese
    if not pair or not text:
        return None
    first, last = (stage.tokens_per_character(text) for stage in pair)
    if not first or not last:
        return None
    unit = f"tokens per character, {text_label(text)}"
    line = (
        f"The same text takes {share(1 - last / first)} fewer tokens."
        if last < first
        else "No shorter than before."
    )
    return Card("Length of text", fixed(first), fixed(last), unit, line, "good" if last < first else "")


def _speed(view: View) -> Card | None:
    pair = _pair(view)
    first, last = (stage.speed() for stage in pair) if pair else (None, None)
    if not first or not last:
        return None
    places = 0 if max(first, last) >= 100 else 1
    line = f"{fixed(last / first, 1)} times the speed in decoding."
    kind = "good" if last > first else "bad" if last < first else ""
    return Card("Decoding", fixed(first, places), fixed(last, places), "characters per second", line, kind)


def _right(view: View) -> Card | None:
    found = rights(view)
    if not found:
        return None
    own = view.base.label if view.base else ""
    (label, told, part), others = found[0], [one for one in found[1:] if one[0] == own]
    before = others[0][1].split(" of ")[0] if others else ""
    right, _, asked = told.partition(" of ")
    line = f"By {label}: the answer holds the keyword."
    kind = "less" if before and _int(right) < _int(before) else ""
    return Card("Questions", before, right, f"of {asked} answered right, {part}", line, kind)


def _int(text: str) -> int:
    return int(text.replace(",", "").replace("−", "-"))


def _exams(view: View) -> list[Card]:
    pair = _pair(view)
    cards = []
    for name, exam in pair[1].exams().items() if pair else ():
        last = accuracy(exam.get("average"))
        first = accuracy(mapping(pair[0].exams().get(name)).get("average")) if pair else None
        if last:
            before = fixed(100 * first.value, 1) if first else ""
            ends = f" {share_ends(last, 1)}".rstrip()
            line = "Multiple choice of four: guessing gives 25 %."
            kind = _shown(first, last) if first else ""
            cards.append(Card(title(name), before, share(last.value, 1), f"answered right{ends}", line, kind))
    return cards


def _shown(first: Measure, last: Measure) -> str:
    """good or bad where the intervals lie apart; else less where the second figure is the smaller one."""
    if first.high is not None and last.low is not None and last.low > first.high:
        return "good"
    if first.low is not None and last.high is not None and last.high < first.low:
        return "bad"
    return "less" if last.value < first.value else ""


def _others(view: View) -> list[Card]:
    """English, and of the others the one that got worst: without English, or where it got worse beyond what was allowed."""
    found = _changes(view)
    texts = [text for text in view.texts if text != view.chinese]

    def size(text: str) -> float:
        one = found.get(text)
        return one.difference.value if one and one.difference else -1e9

    own = ["en"] if "en" in texts else []
    rest = sorted((text for text in texts if text != "en"), key=size, reverse=True)
    passed = [text for text in rest if text in found and found[text].kind == "bad"]
    return [card for text in (own + passed or rest)[:2] if (card := _other(view, text, found.get(text)))]


def _other(view: View, text: str, one: Change | None) -> Card | None:
    first, last = (stage.bits(text, "byte") for stage in _pair(view) or ()) if _pair(view) else (None, None)
    if not first or not last:
        return None
    places = decimals([first, last])
    unit = "bits per byte" + (f", {_said(one)}" if one and one.difference else "")
    line = (one.verdict[:1].upper() + one.verdict[1:] if one and one.verdict else "Not compared") + _limit(
        one
    )
    return Card(
        text_label(text),
        fixed(first.value, places),
        fixed(last.value, places),
        unit,
        line,
        one.kind if one else "",
    )


def _limit(one: Change | None) -> str:
    if one is None or one.limit is None:
        return "."
    return f"; the limit of {_percent(one.limit)} is {'exceeded' if one.broken else 'kept'}."


def _pieces(view: View) -> Card | None:
    told = mapping(view.told.get("vocabulary"))
    base, size = count(told.get("base_size")), count(told.get("size"))
    if not size:
        return None
    added = count(told.get("added"))
    line = (
        f"{added} new pieces, each a row in both vocabulary matrices."
        if added
        else "Pieces of the tokenizer."
    )
    return Card("Vocabulary", base, size, "pieces", line)


def _time(view: View) -> Card | None:
    spent = duration(view.told.get("seconds"))
    return Card("Time", "", spent, "", f"For all of it{_read(view)}.") if spent else None


def _read(view: View) -> str:
    logs = [log for log in mapping(view.told.get("curves")).values() if isinstance(log, list)]
    read = [max((number(mapping(e).get("characters")) or 0.0 for e in log), default=0.0) for log in logs]
    return f"; {count(sum(read))} characters were read in training" if sum(read) else ""
