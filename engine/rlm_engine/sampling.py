"""Which token comes next: sampling settings, the filters, and the seeded choice (numpy, float64)."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlm_engine.errors import ModelError, UsageError

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Impossible values raise UsageError with one line naming the setting.

    ``temperature``: 0 means greedy. ``top_k``: 0 is off. ``top_p``: 1 is off. ``min_p``: 0 is off.
    ``repetition_penalty``: 1 is off. ``seed``: None draws a fresh one (`Sampler.seed` tells which).
    ``max_tokens``: 0 yields nothing. ``stop``: texts that end the reply and are never shown (one text or several).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    greedy: bool = False
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._real("temperature", lambda v: v >= 0, "0 or more")
        self._real("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")
        self._real("min_p", lambda v: 0 <= v <= 1, "between 0 and 1")
        self._real("repetition_penalty", lambda v: v > 0, "above 0")
        self._integer("top_k", None)
        self._integer("max_tokens", None)
        if self.seed is not None:
            self._integer("seed", 2**63)
        if not isinstance(self.greedy, bool):
            raise UsageError(f"greedy must be true or false, got {self.greedy!r}")
        self._stops()

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.greedy or self.temperature == 0.0

    def _real(self, name: str, good: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or not good(float(value)):
            raise UsageError(f"{name.replace('_', ' ')} must be a number {wanted}, got {value!r}")
        object.__setattr__(self, name, float(value))

    def _integer(self, name: str, limit: int | None) -> None:
        value = getattr(self, name)
        good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not good or value < 0 or (limit is not None and value >= limit):
            wanted = "a whole number, 0 or more" + ("" if limit is None else f" and below {limit}")
            raise UsageError(f"{name.replace('_', ' ')} must be {wanted}, got {value!r}")
        object.__setattr__(self, name, int(value))

    def _stops(self) -> None:
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) for s in stop):
            raise UsageError(f"stop must be texts, got {self.stop!r}")
        if any(not s for s in stop):
            raise UsageError("a stop text must not be empty: it would end every reply at once")
        if len(stop) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stop):
            raise UsageError(f"at most {MAX_STOPS} stop texts of at most {MAX_STOP_CHARACTERS} characters each")
        object.__setattr__(self, "stop", tuple(stop))


class Sampler:
    """Chooses tokens for one reply; the same seed and logits give the same tokens.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p, softmax, all in float64.

    * repetition penalty (Keskar et al. 2019, CTRL, section 4.1, with the sign handled): logits of tokens in the history
      are divided when positive and multiplied when negative, so that a penalty above 1 always makes them less likely;
    * top-k keeps the k largest and every tie with the k-th, as the published models do: equal logits are treated alike;
    * top-p (Holtzman et al. 2020) keeps a token unless the probabilities before it already exceed top_p, so the token
      that crosses the border stays and one always remains. Among equals the lower id comes first;
    * min-p (Nguyen et al. 2024) keeps tokens at least min_p times as likely as the most likely one.

    Greedy takes the largest logit after the repetition penalty, the lowest id among equals.
    """

    # Measured, V = 50,257, choose() per token, one thread of a 2-core AMD EPYC, peaked logits (2.5 nats): greedy 10 us,
    # no filter 250, top-k 50 140, top-p 0.95 160, min-p 80, top-p and penalty 230 us; a stable argsort alone: 3,700 us.
    # Nearly uniform logits (10.8 nats), where top-p keeps 45,000 tokens: 1,900 us.

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.seed: int = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        # Reused from token to token: fresh 400 kB arrays cost more in page faults than the arithmetic (measured).
        self._scratch, self._all_ids = np.empty(0), np.arange(0)

    def probabilities(self, logits: np.ndarray, history: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """The distribution the next token is drawn from, float64 [V], summing to 1.

        ``logits``: [V], -inf marks forbidden tokens. ``history``: ids the repetition penalty applies to, each in
        [0, V). Raises ModelError for NaN, +inf or nothing but -inf.
        """
        ids, weights = self._filter(logits, history)
        result = np.zeros(len(logits))
        result[ids] = weights / weights.sum()
        return result

    def choose(self, logits: np.ndarray, history: Sequence[int] | np.ndarray = ()) -> int:
        """Draw the next token's id; arguments and errors as for `probabilities`."""
        ids, weights = self._filter(logits, history)
        if self.sampling.is_greedy:
            return int(ids[0])
        cumulative = np.cumsum(weights, out=weights)
        total = cumulative[-1]
        # Strictly below the total, so that rounding can never reach past the last token of positive weight.
        point = min(self._random.random() * total, np.nextafter(total, 0.0))
        return int(ids[np.searchsorted(cumulative, point, side="right")])

    def draw(self, probabilities: np.ndarray) -> int:
        """Draw from a distribution [V]; the likeliest when greedy."""
        if self.sampling.is_greedy:
            return int(probabilities.argmax())
        cumulative = np.cumsum(probabilities)
        point = min(self._random.random() * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
        return int(np.searchsorted(cumulative, point, side="right"))

    def verify(self, token: int, true: np.ndarray, guessed: np.ndarray) -> int | None:
        """Speculative sampling's rule (Leviathan et al. 2023, section 2.3) for a token drawn from ``guessed`` [V].

        None when it stands, else the token to take instead; either way the outcome is distributed as ``true`` [V].
        """
        if self.sampling.is_greedy:
            best = int(true.argmax())
            return None if token == best else best
        if self._random.random() * guessed[token] < true[token]:
            return None
        return self.draw(np.maximum(true - guessed, 0.0))

    def _filter(self, logits: np.ndarray, history: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that remain, ids rising int64 [n], and their weights float64 [n], the largest being 1.

        Both may be views of buffers that the next call overwrites.
        """
        s = self.sampling
        scores = np.asarray(logits)
        if s.repetition_penalty != 1.0 and len(history):
            scores = _penalised(scores, np.asarray(history, dtype=np.int64), s.repetition_penalty)
        peak = _checked_peak(scores)
        if s.is_greedy:
            return np.array([int(scores.argmax())]), np.ones(1)
        if len(self._scratch) != len(scores):
            self._scratch, self._all_ids = np.empty(len(scores)), np.arange(len(scores))
        with np.errstate(over="ignore"):  # what overflows is infinitely unlikely
            scores = np.subtract(scores, peak, out=self._scratch, dtype=np.float64)
            scores /= s.temperature
        ids = self._all_ids
        if 0 < s.top_k < len(scores):
            border = len(scores) - s.top_k
            ids = np.flatnonzero(scores >= np.partition(scores, border)[border])
            scores = scores[ids]
        weights = np.exp(scores, out=scores)
        if s.top_p < 1.0:
            kept = _nucleus(weights, s.top_p)
            ids, weights = ids[kept], weights[kept]
        if s.min_p > 0.0:
            kept = np.flatnonzero(weights >= s.min_p)  # the largest weight is exp(0) = 1
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats, float64, over the last axis; ModelError for NaN, +inf or nothing but -inf."""
    scores = np.asarray(logits)
    with np.errstate(over="ignore"):
        scores = np.subtract(scores, _checked_peak(scores), dtype=np.float64)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores


def top_alternatives(logits: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n most likely tokens: ids int64 and their log-probabilities (nats), falling, lower id first among equals.

    ``logits``: [V]. Forbidden tokens (-inf) are left out, so there may be fewer than n. Errors as for `log_softmax`.
    """
    logprobs = log_softmax(logits)
    n = min(n, len(logprobs))
    if n <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    border = np.partition(logprobs, len(logprobs) - n)[len(logprobs) - n]
    ids = np.flatnonzero((logprobs >= border) & (logprobs > -np.inf))
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:n]
    return ids, logprobs[ids]


def _penalised(scores: np.ndarray, history: np.ndarray, penalty: float) -> np.ndarray:
    scores = scores.astype(np.float64)
    seen = scores[history]
    limit = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        changed = np.where(seen > 0, seen / penalty, seen * penalty)
    # An extreme penalty must not turn a number into an infinity, which would read as "forbidden" or "damaged".
    changed = np.where(np.isfinite(seen), np.clip(changed, -limit, limit), seen)
    scores[history] = changed
    return scores


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, rising, of the largest weights such that those before each sum to at most top_p of the total."""
    goal = top_p * weights.sum()
    # All weights up to the floor together hold at most half of what the nucleus may leave out, so it lies above the
    # floor; a language model's tail is long, and only the few candidates above it need sorting.
    floor = 0.5 * (1.0 - top_p) * weights.sum() / len(weights)
    candidates = np.flatnonzero(weights > floor)
    weights = weights[candidates]
    falling = np.sort(weights)[::-1]
    before = np.concatenate(([0.0], np.cumsum(falling)[:-1]))
    count = int(np.searchsorted(before, goal, side="right"))
    border = falling[count - 1]
    keep = weights > border
    ties = np.flatnonzero(weights == border)
    keep[ties[: count - int(keep.sum())]] = True
    return candidates[keep]


def _checked_peak(scores: np.ndarray) -> np.ndarray:
    """The largest logit over the last axis, kept as an axis for more than one row; ModelError when unusable."""
    peak: np.ndarray = scores.max(axis=-1, keepdims=scores.ndim > 1)
    if np.isfinite(peak).all():
        return peak
    if np.isnan(peak).any():
        found = "not a number (NaN)"
    elif (peak > 0).any():
        found = "infinite"
    else:
        found = "forbidden (-inf) for every token"
    raise ModelError(f"the model's next-token scores are {found}: its weights are damaged or its precision is too low")
