"""Nothing a terminal would obey gets through, everything a person would read does, however the text is split."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.sanitize import PrintableFilter, printable

FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# Everything sequences are made of, so that random text holds many of them, whole and broken.
risky = st.text(
    st.one_of(
        st.sampled_from("\x1b\x1b\x1b[]P^_X\\\x07\x18\x9b\x9c\x9d;:?0189mHc (\n\t\r\x00\x7f\u202e\u2069\ud800é😀"),
        st.characters(),
    ),
    max_size=40,
)


@given(risky, st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=600, deadline=None)
def test_any_split_gives_the_same_safe_text(text: str, cuts: list[int]) -> None:
    whole = printable(text)
    assert not FORBIDDEN.search(whole)
    splitter, out, before = PrintableFilter(), "", 0
    for cut in [*sorted(cuts), len(text)]:
        out += splitter.push(text[before:cut])
        before = max(before, cut)
    assert out == whole
    assert printable(whole) == whole


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=BIDI)))
@settings(max_examples=200, deadline=None)
def test_visible_text_is_kept(text: str) -> None:
    assert printable(text) == text
    assert printable("\x1b[1m" + text + "\x1b[0m\n") == text + "\n"


@given(st.text("abc[]0;m\n é", max_size=30))
@settings(max_examples=200, deadline=None)
def test_text_after_any_broken_sequence_is_kept_from_the_next_line_on(text: str) -> None:
    for begin in ("\x1b", "\x1b[", "\x1b[31", "\x1b]0;x", "\x1bP", "\x1b(", "\x9b", "\x9d", "\x1b]x\x1b"):
        assert printable(begin + "\n" + text) == "\n" + text


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[38;5;196;48:2::1:2:3mred\x1b[m", "red"),
        ("a\x1b[2J\x1b[Hb", "ab"),
        ("\x1b[?1049h\x1b[?2004hx", "x"),
        ("\x1b]0;new title\x07text", "text"),
        ("\x1b]52;c;ZXZpbA==\x1b\\text", "text"),
        ("\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\ here", "click here"),
        ('\x1bP$q"p\x1b\\text', "text"),
        ("\x1b_Gf=100;AAAA\x1b\\text", "text"),
        ("\x1b^private\x9ctext", "text"),
        ("\x9b31mred\x9b0m", "red"),
        ("\x9d0;title\x9ctext", "text"),
        ("\x1bcreset \x1b(0line\x1b#8\x1b=.", "reset line."),
        ("\x1b]0;title\x1b[31mred", "red"),  # a new sequence ends the control string
        ("\x1b[31\x18mtext", "mtext"),  # CAN breaks a sequence off
        ("\x1b[3é", "é"),
        ("one\r\ntwo\rthree\x08\x07\x0c\x0b", "one\ntwothree"),
        ("tab\tkept", "tab\tkept"),
        ("user\u202e\u2066 txt.exe\u2069", "user txt.exe"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("[/INST] [bold]not markup[/bold] \\[", "[/INST] [bold]not markup[/bold] \\["),
        ("family 👨‍👩‍👧 עברית \u200f العربية", "family 👨‍👩‍👧 עברית \u200f العربية"),
    ],
)
def test_known_payloads(payload: str, shown: str) -> None:
    assert printable(payload) == shown
    one_by_one = PrintableFilter()
    assert "".join([one_by_one.push(c) for c in payload]) == shown


def test_an_unclosed_control_string_cannot_swallow_a_whole_reply() -> None:
    assert printable("\x1b]8;;http://x" + "y" * 10_000).count("y") > 5_000
