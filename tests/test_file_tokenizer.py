"""A model's own tokenizer.json works when it is an ordinary one, and is refused in one line when it is not."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.config import BlendConfig
from rlm_engine.errors import ModelError
from rlm_engine.tokenizer import load_tokenizer
from rlm_engine.tokenizer.byte_level import byte_characters
from rlm_engine.tokenizer.file import FileTokenizer
from rlm_engine.tokenizer.gpt2 import ASSET, Gpt2Tokenizer

Json = dict[str, Any]


def small() -> Json:
    """256 bytes, three merges, one special token within the vocabulary and one after it."""
    tokens = [*byte_characters(), "<|end|>", "ab", "Ġab", "abab"]
    return {
        "added_tokens": [{"id": 256, "content": "<|end|>", "special": True}, {"id": 260, "content": "<|user|>"}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": ["a b", ["Ġ", "ab"], "ab ab"],
        },
    }


def write(directory: Path, data: Json | str | bytes) -> Path:
    content = data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode("utf-8")
    (directory / "tokenizer.json").write_bytes(content)
    return directory


def test_merges_and_special_tokens_of_the_file_apply(tmp_path: Path) -> None:
    tokenizer = FileTokenizer.from_directory(write(tmp_path, small()), ["<|more|>"])
    assert tokenizer.vocab_size == 262
    assert tokenizer.special == {"<|end|>": 256, "<|user|>": 260, "<|more|>": 261}
    assert tokenizer.encode("abab ab") == [259, 258]
    assert tokenizer.encode("<|end|>ab<|more|>", allow_special=True) == [256, 257, 261]
    assert not set(tokenizer.encode("<|end|><|user|><|more|>")) & {256, 260, 261}


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_no_text_is_lost(small_tokenizer: FileTokenizer, text: str) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return FileTokenizer.from_directory(write(tmp_path_factory.mktemp("small"), small()))


def test_gpt2_as_a_file_gives_gpt2s_ids(tmp_path: Path) -> None:
    data = ASSET.read_bytes()
    config = BlendConfig(50257, 8, 2, eos_token_id=0, context_length=8, tokenizer="file")
    tokenizer = load_tokenizer(config, write(tmp_path, data))
    assert tokenizer is not None
    text = "It's 2026: naïve tokens — 😀\n\n  <|endoftext|> def f(x):\treturn x"
    assert tokenizer.encode(text) == Gpt2Tokenizer().encode(text)
    assert tokenizer.special == {"<|endoftext|>": 50256}
    bundled = Gpt2Tokenizer()
    assert all(tokenizer.token_bytes(i) == bundled.token_bytes(i) for i in range(50257))


def test_a_whole_word_equal_to_a_special_text_stays_text(tmp_path: Path) -> None:
    """With ignore_merges the library looks whole words up in the vocabulary, special ones included."""
    data = small()
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["assistant"] = 260
    data["added_tokens"][1] = {"id": 260, "content": "assistant"}
    tokenizer = FileTokenizer.from_directory(write(tmp_path, data))
    assert 260 not in tokenizer.encode("assistant")
    assert tokenizer.encode("assistant", allow_special=True) == [260]


def test_well_known_word_patterns_and_digits(tmp_path: Path) -> None:
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    for first in (
        {"type": "Split", "pattern": {"Regex": llama}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
    ):
        data = small()
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, byte_level]}
        # a merge of four digits can only apply where the word pattern leaves them together
        data["model"]["vocab"] |= {"11": 261, "1111": 262}
        data["model"]["merges"] += ["1 1", "11 11"]
        tokenizer = FileTokenizer.from_directory(write(tmp_path, data))
        assert 262 not in tokenizer.encode("1111")
        assert (261 in tokenizer.encode("1111")) == (first["type"] == "Split")
        assert tokenizer.decode(tokenizer.encode("ab 1111\n é")) == "ab 1111\n é"


def change(path: str, value: object) -> Callable[[Json], None]:
    def apply(data: Json) -> None:
        *parents, last = path.split("/")
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        data[int(last) if isinstance(data, list) else last] = value  # type: ignore[index]

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("model", None), "model.type"),
        (change("model/type", "Unigram"), "model.type"),
        (change("model/unk_token", "a"), "unk_token"),
        (change("model/continuing_subword_prefix", "##"), "continuing_subword_prefix"),
        (change("model/end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (change("model/dropout", 0.5), "dropout"),
        (change("model/byte_fallback", True), "byte_fallback"),
        (change("normalizer", {"type": "Lowercase"}), "normalizer"),
        (change("model/vocab", []), "model.vocab"),
        (change("model/vocab", {"a": 0}), "model.vocab"),
        (change("model/vocab/ab", 9999), "ids must run"),
        (change("model/vocab/ab", -1), "ids must run"),
        (change("model/vocab/ab", 2**70), "ids must run"),
        (change("model/vocab/ab", 1.0), "ids must run"),
        (change("model/vocab/ab", True), "ids must run"),
        (change("model/vocab/ab", 3), "share an id"),
        (change("model/vocab/", 261), "empty"),
        (change("model/vocab/" + "a" * 2000, 261), "longer than"),
        (change("model/vocab/日", 261), "byte-level"),
        (lambda d: d["model"]["vocab"].update({"xy": d["model"]["vocab"].pop("z")}), "byte 122"),
        (change("model/merges", {}), "merges"),
        (change("model/merges/0", "a"), "merge 0 must be a pair"),
        (change("model/merges/0", "a b c"), "merge 0 must be a pair"),
        (change("model/merges/0", ["a", 1]), "merge 0 must be a pair"),
        (change("model/merges/1", "a zz"), "merge 1 .*unknown"),
        (change("model/merges/1", "x y"), "merge 1 .*unknown"),
        (change("model/merges/1", "<|end|> a"), "merge 1 .*unknown"),
        (change("added_tokens", {}), "added_tokens"),
        (change("added_tokens/0", "x"), "added_tokens"),
        (change("added_tokens/0/content", ""), "added_tokens"),
        (change("added_tokens/0/content", "\ud800"), "not text"),
        (change("added_tokens/0/id", 7), "two ids"),
        (change("added_tokens/1/id", None), "ids must run"),
        (change("added_tokens/1/id", "260"), "ids must run"),
        (change("added_tokens/1/id", 5), "share an id"),
        (change("added_tokens/1/content", "<|end|>"), "twice"),
        (change("added_tokens/1", {"id": 64, "content": "a"}), "two ids|no token"),
        (change("pre_tokenizer", None), "pre_tokenizer"),
        (change("pre_tokenizer/type", "Whitespace"), "'Whitespace'"),
        (change("pre_tokenizer/add_prefix_space", True), "pre_tokenizer"),
        (change("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}), "pre_tokenizer"),
        (
            change(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"},
                        {"type": "ByteLevel"},
                    ],
                },
            ),
            "'Split'",
        ),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Json], None], message: str
) -> None:
    data = copy.deepcopy(small())
    damage(data)
    with pytest.raises(ModelError, match=message) as error:
        FileTokenizer.from_directory(write(tmp_path, data))
    assert str(tmp_path / "tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"9" * 9999 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json") as error:
        FileTokenizer.from_directory(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    content = json.dumps(small()).replace('"ab": 257', '"ab": 3, "ab": 257')
    assert content.count('"ab": 3') == 1
    with pytest.raises(ModelError, match="twice"):
        FileTokenizer.from_directory(write(tmp_path, content))


def test_only_regular_files_of_sane_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelError, match="No such file"):
        FileTokenizer.from_directory(tmp_path)
    path.mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        FileTokenizer.from_directory(tmp_path)
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse
    with pytest.raises(ModelError, match="bytes"):
        FileTokenizer.from_directory(tmp_path)
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        with pytest.raises(ModelError, match="regular file"):
            FileTokenizer.from_directory(tmp_path)
