"""How the model spends its depth: distribution, relation to surprisal and entropy, and against random depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlm_training.heldout import Window
from rlm_training.perplexity import DocumentSums, document_sums, paired_difference
from rlm_training.scoring import Run, Scorer, Scores

Windows = dict[str, list[Window]]  # by domain


def depth_statistics(scores: dict[str, list[Scores]]) -> dict[str, Any]:
    """Mean, standard deviation and histogram of depth, and its correlations, over all tokens and by domain.

    ``scores``: per domain, with entropies. The depth of a token is set against the surprisal of the token it
    predicts and the entropy of its prediction, which is what the model itself can know.
    """
    depth, surprisal, entropy = (_joined(scores, pick) for pick in (_depth, _surprisal, _entropy))
    return {
        "tokens": len(depth),
        "mean": float(depth.mean()),
        "std": float(depth.std()),
        "histogram": histogram(depth),
        "surprisal": correlations(depth, surprisal),
        "entropy": correlations(depth, entropy),
        "domains": {
            name: {"mean": float(one.mean()), "std": float(one.std()), "histogram": histogram(one)}
            for name, one in ((name, _joined({name: several}, _depth)) for name, several in scores.items())
        },
    }


def compare_with_random(
    scorer: Scorer,
    windows: Windows,
    learned: dict[str, list[Scores]],
    seeds: Sequence[int] = (1, 2, 3),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Perplexity with learned depths against depths of equal mean that know nothing of the token (act, torch).

    "shuffled": the learned depths of all tokens, all domains together, dealt out at random, once per seed.
    "uniform": every token gets the mean depth, rounded down or up at random so that the mean stays.
    A token made to run past its own halt has spent its weight (see `ActModel.forward`), so it cannot gain more than
    what later tokens see of it; what the comparison shows is the loss where tokens are stopped early.
    """
    flat = [(name, i) for name in windows for i in range(len(windows[name]))]
    passages = [windows[name][i].passage for name, i in flat]
    taken = [learned[name][i].depth.astype(np.int64) for name, i in flat]
    cuts = np.cumsum([len(depths) for depths in taken])[:-1]
    everything = np.concatenate(taken)
    base = _all_documents(windows, learned)

    def forced(depths: np.ndarray) -> tuple[dict[str, Any], DocumentSums]:
        scores = scorer.score(passages, Run(), forced_depth=np.split(depths, cuts))
        by_domain: dict[str, list[Scores]] = {name: [] for name in windows}
        for (name, _), one in zip(flat, scores, strict=True):
            by_domain[name].append(one)
        sums = _all_documents(windows, by_domain)
        return {"perplexity": _perplexity(sums), "mean_depth": float(depths.mean())}, sums

    runs, sums = [], []
    for seed in seeds:
        if progress:
            progress(f"random depth, seed {seed}")
        one, total = forced(np.random.default_rng(seed).permutation(everything))
        runs.append({"seed": seed} | one)
        sums.append(total.nats)
    if progress:
        progress("uniform depth")
    uniform, uniform_sums = forced(_around_the_mean(everything))
    mean_nats = DocumentSums(np.mean(sums, axis=0), base.tokens, base.depth, base.size_bytes)
    return {
        "tokens": len(everything),
        "mean_depth": float(everything.mean()),
        "learned": {"perplexity": _perplexity(base)},
        "shuffled": {
            "perplexity": float(np.mean([run["perplexity"] for run in runs])),
            "perplexity_std": float(np.std([run["perplexity"] for run in runs])),
            "runs": runs,
            "difference": paired_difference(base, mean_nats),
        },
        "uniform": uniform | {"difference": paired_difference(base, uniform_sums)},
    }


def histogram(depth: np.ndarray) -> dict[str, Any]:
    """Counts by depth; whole depths get a bin each, expected depths (blend, mixture) twenty bins of equal width."""
    if (depth == np.round(depth)).all():
        values, counts = np.unique(depth.astype(np.int64), return_counts=True)
        return {"depths": values.tolist(), "counts": counts.tolist()}
    low = float(depth.min())
    # a blend that has settled varies by less than what bins can tell apart
    counts, edges = np.histogram(depth, bins=20, range=(low, max(float(depth.max()), low + 1e-3)))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def correlations(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation; None where one side does not vary."""
    return {"pearson": pearson(x, y), "spearman": pearson(ranks(x), ranks(y))}


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of two samples; None where one does not vary."""
    a, b = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else None


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2.0)[inverse], dtype=np.float64)


def _around_the_mean(depths: np.ndarray) -> np.ndarray:
    """Every depth the mean rounded down or up, with the same sum, in random order."""
    low, above = divmod(int(depths.sum()), len(depths))
    result = np.full(len(depths), low, dtype=np.int64)
    result[:above] += 1
    return np.random.default_rng(0).permutation(result)


def _all_documents(windows: Windows, scores: dict[str, list[Scores]]) -> DocumentSums:
    parts = [document_sums(windows[name], scores[name]) for name in windows]
    return DocumentSums(
        np.concatenate([p.nats for p in parts]),
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.depth for p in parts]),
        np.concatenate([p.size_bytes for p in parts]),
    )


def _perplexity(sums: DocumentSums) -> float:
    return float(np.exp(sums.nats.sum() / sums.tokens.sum()))


def _joined(scores: dict[str, list[Scores]], pick: Callable[[Scores], np.ndarray]) -> np.ndarray:
    return np.concatenate([pick(one) for several in scores.values() for one in several])


def _depth(score: Scores) -> np.ndarray:
    return score.depth


def _surprisal(score: Scores) -> np.ndarray:
    return -score.logprob


def _entropy(score: Scores) -> np.ndarray:
    assert score.entropy is not None
    return score.entropy
