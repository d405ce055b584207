"""Stop strings end a stream exactly where cutting the whole text would, and never show a part of themselves."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.stopping import StopStrings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [i for i in (text.find(s) for s in stops) if i >= 0]
    return (text[: min(found)], True) if found else (text, False)


def stream(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stopper, out = StopStrings(stops), ""
    for piece in pieces:
        safe, hit = stopper.push(piece)
        out += safe
        if hit:
            assert stopper.push("more") == ("", True)
            break
    out += stopper.flush()
    return out, stopper.hit


few_letters = st.text("abc\n", max_size=40)


@given(
    st.lists(st.text("abc\n", max_size=5), max_size=12), st.lists(st.text("abc\n", min_size=1, max_size=6), max_size=4)
)
@settings(max_examples=600, deadline=None)
def test_any_chunking_equals_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    assert stream(pieces, stops) == cut("".join(pieces), stops)


@given(few_letters, st.lists(st.text("abc\n", min_size=1, max_size=6), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_nothing_is_held_back_that_cannot_begin_a_stop(text: str, stops: list[str]) -> None:
    stopper = StopStrings(stops)
    out = ""
    for i, character in enumerate(text):
        safe, hit = stopper.push(character)
        out += safe
        if hit:
            return
        held = text[len(out) : i + 1]
        assert held == "" or any(s.startswith(held) or s in held for s in stops)


def test_the_beginning_of_a_stop_string_waits_and_is_released_when_it_is_none() -> None:
    stopper = StopStrings(["\nUser:"])
    assert stopper.push("Hello\nUs") == ("Hello", False)
    assert stopper.push("") == ("", False)
    assert stopper.push("eful\n") == ("\nUseful", False)
    assert stopper.flush() == "\n"
    assert not stopper.hit


def test_a_possible_longer_stop_that_began_earlier_is_waited_for() -> None:
    stopper = StopStrings(["abcd", "c"])
    assert stopper.push("xabc") == ("x", False)
    assert stopper.push("d!") == ("", True)
    again = StopStrings(["abcd", "c"])
    assert again.push("xabc") == ("x", False)
    assert again.flush() == "ab"
    assert again.hit


def test_without_stops_text_passes() -> None:
    assert StopStrings([]).push("anything") == ("anything", False)


@pytest.mark.parametrize("size", [200_000])
def test_hostile_stop_strings_take_linear_time(size: int) -> None:
    started = time.process_time()
    text = "a" * size
    assert stream([text], ["a" * 999 + "b"]) == (text, False)
    assert time.process_time() - started < 2.0
