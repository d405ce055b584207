"""GPT-2's tokenizer: the ids of an independent byte-pair encoder, no text lost, no special token from typed text."""

from __future__ import annotations

import json
import time
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.config import BlendConfig, ModelConfig
from rlm_engine.errors import InputError, ModelError
from rlm_engine.tokenizer import load_tokenizer
from rlm_engine.tokenizer.gpt2 import ASSET, Gpt2Tokenizer

TOKENIZER = Gpt2Tokenizer(["<|user|>", "<|assistant|>"])

HARD_TEXTS = [
    "Hello, world!",
    " leading and trailing  ",
    "I'm sure they'll say it's what we've done, isn't it? I'd've. 'Twas DON'T 's't're",
    "one  two   three    four\tTab\t\ttabs\n\n\nlines \n  indented\r\n",
    " \n \t \n",
    "   ",
    "\xa0\xa0non-breaking\u3000ideographic\u2028line\u200bzero",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nif __name__ == '__main__':\n\tprint(f(0xFF))\n",
    "3.14159 1234567890 1,000,000 2nd x2 ½ ² Ⅳ ٣٤ 1e-9",
    "naïve café Ångström ﬁ e\u0301 İstanbul ß",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا بالعالم",
    "日本語のテキスト、中文文本。 한국어 텍스트",
    "😀👨‍👩‍👧🏳️‍🌈 🇪🇺👍🏽!?",
    "नमस्ते दुनिया ก็ไม่",
    "a\x00b\x01\x7f\x85\xad",
    "<|endoftext|> <|user|> <|endoftext",
    "https://example.com/a?b=c&d=%20#e user@example.org C:\\Users\\x",
    "ALLCAPS mixedCase snake_case kebab-case ... --- !!! ??? ((())) {}[]<>",
    "\U0010ffff\ue000\ufffd\ufeff",
]


@cache
def published() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    model = json.loads(ASSET.read_text("utf-8"))["model"]
    return model["vocab"], {tuple(pair): rank for rank, pair in enumerate(model["merges"])}


def words(text: str) -> list[str]:
    """GPT-2's split, by hand: 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^\\s L N]+|\\s+(?!\\S)|\\s+ ."""

    def kind(c: str) -> str:
        if c in "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" or "\u2000" <= c <= "\u200a":
            return "space"
        return {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")

    out, i = [], 0
    while i < len(text):
        end = next((i + len(s) for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), i)
        if end == i:
            first = i + 1 if text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space" else i
            end = first
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
            # a run of spaces leaves its last one to the word that follows
            if kind(text[first]) == "space" and end < len(text) and end - i > 1:
                end -= 1
        out.append(text[i:end])
        i = end
    return out


def naive_encode(text: str) -> list[int]:
    """Byte-pair encoding as the paper tells it: merge the pair of lowest rank until none is left."""
    vocab, ranks = published()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    ids = []
    for word in words(text):
        parts = [spelled[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            rank, at = min((ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            pair, merged, i = (parts[at], parts[at + 1]), [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == pair
                merged.append("".join(pair) if both else parts[i])
                i += 2 if both else 1
            parts = merged
        ids += [vocab[p] for p in parts]
    return ids


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_equal_an_independent_encoder(text: str) -> None:
    assert TOKENIZER.encode(text) == naive_encode(text)


@given(st.text(st.sampled_from("ab' st.,1\n\t\xa0é中😀_-LD'"), max_size=25))
@settings(max_examples=300, deadline=None)
def test_random_texts_equal_an_independent_encoder(text: str) -> None:
    assert TOKENIZER.encode(text) == naive_encode(text)


def test_well_known_ids() -> None:
    # as printed in countless GPT-2 tutorials
    assert TOKENIZER.encode("Hello world") == [15496, 995]
    assert TOKENIZER.encode("<|endoftext|>", allow_special=True) == [50256]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_is_lost_and_none_becomes_special(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & set(TOKENIZER.special.values())
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids) == text.encode("utf-8")


@given(st.lists(st.sampled_from(["<|user|>", "<|endoftext|>", "<|us", " ", "\n", "a ", " b", "er|>"]), max_size=8))
@settings(max_examples=200, deadline=None)
def test_special_texts_are_special_only_when_allowed(parts: list[str]) -> None:
    text = "".join(parts)
    typed = TOKENIZER.encode(text)
    assert TOKENIZER.decode(typed) == text
    assert max(typed, default=0) < 50256
    trusted = TOKENIZER.encode(text, allow_special=True)
    assert TOKENIZER.decode(trusted, skip_special=False) == text
    assert sum(i >= 50256 for i in trusted) == text.count("<|user|>") + text.count("<|endoftext|>")


def test_special_tokens_leave_the_spaces_around_them() -> None:
    ids = TOKENIZER.encode("a  <|user|>  b", allow_special=True)
    assert ids == [*TOKENIZER.encode("a  "), 50257, *TOKENIZER.encode("  b")]
    assert TOKENIZER.decode(ids) == "a    b"


def test_longer_special_tokens_win_over_their_beginnings() -> None:
    tokenizer = Gpt2Tokenizer(["<u>", "<u>x"])
    assert tokenizer.encode("<u>x<u>", allow_special=True) == [50258, 50257]


def test_every_single_byte_has_a_token_and_ids_outside_none() -> None:
    assert TOKENIZER.vocab_size == 50259
    assert TOKENIZER.special == {"<|endoftext|>": 50256, "<|user|>": 50257, "<|assistant|>": 50258}
    assert {TOKENIZER.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert TOKENIZER.token_bytes(50258) == b"<|assistant|>"
    assert all(TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size))
    assert TOKENIZER.token_bytes(50259) == TOKENIZER.token_bytes(-1) == b""
    assert TOKENIZER.decode([50300, 64, 50256]) == TOKENIZER.decode([64])


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    with pytest.raises(InputError, match=r"character 3 .*U\+D83D"):
        TOKENIZER.encode("ab\ud83d")


@pytest.mark.parametrize("piece", ["a", " ", "\n", "ab1 ", "😀", "\u0301"])
def test_long_monotonous_text_takes_no_time_and_nothing_is_lost(piece: str) -> None:
    text = piece * (400_000 // len(piece.encode("utf-8")))
    started = time.process_time()
    ids = TOKENIZER.encode(text)
    assert time.process_time() - started < 2.0
    assert TOKENIZER.decode(ids) == text


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 50257,
        "d_model": 8,
        "n_heads": 2,
        "eos_token_id": 0,
        "context_length": 8,
    }
    return BlendConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_the_configuration_names_the_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(config(tokenizer="none"), tmp_path) is None
    loaded = load_tokenizer(config(vocab_size=50304, added_tokens=("<|pad|>",)), tmp_path)
    assert loaded is not None
    assert loaded.vocab_size == 50258  # a padded table is fine
    with pytest.raises(ModelError, match="50258 tokens, the model only 50257"):
        load_tokenizer(config(added_tokens=("<|pad|>",)), tmp_path)
    with pytest.raises(ModelError, match="unknown tokenizer 'bert'"):
        load_tokenizer(config(tokenizer="bert"), tmp_path)
    with pytest.raises(ModelError, match="twice"):
        load_tokenizer(config(vocab_size=50304, added_tokens=("<|endoftext|>",)), tmp_path)
    with pytest.raises(ModelError, match="added_tokens"):
        load_tokenizer(config(tokenizer="technical", added_tokens=("<|pad|>",)), tmp_path)
