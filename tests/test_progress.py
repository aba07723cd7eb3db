"""Progress never changes what passes through, and is silent where nobody looks on."""

from __future__ import annotations

import pytest

from chinese_llama.progress import Stopwatch, say, track


def test_track_passes_items_on_lazily_and_silently(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    tracked = track((seen.append(i) or i for i in range(5)), "counting")
    assert next(tracked) == 0
    assert seen == [0]
    assert list(tracked) == [1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_an_error_inside_passes_through() -> None:
    def broken() -> object:
        yield 1
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        list(track(broken(), "counting"))  # type: ignore[arg-type]


def test_say_leaves_stdout_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    say("working")
    assert capsys.readouterr() == ("", "working\n")


def test_a_stopwatch_runs_forward() -> None:
    watch = Stopwatch()
    first = watch.seconds()
    assert 0 <= first <= watch.seconds()
