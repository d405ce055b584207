"""The Python API: generation, stopping, scoring, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_act

from rlm_engine import Depth, InputError, ModelError, Sampling
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import ChatFormat
from rlm_engine.generate import Model
from rlm_engine.models.act import ActModel
from rlm_engine.sampling import log_softmax
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer

CHAT = ChatFormat(
    {"user": "<|user|>\n", "assistant": "<|assistant|>\n"}, {"user": "\n", "assistant": "<|endoftext|>"},
    ("<|endoftext|>", "<|user|>"),
)  # fmt: skip


def as_model(module: ActModel, tokenizer: Gpt2Tokenizer | None = None) -> Model:
    backend = TorchBackend(module.pieces(), module.embedding.weight.dtype)
    return Model("tiny", module.config, backend, tokenizer, 0)


@pytest.fixture(scope="module")
def ids_model() -> Model:
    return as_model(tiny_act(4, torch.float32))


@pytest.fixture(scope="module")
def text_model() -> Model:
    tokenizer = Gpt2Tokenizer(added_tokens=("<|user|>", "<|assistant|>"))
    module = tiny_act(
        5, torch.float32, vocab_size=50_259, eos_token_id=50_256, tokenizer="gpt2", context_length=64,
        added_tokens=("<|user|>", "<|assistant|>"), chat_format=CHAT,
    )  # fmt: skip
    return as_model(module, tokenizer)


def test_greedy_is_the_argmax_of_the_dense_model(ids_model: Model) -> None:
    module = tiny_act(4, torch.float32)
    ids = [3, 9, 27]
    generation = ids_model.generate(ids, Sampling(greedy=True, max_tokens=10))
    for token in generation:
        with torch.no_grad():
            out = module(torch.tensor([ids]), window=16)
            logits = module.head(out.hidden)[0, -1].numpy()
        assert token.id == int(logits.argmax())
        assert token.depth == float(out.depth[0, -1])
        assert token.logprob == pytest.approx(float(log_softmax(logits)[token.id]), abs=1e-4)
        ids.append(token.id)
    assert generation.summary.new_tokens == len(ids) - 3


def test_a_text_begins_with_the_start_token_of_its_model(text_model: Model) -> None:
    module = tiny_act(
        5,
        torch.float32,
        vocab_size=50_259,
        eos_token_id=50_256,
        bos_token_id=50_256,
        tokenizer="gpt2",
        context_length=8,
    )
    model, greedy = as_model(module, text_model.tokenizer), Sampling(greedy=True, max_tokens=4)
    ids = model.encode("The sea was")

    def tokens(prompt: str | list[int]) -> list[int]:
        return [token.id for token in model.generate(prompt, greedy)]

    assert tokens("The sea was") == tokens([50_256, *ids]) != tokens(ids)
    assert [c.tokens[0].id for c in model.generate_many(["The sea was"], greedy)] == tokens("The sea was")[:1]
    full = "one two three four five six seven eight"
    assert len(model.encode(full)) == 8
    assert tokens(full) == tokens(model.encode(full))  # no room for it
    with pytest.raises(ModelError, match="bos_token_id"):
        tiny_act(5, torch.float32, vocab_size=64, bos_token_id=64)


def test_same_seed_same_tokens(text_model: Model) -> None:
    def run(seed: int | None) -> list[int]:
        return [t.id for t in text_model.generate("A tree", Sampling(seed=seed, max_tokens=12))]

    assert run(7) == run(7)
    assert run(7) != run(8)
    generation = text_model.generate("A tree", Sampling(max_tokens=12))
    drawn = [t.id for t in generation]
    assert drawn == run(generation.summary.seed)


def test_max_tokens_zero_yields_nothing(text_model: Model) -> None:
    generation = text_model.generate("A", Sampling(max_tokens=0))
    assert list(generation) == []
    assert (generation.summary.stop_reason, generation.summary.new_tokens) == ("max_tokens", 0)


def test_streamed_text_is_the_decoded_text(text_model: Model) -> None:
    """Random weights make random bytes: many tokens end inside a character."""
    for seed in range(5):
        tokens = list(text_model.generate("A", Sampling(seed=seed, temperature=2.0, top_p=1.0, max_tokens=60)))
        assert len(tokens) == 60
        raw = b"".join(text_model.tokenizer.token_bytes(t.id) for t in tokens if t.id < 50_256)  # type: ignore[union-attr]
        assert "".join(t.text for t in tokens) == raw.decode("utf-8", errors="replace")


def test_stop_string_ends_before_it_and_keeps_every_token(text_model: Model) -> None:
    sampling = Sampling(seed=3, max_tokens=40)
    text = "".join(t.text for t in text_model.generate("A", sampling))
    stop = text[25:29]
    generation = text_model.generate("A", Sampling(seed=3, max_tokens=40, stop=(stop,)))
    assert "".join(t.text for t in generation) == text[: text.index(stop)]
    assert generation.summary.stop_reason == "stop_string"


def test_closing_early_is_cancelled(text_model: Model) -> None:
    generation = text_model.generate("A", Sampling(max_tokens=50))
    next(generation)
    generation.close()
    assert list(generation) == []
    assert generation.summary.stop_reason == "cancelled"


def test_depth_budget_can_change_while_generating(ids_model: Model) -> None:
    generation = ids_model.generate([1, 2], Sampling(seed=1, max_tokens=12), Depth(max_steps=1))
    depths = []
    for index, token in enumerate(generation):
        depths.append(token.depth)
        if index == 5:
            generation.depth = Depth()
    assert set(depths[:6]) == {1.0}
    assert max(depths[7:], default=2.0) > 1.0


def test_chat_prompt_and_stop(text_model: Model) -> None:
    messages = [{"role": "user", "content": "<|endoftext|> hello <|user|>"}]
    generation = text_model.chat(messages, Sampling(seed=1, max_tokens=3))
    list(generation)
    assert text_model.tokenizer is not None
    # typed markers are plain text: 3 special ids at most, those of the format
    prompt = generation._prompt
    assert [i for i in prompt if i >= 50_256] == [50_257, 50_258]


def test_long_conversation_drops_the_oldest_and_says_so(text_model: Model) -> None:
    messages = []
    for turn in range(12):
        messages += [{"role": "user", "content": f"question number {turn}"}, {"role": "assistant", "content": "yes"}]
    generation = text_model.chat([*messages, {"role": "user", "content": "last"}], Sampling(seed=1, max_tokens=2))
    list(generation)
    assert generation.summary.dropped_tokens > 0
    assert generation.summary.prompt_tokens <= 48
    with pytest.raises(InputError, match="too long"):
        text_model.chat([{"role": "user", "content": "word " * 200}])


def test_score_is_the_sum_of_log_probabilities(text_model: Model) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    scored = text_model.score(text)
    logits = text_model.logits(scored.ids)
    expected = [log_softmax(row)[target] for row, target in zip(logits, scored.ids[1:], strict=False)]
    np.testing.assert_allclose(scored.logprobs, expected, atol=1e-4)
    assert len(scored.depths) == len(scored.ids) - 1
    assert scored.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-3)


def test_score_beyond_the_window_rolls(text_model: Model) -> None:
    scored = text_model.score("one two three " * 150)
    assert len(scored.logprobs) == len(scored.ids) - 1 > 64
    assert np.isfinite(scored.logprobs).all()


def test_lens_at_full_depth_is_the_models_answer(ids_model: Model) -> None:
    ids = [4, 8, 15, 16]
    steps = ids_model.lens(ids, top=3)
    assert [s.depth for s in steps] == [1, 2, 3, 4, 5]
    final = log_softmax(ids_model.logits(ids)[-1])
    assert steps[-1].top[0].id == int(final.argmax())
    assert steps[-1].top[0].logprob == pytest.approx(float(final.max()), abs=1e-4)
    taken = int(ids_model.new_decoder().feed([ids]).traces[0].depth)
    assert [s.halting is not None for s in steps] == [d <= taken for d in range(1, 6)]


def test_alternatives_are_the_likeliest(ids_model: Model) -> None:
    token = next(ids_model.generate([1], Sampling(greedy=True), alternatives=4))
    assert token.alternatives[0].id == token.id
    logprobs = [a.logprob for a in token.alternatives]
    assert logprobs == sorted(logprobs, reverse=True) and len(logprobs) == 4


def test_refused_input(ids_model: Model, text_model: Model) -> None:
    for prompt in ("", []):
        with pytest.raises(InputError, match="empty"):
            text_model.generate(prompt)
    with pytest.raises(InputError, match="no tokenizer"):
        ids_model.generate("text")
    with pytest.raises(InputError, match="outside the vocabulary"):
        ids_model.generate([61])
    with pytest.raises(InputError, match="context holds 16"):
        ids_model.generate([1] * 17)
    with pytest.raises(ModelError, match="no chat format"):
        ids_model.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError):
        text_model.chat([])
