"""Stop strings: found wherever pieces are cut, never given out in part, nothing else held back."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from inference.stops import StopStrings

# Two letters make stop strings, their beginnings and overlaps of several frequent; the others take more than one byte.
TEXT = st.text("abé🙂", max_size=40)
STOPS = st.lists(st.text("abé🙂", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The answer to `text` by definition: what comes before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        complete = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: min(complete)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(TEXT, STOPS, st.data())
def test_any_cutting_gives_the_same(text: str, stops: list[str], data: st.DataObject) -> None:
    """Whatever the pieces: the text before the first stop string, each piece as early as it can be."""
    expected, met = cut(text, stops)
    scan = StopStrings(stops)
    out = seen = ""
    rest = text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:length], rest[length:]
        seen += piece
        out += scan.feed(piece)
        if scan.is_met:
            break
        held = seen[len(out) :]
        assert seen.startswith(out)
        # What is held back may still become a stop string, and no longer end of the text may.
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(seen[at:]) for stop in stops for at in range(len(out)))
    out += scan.finish()
    assert (out, scan.is_met) == (expected, met)


def test_nothing_comes_after_a_stop() -> None:
    scan = StopStrings(["END"])
    assert [scan.feed(piece) for piece in ("ab E", "N", "D more", "and more")] == ["ab ", "", "", ""]
    assert scan.is_met
    assert scan.finish() == ""


def test_without_stop_strings_text_passes() -> None:
    scan = StopStrings([])
    assert [scan.feed("a"), scan.feed(""), scan.finish()] == ["a", "", ""]
    assert not scan.is_met
