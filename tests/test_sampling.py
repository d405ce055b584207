"""The filters are the published ones, the choice is seeded, stable and says clearly when it cannot be made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.errors import ModelError, UsageError
from rlm_engine.sampling import Sampler, Sampling, log_softmax, top_alternatives

DATA = Path(__file__).parent / "data" / "sampling"
PUBLISHED = json.loads((DATA / "published_filters.json").read_text("utf-8"))
VECTORS = dict(np.load(DATA / "published_filters.npz"))
CASES = [(model, index) for model, entries in PUBLISHED.items() for index in range(len(entries))]


def settings_of(model: str, index: int, **changes: float) -> Sampling:
    # rlm-90m and rlm-198m know no top_k, mor writes "off" as null.
    params = {k: v for k, v in PUBLISHED[model][index].items() if v is not None}
    return Sampling(**{"seed": 1, "top_k": 0, **params, **changes})


def naive(logits: np.ndarray, history: list[int], s: Sampling) -> np.ndarray:
    """The documented filters, written the slow and obvious way."""
    x = logits.astype(np.float64).copy()
    for token in set(history):
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    x = (x - x.max()) / s.temperature
    if s.top_k and s.top_k < len(x):
        x[x < sorted(x, reverse=True)[s.top_k - 1]] = -np.inf
    p = np.exp(x)
    if s.top_p < 1:
        total, before = p.sum(), 0.0
        for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
            weight = p[token]
            if before > s.top_p * total:
                p[token] = 0.0
            before += weight
    if s.min_p:
        p[p < s.min_p * p.max()] = 0.0
    return p / p.sum()


@pytest.mark.parametrize(("model", "index"), CASES)
def test_filters_give_the_published_probabilities(model: str, index: int) -> None:
    s = settings_of(model, index)
    p = Sampler(s).probabilities(VECTORS[f"{model}.logits"], VECTORS[f"{model}.context_ids"][0])
    golden = VECTORS[f"{model}.{index}"]
    np.testing.assert_array_equal(p > 0, golden > 0)
    np.testing.assert_allclose(p, golden, atol=1e-6)


def test_repetition_penalty_departs_from_the_published_defect_on_purpose() -> None:
    """rlm-48m divides logits of either sign, which rewards repeated tokens with negative logits; we follow CTRL.

    The published vector above holds for both rules, because its top-k drops every negative logit; this one does not.
    """
    logits, context = VECTORS["48m.logits"], VECTORS["48m.context_ids"][0]
    unfiltered = Sampling(temperature=1.0, top_p=1.0, seed=1)
    plain = Sampler(unfiltered).probabilities(logits)
    published_logits = logits.copy()
    published_logits[context] /= np.float32(1.3)
    published = Sampler(unfiltered).probabilities(published_logits)
    ours = Sampler(Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.3, seed=1)).probabilities(logits, context)
    negative, positive = context[logits[context] < 0], context[logits[context] > 0]
    assert len(negative) and len(positive)
    assert (published[negative] > plain[negative]).all()  # the defect
    # Compared as odds against a token outside the history, which the normalisation cannot shift.
    other = np.setdiff1d(np.arange(len(logits)), context)[0]
    odds, odds_before = ours[context] / ours[other], plain[context] / plain[other]
    assert (odds < odds_before).all()
    np.testing.assert_allclose(ours[positive] / ours[other], published[positive] / published[other], rtol=1e-6)


def test_repetition_penalty_never_rewards_a_repeated_token() -> None:
    logits = np.array([2.0, -2.0, 0.0, 1.0])
    plain = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=0)).probabilities(logits)
    for token in range(4):
        penalised = Sampler(Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.5, seed=0)).probabilities(
            logits, [token, token]
        )
        assert penalised[token] < plain[token] or logits[token] == 0.0


logit_lists = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=1, max_size=40)


@given(
    logit_lists,
    st.lists(st.integers(0, 39), max_size=5),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 45),
    st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0, 1.3]),
)
@settings(max_examples=200, deadline=None)
def test_fast_filters_equal_the_obvious_ones(
    logits: list[float], history: list[int], t: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    x = np.array(logits, dtype=np.float32)
    history = [h for h in history if h < len(x)]
    s = Sampling(temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=3)
    ours, slow = Sampler(s).probabilities(x, history), naive(x, history, s)
    assert ours.sum() == pytest.approx(1.0)
    if not np.array_equal(ours > 0, slow > 0):  # only a cumulative sum that meets top_p to the last bit may differ
        assert abs(ours - slow).max() <= max(ours.max(), slow.max())
        falling = np.sort(naive(x, history, Sampling(**{**s.__dict__, "top_p": 1.0, "min_p": 0.0})))[::-1]
        assert np.abs(np.cumsum(falling) - top_p).min() < 1e-12
    else:
        np.testing.assert_allclose(ours, slow, atol=1e-12)


def test_large_vocabulary_filters_equal_the_obvious_ones() -> None:
    logits = np.random.default_rng(5).standard_normal(50_257).astype(np.float32) * 3
    for s in (Sampling(seed=1, top_p=0.95), Sampling(seed=1, top_k=50, top_p=0.9), Sampling(seed=1, min_p=0.1)):
        np.testing.assert_allclose(Sampler(s).probabilities(logits), naive(logits, [], s), atol=1e-12)


def test_same_seed_same_tokens_and_fresh_seed_is_readable() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    fresh = Sampler(Sampling(top_p=1.0))
    drawn = [fresh.choose(logits) for _ in range(20)]
    again = Sampler(Sampling(top_p=1.0, seed=fresh.seed))
    assert [again.choose(logits) for _ in range(20)] == drawn
    other = Sampler(Sampling(top_p=1.0))
    assert other.seed != fresh.seed
    assert [other.choose(logits) for _ in range(20)] != drawn


def test_drawn_frequencies_follow_the_probabilities() -> None:
    logits = np.array([1.0, 0.0, -np.inf, 2.0, -1.0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0.9, top_p=0.97, seed=11))
    p, n = sampler.probabilities(logits), 20_000
    counts = np.bincount([sampler.choose(logits) for _ in range(n)], minlength=5)
    assert counts[2] == 0
    np.testing.assert_allclose(counts / n, p, atol=4 * math.sqrt(0.25 / n))


def test_ties_go_to_the_lowest_id() -> None:
    flat = np.zeros(10, dtype=np.float32)
    assert Sampler(Sampling(greedy=True)).choose(flat) == 0
    assert Sampler(Sampling(temperature=0.0)).choose(np.array([1.0, 3.0, 3.0])) == 1
    # 0.35 of ten equals: those with 0, 0.1, 0.2 and 0.3 before them stay.
    kept = np.flatnonzero(Sampler(Sampling(top_p=0.35, seed=0)).probabilities(flat))
    assert kept.tolist() == [0, 1, 2, 3]
    # The token that begins exactly at the border stays, as published.
    assert np.flatnonzero(Sampler(Sampling(top_p=0.5, seed=0)).probabilities(flat[:4])).tolist() == [0, 1, 2]
    # Every tie with the k-th stays, as published.
    p = Sampler(Sampling(top_k=2, top_p=1.0, seed=0)).probabilities(np.array([1.0, 3.0, 1.0, 0.0]))
    assert np.flatnonzero(p).tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-8, 1e8, 1e308])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_extreme_temperatures_and_logits_stay_numbers(temperature: float, scale: float) -> None:
    logits = (np.array([0.5, -1.0, 0.9, -0.2]) * scale).astype(np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        sampler = Sampler(Sampling(temperature=temperature, top_k=3, top_p=0.999, repetition_penalty=1.2, seed=5))
        p = sampler.probabilities(logits, [0])
        assert p.sum() == pytest.approx(1.0)
        assert p[2] == p.max()
        assert 0 <= sampler.choose(logits, [0]) < 4


def test_extreme_penalty_neither_forbids_nor_breaks() -> None:
    for penalty in (1e-308, 1e308):
        p = Sampler(Sampling(repetition_penalty=penalty, seed=0)).probabilities(np.array([-3.0, 5.0]), [0, 1])
        assert p.sum() == pytest.approx(1.0)


def test_forbidden_tokens_are_never_chosen_and_damaged_logits_are_named() -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[7, 49]] = 0.0
    sampler = Sampler(Sampling(top_k=10, top_p=1.0, seed=2))
    assert {sampler.choose(logits) for _ in range(100)} == {7, 49}
    for bad, found in ((np.nan, "NaN"), (np.inf, "infinite")):
        for s in (Sampling(greedy=True), Sampling()):
            with pytest.raises(ModelError, match=found):
                Sampler(s).choose(np.array([0.0, bad, -np.inf]))
        with pytest.raises(ModelError, match=found):
            log_softmax(np.array([[0.0, 1.0], [0.0, bad]]))
    with pytest.raises(ModelError, match="every token"):
        Sampler(Sampling()).probabilities(np.full(3, -np.inf))


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-53])
def test_the_outermost_draws_never_reach_a_forbidden_token(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Outermost:
        def random(self) -> float:
            return draw

    sampler = Sampler(Sampling(top_p=1.0, seed=0))
    monkeypatch.setattr(sampler, "_random", Outermost())
    logits = np.array([-np.inf, *np.linspace(0, 1, 1001), -np.inf])
    assert sampler.choose(logits) == (1 if draw == 0.0 else 1001)


def test_the_callers_logits_are_left_alone() -> None:
    logits = np.array([1.0, 2.0, 3.0])
    Sampler(Sampling(repetition_penalty=2.0, seed=0)).choose(logits, [2])
    log_softmax(logits)
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_alternatives_are_the_likeliest_tokens_in_order() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0, -np.inf], dtype=np.float32)
    ids, logprobs = top_alternatives(logits, 3)
    assert ids.tolist() == [1, 3, 2]
    np.testing.assert_allclose(np.exp(logprobs), np.exp([2, 2, 1]) / (1 + math.e + 2 * math.e**2))
    assert top_alternatives(logits, 99)[0].tolist() == [1, 3, 2, 0]
    assert len(top_alternatives(logits, 0)[0]) == 0
    # exact even where probabilities underflow
    assert log_softmax(np.array([0.0, -2000.0])).tolist() == [0.0, -2000.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", v) for v in (-0.1, math.nan, math.inf, "hot", True)),
        *(("top_k", v) for v in (-1, 1.5, True)),
        *(("top_p", v) for v in (0.0, 1.01, math.nan)),
        *(("min_p", v) for v in (-0.1, 1.1, None)),
        *(("repetition_penalty", v) for v in (0.0, -1.0, math.inf)),
        *(("max_tokens", v) for v in (-1, 2.0)),
        *(("seed", v) for v in (-1, 2**63, 1.0, True)),
        *(("stop", v) for v in (("",), ("a", ""), (1,), 5, ("x",) * 65, ("x" * 1001,))),
        ("greedy", 1),
    ],
)
def test_impossible_settings_are_refused_in_one_line(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.replace("_", " ").split()[0]) as error:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_border_settings_are_accepted() -> None:
    s = Sampling(temperature=0, top_p=1, min_p=1, max_tokens=0, seed=2**63 - 1, stop=["a"])  # type: ignore[arg-type]
    assert s.is_greedy
    assert s.stop == ("a",)
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert hash(s) == hash(Sampling(temperature=0.0, top_p=1.0, min_p=1.0, max_tokens=0, seed=2**63 - 1, stop=("a",)))
