"""Perplexity and bits per byte of held-out domains: sums in float64, macro means, bootstrap over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlm_training.heldout import Window
from rlm_training.scoring import Scores

RESAMPLES = 1000
MIN_DOCUMENTS = 5  # fewer say nothing about how documents vary


@dataclass(frozen=True)
class DocumentSums:
    """Of each document evaluated, float64 [documents]: nats lost, tokens predicted, recurrences taken, bytes."""

    nats: np.ndarray
    tokens: np.ndarray
    depth: np.ndarray
    size_bytes: np.ndarray


def document_sums(windows: Sequence[Window], scores: Sequence[Scores]) -> DocumentSums:
    """Add up the windows of each document."""
    numbers = {document: i for i, document in enumerate(sorted({w.document for w in windows}))}
    sums = np.zeros((4, len(numbers)), dtype=np.float64)
    for window, score in zip(windows, scores, strict=True):
        sums[:, numbers[window.document]] += (
            -score.logprob.sum(dtype=np.float64),
            len(score.logprob),
            score.depth.sum(dtype=np.float64),
            window.size_bytes,
        )
    return DocumentSums(*sums)


def domain_result(sums: DocumentSums, seed: int = 0) -> dict[str, Any]:
    """Loss (nats per token), perplexity with its 95 % interval, bits per byte, and mean depth of one domain."""
    nats, tokens, size = float(sums.nats.sum()), int(sums.tokens.sum()), float(sums.size_bytes.sum())
    losses = bootstrap_losses(sums, seed)
    return {
        "documents": len(sums.nats),
        "tokens": tokens,
        "bytes": round(size),
        "nats": nats,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "perplexity_ci95": None if losses is None else interval(np.exp(losses)),
        "bits_per_byte": nats / (math.log(2) * size) if size else None,
        "mean_depth": float(sums.depth.sum()) / tokens,
    }


def macro_result(domains: dict[str, dict[str, Any]], sums: dict[str, DocumentSums], seed: int = 0) -> dict[str, Any]:
    """Both macro perplexities in use, their intervals, and means over domains.

    ``perplexity_of_mean_loss``: exp of the mean of the domains' losses. ``mean_perplexity``: arithmetic mean of the
    domains' perplexities (always the larger). ``perplexity_all_tokens``: every token counts alike. Intervals resample
    the documents of each domain that has enough of them; the others stay as they are.
    """
    losses = np.array([result["loss"] for result in domains.values()])
    resampled = np.tile(losses, (RESAMPLES, 1))
    for i, name in enumerate(domains):
        drawn = bootstrap_losses(sums[name], seed + i)
        if drawn is not None:
            resampled[:, i] = drawn
    nats = sum(result["nats"] for result in domains.values())
    tokens = sum(result["tokens"] for result in domains.values())
    bits = [result["bits_per_byte"] for result in domains.values() if result["bits_per_byte"] is not None]
    return {
        "domains": len(losses),
        "tokens": tokens,
        "loss": float(losses.mean()),
        "perplexity_of_mean_loss": float(np.exp(losses.mean())),
        "perplexity_of_mean_loss_ci95": interval(np.exp(resampled.mean(axis=1))),
        "mean_perplexity": float(np.exp(losses).mean()),
        "mean_perplexity_ci95": interval(np.exp(resampled).mean(axis=1)),
        "perplexity_all_tokens": math.exp(nats / tokens),
        "bits_per_byte": float(np.mean(bits)) if bits else None,
        "mean_depth": float(np.mean([result["mean_depth"] for result in domains.values()])),
    }


def bootstrap_losses(sums: DocumentSums, seed: int = 0) -> np.ndarray | None:
    """Mean losses [resamples] of as many documents drawn with replacement; None with too few documents."""
    count = len(sums.nats)
    if count < MIN_DOCUMENTS:
        return None
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    return np.asarray((times @ sums.nats) / (times @ sums.tokens))


def paired_difference(first: DocumentSums, second: DocumentSums, seed: int = 0) -> dict[str, Any]:
    """second - first, nats per token on the same documents, with a 95 % interval over documents."""
    tokens = first.tokens
    each = second.nats - first.nats
    result: dict[str, Any] = {"nats": float(each.sum() / tokens.sum()), "ci95": None}
    if len(each) >= MIN_DOCUMENTS:
        times = np.random.default_rng(seed).multinomial(len(each), np.full(len(each), 1 / len(each)), size=RESAMPLES)
        result["ci95"] = interval((times @ each) / (times @ tokens))
    return result


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 % of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
