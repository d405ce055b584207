"""Schedules: learning rate, recurrences and ponder price as functions of the step alone."""

from __future__ import annotations

from dataclasses import dataclass

from rlm_engine.errors import UsageError


@dataclass(frozen=True)
class ScheduleConfig:
    """Warmup-stable-decay (Hu et al. 2024) of the learning rate.

    ``warmup``, ``decay``: shares of all steps; ``final``: learning rate at the end, relative to the peak.
    """

    warmup: float = 0.02
    decay: float = 0.5
    final: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise UsageError("schedule: warmup and decay must be shares of the run that fit together")
        if not 0 <= self.final <= 1:
            raise UsageError(f"schedule: final must be in [0, 1], got {self.final}")

    def scale(self, step: int, steps: int) -> float:
        """Learning rate at a step (0-based) relative to the peak."""
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        left = steps - step
        span = self.decay * steps
        if left >= span:
            return 1.0
        return self.final + (1.0 - self.final) * left / span


@dataclass(frozen=True)
class PonderConfig:
    """ACT's depth during training.

    ``growth``: pairs (share of the run, recurrences from there on), e.g. [[0, 2], [0.3, 4], [0.6, 8]].
    ``price``: nats per recurrence the ponder cost charges, 0 until ``price_from``, then linear to its value at
    ``price_full`` (shares of the run). ``random_stop``: with this probability a step trains with a uniformly drawn
    smaller budget of at least 3 recurrences, so that every depth becomes usable.
    """

    growth: tuple[tuple[float, int], ...] = ((0.0, 8),)
    price: float = 0.01
    price_from: float = 0.7
    price_full: float = 0.85
    random_stop: float = 0.2

    def __post_init__(self) -> None:
        if not self.growth or self.growth[0][0] != 0 or list(self.growth) != sorted(self.growth):
            raise UsageError("ponder: growth must start at 0 and rise")
        if self.price < 0 or not 0 <= self.price_from <= self.price_full <= 1:
            raise UsageError("ponder: price must not be negative, 0 <= price_from <= price_full <= 1")
        if not 0 <= self.random_stop < 1:
            raise UsageError(f"ponder: random_stop must be in [0, 1), got {self.random_stop}")

    def max_steps(self, step: int, steps: int) -> int:
        """Recurrences allowed at a step."""
        share = step / steps
        return [depth for start, depth in self.growth if share >= start][-1]

    def price_at(self, step: int, steps: int) -> float:
        """Nats per recurrence at a step."""
        share = step / steps
        if share >= self.price_full:
            return self.price
        if share <= self.price_from:
            return 0.0
        return self.price * (share - self.price_from) / (self.price_full - self.price_from)
