"""A stream of tokens becomes exactly the text of the whole, in complete characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.detokenize import StreamDecoder
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer

TOKENIZER = Gpt2Tokenizer(["<|user|>"])
# The 256 single bytes make broken and half characters likely.
tokens = st.one_of(st.integers(0, 255), st.integers(0, TOKENIZER.vocab_size + 3))


@given(st.lists(tokens, max_size=30), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_ids_give_the_whole_decode(ids: list[int], skip_special: bool) -> None:
    decoder = StreamDecoder(TOKENIZER, skip_special)
    streamed = "".join([decoder.push(i) for i in ids]) + decoder.flush()
    assert streamed == TOKENIZER.decode(ids, skip_special)
    shown = [i for i in ids if not skip_special or i not in TOKENIZER.special.values()]
    assert streamed == b"".join(TOKENIZER.token_bytes(i) for i in shown).decode("utf-8", errors="replace")


@given(st.binary(max_size=24))
@settings(max_examples=400, deadline=None)
def test_broken_bytes_become_what_python_makes_of_the_whole(data: bytes) -> None:
    single = {TOKENIZER.token_bytes(i): i for i in range(256)}
    decoder = StreamDecoder(TOKENIZER)
    streamed = "".join([decoder.push(single[bytes([b])]) for b in data]) + decoder.flush()
    assert streamed == data.decode("utf-8", errors="replace")


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_streams_back_in_complete_characters(text: str) -> None:
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.push(i) for i in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert decoder.flush() == ""
    assert all(text.find(p) >= 0 for p in pieces)


def test_an_emoji_appears_only_when_its_last_byte_is_there() -> None:
    ids = TOKENIZER.encode("🦜")
    assert len(ids) > 1
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_an_unfinished_character_is_not_lost_and_the_decoder_starts_afresh() -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push(TOKENIZER.encode("🦜")[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(TOKENIZER.encode("a")[0]) == "a"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|user|>b")])
def test_special_tokens_are_hidden_or_spelled(skip: bool, text: str) -> None:
    decoder = StreamDecoder(TOKENIZER, skip_special=skip)
    ids = TOKENIZER.encode("a<|user|>b", allow_special=True)
    assert "".join([decoder.push(i) for i in ids]) == text
