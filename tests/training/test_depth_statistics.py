"""Depth distribution, correlations, and learned against random depth."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_scoring import END, byte_scorer, random_bytes

from rlm_training.depth_statistics import (
    compare_with_random,
    correlations,
    depth_statistics,
    histogram,
    pearson,
    ranks,
)
from rlm_training.heldout import Window
from rlm_training.scoring import Passage, Scores


def scores(depth: list[float], surprisal: list[float], entropy: list[float]) -> Scores:
    values = np.array(depth, dtype=float)
    return Scores(-np.array(surprisal), values, np.zeros(len(values), bool), np.array(entropy, dtype=float))


def test_mean_spread_and_histogram_overall_and_by_domain() -> None:
    result = depth_statistics({
        "a": [scores([2, 2], [1, 2], [1, 1]), scores([4], [3], [1])],
        "b": [scores([8, 4], [9, 4], [2, 3])],
    })  # fmt: skip
    assert result["tokens"] == 5
    assert result["mean"] == pytest.approx(4.0)
    assert result["std"] == pytest.approx(np.std([2, 2, 4, 8, 4]))
    assert result["histogram"] == {"depths": [2, 4, 8], "counts": [2, 2, 1]}
    assert result["domains"]["b"]["mean"] == 6.0
    assert result["domains"]["a"]["histogram"] == {"depths": [2, 4], "counts": [2, 1]}
    expected = np.corrcoef([2, 2, 4, 8, 4], [1, 2, 3, 9, 4])[0, 1]
    assert result["surprisal"]["pearson"] == pytest.approx(expected)


def test_spearman_is_one_for_any_rising_relation_and_shares_ranks() -> None:
    x = np.array([1.0, 2.0, 3.0, 10.0])
    found = correlations(x, np.exp(x))
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] < 0.99  # type: ignore[operator]
    assert correlations(x, -x)["spearman"] == pytest.approx(-1.0)
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1.0, 3.5, 2.0])
    # textbook formula without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    y = np.array([2.0, 1.0, 4.0, 3.0])
    assert correlations(x, y)["spearman"] == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_what_does_not_vary_correlates_with_nothing() -> None:
    assert pearson(np.full(5, 8.0), np.arange(5.0)) is None
    assert correlations(np.arange(5.0), np.full(5, 8.0)) == {"pearson": None, "spearman": None}


def test_expected_depths_are_binned() -> None:
    result = histogram(np.linspace(0.0, 2.0, 41))
    assert len(result["edges"]) == 21 and sum(result["counts"]) == 41


def test_expected_depths_that_hardly_differ_still_have_a_histogram() -> None:
    result = histogram(np.array([1.9999998, 1.9999999, 1.9999999], dtype=np.float32))
    assert sum(result["counts"]) == 3 and len(result["edges"]) == 21


def test_random_depths_have_the_learned_mean_and_distribution() -> None:
    scorer = byte_scorer(5)
    windows: dict[str, list[Window]] = {"a": [], "b": []}
    for i in range(12):
        ids = np.concatenate(([END], random_bytes(20, i)))
        windows["ab"[i % 2]].append(Window(i, Passage(ids[:-1], ids[1:]), 20.0))
    learned = {name: scorer.score([w.passage for w in several], entropy=True) for name, several in windows.items()}
    seen: list[np.ndarray] = []
    score = scorer.score

    def watched(*args, **options):  # type: ignore[no-untyped-def]
        seen.append(np.concatenate(options["forced_depth"]))
        found = score(*args, **options)
        assert np.concatenate([one.depth for one in found]).tolist() == seen[-1].tolist()  # obeyed
        return found

    scorer.score = watched  # type: ignore[method-assign]
    result = compare_with_random(scorer, windows, learned, seeds=(1, 2))
    everything = np.concatenate([one.depth for several in learned.values() for one in several])
    assert len(set(everything.tolist())) > 2
    for depths in seen[:2]:
        np.testing.assert_array_equal(np.sort(depths), np.sort(everything))
        assert (depths != everything).any()
    assert (seen[0] != seen[1]).any()
    assert set(seen[2].tolist()) <= {int(everything.mean()), int(everything.mean()) + 1}
    assert seen[2].mean() == pytest.approx(everything.mean()) == pytest.approx(result["mean_depth"])
    nats = -np.concatenate([one.logprob for several in learned.values() for one in several])
    assert result["learned"]["perplexity"] == pytest.approx(np.exp(nats.mean()))
    shuffled = result["shuffled"]
    assert [run["seed"] for run in shuffled["runs"]] == [1, 2]
    low, high = shuffled["difference"]["ci95"]
    assert low < shuffled["difference"]["nats"] < high
    assert result["uniform"]["perplexity"] != result["learned"]["perplexity"]
