"""Wrapping a growing text: nothing lost, nothing too wide, no matter how it arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rlm_chat.tui.blocks import Blocks
from rlm_chat.tui.wrapping import Wrapper

TEXT = st.text(alphabet=st.sampled_from([*list("abcdefgh ,.\n\t"), "日", "本", "é", "\u0301", "😀"]), max_size=120)


def wrap(text: str, width: int) -> list[str]:
    wrapper = Wrapper(width)
    wrapper.push(text, 0)
    return [line.text for line in wrapper.lines]


def test_words_move_whole_to_the_next_line() -> None:
    assert wrap("the quick brown fox", 10) == ["the quick ", "brown fox"]


def test_a_word_that_grows_past_the_edge_moves_with_all_its_tokens() -> None:
    wrapper = Wrapper(10)
    for tag, piece in enumerate(["the", " quick", " br", "ow", "n"]):
        wrapper.push(piece, tag)
    assert [line.text for line in wrapper.lines] == ["the quick ", "brown"]
    assert wrapper.lines[1].runs == [("br", 2), ("ow", 3), ("n", 4)]


def test_a_word_longer_than_a_line_is_cut() -> None:
    assert wrap("see abcdefghijklmnop", 8) == ["see ", "abcdefgh", "ijklmnop"]


def test_east_asian_text_breaks_between_characters() -> None:
    assert wrap("日本日本日本", 8) == ["日本日本", "日本"]


@given(TEXT, st.integers(2, 30))
def test_nothing_is_lost_and_nothing_is_too_wide(text: str, width: int) -> None:
    wrapper = Wrapper(width)
    wrapper.push(text, 0)
    assert wrapper.text == text.replace("\t", "    ")
    for line in wrapper.lines:
        assert line.width == sum(cell_len(run) for run, _ in line.runs) <= width


@given(st.lists(TEXT, max_size=12), st.integers(2, 30))
def test_only_lines_from_the_returned_one_on_have_changed(parts: list[str], width: int) -> None:
    wrapper = Wrapper(width)
    for tag, part in enumerate(parts):
        before = [line.text for line in wrapper.lines]
        first = wrapper.push(part, tag)
        assert [line.text for line in wrapper.lines][:first] == before[:first]
    assert wrapper.text == "".join(parts).replace("\t", "    ")


@given(st.text(alphabet="ab c\n", max_size=80), st.integers(2, 30), st.data())
def test_the_lines_do_not_depend_on_how_the_text_arrives(text: str, width: int, data: st.DataObject) -> None:
    pieces = Wrapper(width)
    rest, tag = text, 0
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        pieces.push(rest[:cut], tag)
        rest, tag = rest[cut:], tag + 1
    assert [line.text for line in pieces.lines] == wrap(text, width)


def test_blocks_find_their_lines_and_rewrap() -> None:
    blocks = Blocks(20)
    user = blocks.add("user", "You")
    user.write("What is deep and wide?")
    reply = blocks.add("reply", "model", 8)
    for word in ["The", " deep", " blue", " sea", " of", " course"]:
        reply.write_token(word, 3.0)
    reply.set_foot("6 tokens")

    def shown() -> list[str]:
        lines = []
        for y in range(len(blocks)):
            found = blocks.find(y)
            assert found is not None
            lines.append((found[1].gutter + found[1].line.text).rstrip())
        return lines

    assert shown() == [
        "▌ You",
        "▌ What is deep and",
        "▌ wide?",
        "",
        "  model",
        "  The deep blue sea",
        "  of course",
        "  6 tokens",
    ]
    blocks.rewrap(40)
    assert shown() == [
        "▌ You",
        "▌ What is deep and wide?",
        "",
        "  model",
        "  The deep blue sea of course",
        "  6 tokens",
    ]
    assert blocks.find(len(blocks)) is None
