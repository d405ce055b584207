"""Depth speculation and batches change the speed, never the outcome."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from onnx_models import decoder_on, model_of, onnx_backend
from tiny_models import tiny_act

from rlm_engine import Depth, Sampling, Speculation, UsageError
from rlm_engine.backends import onnx
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.generate import Model
from rlm_engine.sampling import Sampler


def model(seed: int = 4, **changes: object) -> Model:
    module = tiny_act(seed, torch.float64, **changes)
    return Model("tiny", module.config, TorchBackend(module.pieces(), torch.float64), None, 0)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_greedy_speculation_gives_the_same_tokens_and_depths(depth: int, tokens: int) -> None:
    for seed in range(6):
        tested = model(seed, context_length=48)
        plain = list(tested.generate([1, 2, 3], Sampling(greedy=True, max_tokens=40)))
        generation = tested.generate(
            [1, 2, 3], Sampling(greedy=True, max_tokens=40), speculation=Speculation(depth, tokens)
        )
        fast = list(generation)
        assert [(t.id, t.depth, t.text) for t in fast] == [(t.id, t.depth, t.text) for t in plain]
        np.testing.assert_allclose([t.logprob for t in fast], [t.logprob for t in plain], atol=1e-9)


def test_a_full_depth_draft_is_always_right() -> None:
    generation = model(context_length=48).generate(
        [5], Sampling(greedy=True, max_tokens=28), speculation=Speculation(5, 3)
    )
    list(generation)
    assert generation.summary.accepted == 1.0


def test_verified_tokens_have_the_true_distribution() -> None:
    """Drafts from a wrong distribution, 40,000 times: frequencies within 4 standard errors of the true ones."""
    rng = np.random.default_rng(0)
    true, guessed = rng.dirichlet(np.full(6, 0.5), size=2)
    sampler = Sampler(Sampling(seed=1))
    count = 40_000
    counts: Counter[int] = Counter()
    for _ in range(count):
        token = sampler.draw(guessed)
        replacement = sampler.verify(token, true, guessed)
        counts[token if replacement is None else replacement] += 1
    for token, probability in enumerate(true):
        error = np.sqrt(probability * (1 - probability) / count)
        assert abs(counts[token] / count - probability) < 4 * error + 1e-4


def test_sampled_speculation_has_the_models_distribution() -> None:
    """The second token's distribution over many seeds against the plain sampler's exact one."""
    tested = model(7, vocab_size=6, context_length=48)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=2)
    first = Sampler(sampling).probabilities(tested.logits([1])[0])
    exact = sum(
        first[t] * Sampler(sampling).probabilities(tested.logits([1, t])[-1]) for t in range(1, 6)
    )  # id 0 ends the text
    counts: Counter[int] = Counter()
    runs = 800
    for seed in range(runs):
        tokens = list(
            tested.generate(
                [1], Sampling(temperature=1.0, top_p=1.0, max_tokens=2, seed=seed), speculation=Speculation(1, 2)
            )
        )
        if len(tokens) == 2:
            counts[tokens[1].id] += 1
    for token in range(1, 6):
        error = np.sqrt(exact[token] * (1 - exact[token]) / runs)
        assert abs(counts[token] / runs - exact[token]) < 4.5 * error


def test_speculation_stops_where_the_window_begins_to_roll() -> None:
    tested = model(context_length=12)
    plain = [t.id for t in tested.generate([1, 2], Sampling(greedy=True, max_tokens=40))]
    fast = [t.id for t in tested.generate([1, 2], Sampling(greedy=True, max_tokens=40), speculation=Speculation(1))]
    assert fast == plain
    with pytest.raises(UsageError):
        Speculation(0)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_batched_replies_equal_single_ones(rows: int) -> None:
    tested = model(context_length=16)
    prompts = [[i + 1] * (1 + i % 5) for i in range(9)]
    sampling = Sampling(seed=100, max_tokens=12, temperature=1.0)
    done = {c.index: c for c in tested.generate_many(prompts, sampling, Depth(max_steps=4), rows=rows)}
    assert sorted(done) == list(range(9))
    for index, prompt in enumerate(prompts):
        single = tested.generate(prompt, Sampling(seed=100 + index, max_tokens=12, temperature=1.0), Depth(4))
        assert [t.id for t in done[index].tokens] == [t.id for t in single]
        assert done[index].stop_reason == single.summary.stop_reason


def test_batch_of_nothing() -> None:
    assert list(model().generate_many([])) == []
    zero = list(model().generate_many([[1], [2]], Sampling(max_tokens=0)))
    assert [(c.index, c.text, c.stop_reason) for c in zero] == [(0, "", "max_tokens"), (1, "", "max_tokens")]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the step graph from now on."""
    calls: list[int] = []
    run = onnx._Step.run

    def counted(self: Any, values: Any, live: Any, slots: np.ndarray, *rest: Any) -> tuple[np.ndarray, ...]:
        calls.append(len(slots))
        return run(self, values, live, slots, *rest)

    monkeypatch.setattr(onnx._Step, "run", counted)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_that_halt_apart_take_one_call_per_recurrence(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that halted between rows that go on run along and leave nothing behind: results of single decoding."""
    backend = onnx_backend("act", 1, precision)
    config = model_of("act", 1).config
    batch = decoder_on(backend, config, rows=5)
    singles = [decoder_on(backend, config) for _ in range(5)]
    rng = np.random.default_rng(0)
    apart = 0
    for length in (3, *[1] * 40):  # past the window of 16 tokens
        fed = [rng.integers(1, config.vocab_size, length).tolist() for _ in range(5)]
        calls = count_calls(monkeypatch)
        result = batch.feed(fed)
        if length == 1:
            assert len(calls) == max(len(trace.halting) for trace in result.traces)
            depths = np.array([len(trace.halting) for trace in result.traces])
            apart += any((np.diff(np.flatnonzero(depths > n)) > 1).any() for n in range(1, depths.max()))
        monkeypatch.undo()
        for row, single in enumerate(singles):
            alone = single.feed([fed[row]])
            assert alone.traces[0].steps == result.traces[row].steps
            np.testing.assert_allclose(result.logits[row], alone.logits[0], rtol=0, atol=2e-4)
    assert apart > 10  # guards the test: rows did halt between rows that went on


def test_rows_far_apart_do_not_run_along() -> None:
    groups = lambda rows: [part.tolist() for part in onnx._parts(np.array(rows))]  # noqa: E731
    assert groups([0, 2, 6]) == [[0, 1, 2]] and groups([0, 5]) == [[0], [1]]
    assert groups([3, 2, 2, 4]) == [[1, 2], [0, 3]]
