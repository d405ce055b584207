"""Statistics of replies: known texts, and a real model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_scoring import CHAT, END, ByteTokenizer, byte_act, byte_scorer, scorer_of

from rlm_engine.errors import InputError, ModelError
from rlm_engine.generate import Model
from rlm_engine.sampling import Sampling
from rlm_training.chat_statistics import (
    Reply,
    chat_statistics,
    default_prompts,
    distinct,
    read_prompts,
    repetition,
    reply_statistics,
    reply_to,
    shows_format,
    split_words,
)


def reply(text: str, tokens: int = 4, ended: bool = True, leaked: bool = False) -> Reply:
    return Reply("?", text, tokens, ended, leaked, 3.0)


def test_a_hundred_different_short_prompts_come_with_the_program() -> None:
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 100
    assert max(len(prompt) for prompt in prompts) < 80


def test_shares_lengths_and_ngrams_of_known_replies() -> None:
    result = reply_statistics([
        reply("a b c d a b c d", tokens=8),  # 5 four-grams, the last one repeats the first
        reply("  ", tokens=1, ended=False),
        reply("x y", tokens=3, leaked=True),
        reply("x y", tokens=4),
    ])  # fmt: skip
    assert (result["empty"], result["ends_by_itself"], result["format_leaks"]) == (0.25, 0.75, 0.25)
    assert (result["tokens_mean"], result["tokens_median"], result["tokens_max"]) == (4.0, 3.5, 8)
    assert result["distinct_1"] == pytest.approx(6 / 12)
    assert result["distinct_2"] == pytest.approx(5 / 9)  # ab bc cd da xy of 7 + 1 + 1
    assert result["repetition_4"] == pytest.approx(1 / 5)
    assert result["repetition_4_per_reply"] == pytest.approx(1 / 20)
    assert result["different_replies"] == 3


def test_ngram_counts() -> None:
    assert split_words("Don't stop, it's 3 o'clock!") == ["don't", "stop", ",", "it's", "3", "o'clock", "!"]
    assert repetition([["la"] * 10], 4) == pytest.approx(6 / 7)
    assert repetition([["a", "b"]], 4) == 0.0
    # a 4-gram in two different replies is no repetition
    assert repetition([["a", "b", "c", "d"], ["a", "b", "c", "d"]], 4) == 0.0
    assert distinct([["a"]], 2) is None


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Hello <|user|> hi", True), ("<|endoftext|>", True), ("fine.\nUser: and you?", True), ("Assistant: hi", True),
        ("[INST] do", True), ("<assistant>", True), ("A user asked me. I am no assistant: I cook.", False),
        ("a <| b |> c", False), ("", False),
    ],
)  # fmt: skip
def test_format_leaks(text: str, leaks: bool) -> None:
    assert shows_format(text, CHAT) == leaks


def always(token: int) -> Model:
    """A real model that writes one token for ever: the state the head reads does not depend on the input."""
    module = byte_act(0, context=64)
    with torch.no_grad():
        module.embedding.weight.abs_()
        module.gain_final.zero_()
        module.gain_final[0] = 1.0
        module.gain_in.zero_()
        module.gain_in[0] = 1.0
        module.block.gain_attn_out.zero_()
        module.block.gain_mlp_out.zero_()
        module.block.inject.fill_(1.0)
        module.embedding.weight[token, 0] = 9.0
    return scorer_of(module, ByteTokenizer()).model


def test_how_a_reply_ended_and_whether_a_marker_slipped_in() -> None:
    greedy = Sampling(greedy=True, max_tokens=6)
    ended = reply_to(always(END), "Hi", greedy)
    assert (ended.text, ended.ended, ended.tokens, ended.leaked) == ("", True, 0, False)
    babbling = reply_to(always(ord("a")), "Hi", greedy)
    assert (babbling.text, babbling.ended, babbling.tokens, babbling.leaked) == ("aaaaaa", False, 6, False)
    # <|assistant|> ends nothing and has no text, but a reply must not contain it
    marker = reply_to(always(258), "Hi", greedy)
    assert (marker.ended, marker.leaked) == (False, True)


def test_seeds_repeat_and_differ() -> None:
    model = byte_scorer(3, context=64).model
    prompts = ["Hi", "Bye"]
    one = chat_statistics(model, prompts, seeds=(1,), max_tokens=8)
    assert one == chat_statistics(model, prompts, seeds=(1,), max_tokens=8)
    two = chat_statistics(model, prompts, seeds=(1, 2), max_tokens=8)
    assert (one["sampled"]["replies"], two["sampled"]["replies"]) == (2, 4)
    texts = [r["text"] for r in two["replies"] if r["mode"] == "sampled"]
    assert texts[:2] != texts[2:]
    assert two["greedy"] == one["greedy"]


def test_models_and_files_without_chat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat format"):
        chat_statistics(byte_scorer(chat=False).model, ["Hi"])
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\nHello\n", encoding="utf-8")
    assert read_prompts(path) == ["Hello"]
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
