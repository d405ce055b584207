"""Schedules: learning rate, recurrences, ponder price and memory as functions of the step alone.

Nothing here remembers anything, so a resumed run and every process of a distributed one agree by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlm_engine.errors import UsageError

NAMES = ("wsd", "onecycle", "cosine", "constant")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, relative to its peak.

    ``name``: "wsd", warmup-stable-decay (Hu et al. 2024): linear up, constant, linear down; "onecycle" (Smith and
    Topin 2018, as torch's OneCycleLR: cosine up from 1/25, cosine down to 1/250,000); "cosine": linear up, cosine
    down; "constant": linear up, constant.
    ``warmup``: share of all steps (onecycle: the rising part). ``decay``: share of all steps the wsd decay takes.
    ``final``: learning rate at the end, relative to the peak (wsd, cosine).
    ``cycle_momentum``: onecycle only; AdamW's beta1 runs 0.95 -> 0.85 -> 0.95 against the learning rate, as
    torch's OneCycleLR does by default.
    """

    name: str = "wsd"
    warmup: float = 0.02
    decay: float = 0.5
    final: float = 0.05
    cycle_momentum: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if not 0 <= self.warmup < 1 or (self.name == "wsd" and not 0 <= self.decay <= 1 - self.warmup):
            raise UsageError("warmup and decay must be shares of the run that fit together")
        if not 0 <= self.final <= 1:
            raise UsageError(f"final must be in [0, 1], got {self.final}")
        if self.cycle_momentum and self.name != "onecycle":
            raise UsageError("cycle_momentum belongs to name = 'onecycle'")

    def scale(self, step: int, steps: int) -> float:
        """Learning rate at a step (0-based) relative to the peak."""
        if self.name == "onecycle":
            return self._one_cycle(step, steps, low=1 / 25, end=1 / 25 / 1e4)
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.name == "constant":
            return 1.0
        if self.name == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        left, span = steps - step, self.decay * steps
        return 1.0 if left >= span else self.final + (1.0 - self.final) * left / span

    def beta1(self, step: int, steps: int) -> float | None:
        """AdamW's beta1 at a step; None where the schedule leaves it alone."""
        if not self.cycle_momentum:
            return None
        turn = self._one_cycle(step, steps, low=0.0, end=0.0)
        return 0.95 - 0.10 * turn

    def _one_cycle(self, step: int, steps: int, low: float, end: float) -> float:
        peak, last = self.warmup * steps - 1, steps - 1
        if step <= peak:
            share, first, then = step / peak if peak else 1.0, low, 1.0
        else:
            share, first, then = (step - peak) / (last - peak) if last > peak else 1.0, 1.0, end
        return then + (first - then) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class PonderConfig:
    """ACT during training: depth, its price, segment memory, and the last phase that trains the halting head alone.

    ``growth``: pairs (share of the run, recurrences from there on), e.g. [[0, 2], [0.3, 4], [0.6, 8]].
    ``price``: nats per recurrence the ponder cost charges, 0 until ``price_from``, then linear to its value at
    ``price_full`` (shares of the run). ``random_stop``: with this probability a step trains with a uniformly drawn
    smaller budget of at least 3 recurrences, so that every depth becomes usable. (DPO always runs all recurrences.)
    ``memory``: pairs (share of the run, tokens of segment memory from there on); every batch row then reads one
    contiguous stream and sees the detached keys and values of that many tokens before its segment (Dai et al. 2019).
    ``memory_documents``: attention, memory included, stays within a document (ended by eos_token_id).
    ``gate_from``: from this share of the run on the trunk is frozen and only the halting head is trained (1: never);
    the learning-rate schedule ends there and the halting head goes on at its full rate.
    ``gate_sharpness``: k of the target sigmoid(k (L_n - L_n+1 - price)) for going on after recurrence n
    (Zhu et al. 2025, stage II). ``gate_weight``: that target's weight beside the language loss.
    ``fixed_halting``: the halting head stays as it is (say, as `calibrate` fitted it), and nothing learns to please it:
    no gradient goes through halting probabilities.
    """

    growth: tuple[tuple[float, int], ...] = ((0.0, 8),)
    price: float = 0.01
    price_from: float = 0.7
    price_full: float = 0.85
    random_stop: float = 0.2
    memory: tuple[tuple[float, int], ...] = ((0.0, 0),)
    memory_documents: bool = False
    gate_from: float = 1.0
    gate_sharpness: float = 50.0
    gate_weight: float = 0.1
    fixed_halting: bool = False

    def __post_init__(self) -> None:
        for name, pairs, least in (("growth", self.growth, 1), ("memory", self.memory, 0)):
            good = all(len(p) == 2 and isinstance(p[1], int) and p[1] >= least for p in pairs)
            if not pairs or not good or pairs[0][0] != 0 or list(pairs) != sorted(pairs):
                raise UsageError(f"{name} must be pairs (share of the run, number) that start at 0 and rise")
        if self.price < 0 or not 0 <= self.price_from <= self.price_full <= 1:
            raise UsageError("price must not be negative, 0 <= price_from <= price_full <= 1")
        if not 0 <= self.random_stop < 1:
            raise UsageError(f"random_stop must be in [0, 1), got {self.random_stop}")
        if not 0 < self.gate_from <= 1 or self.gate_sharpness <= 0 or self.gate_weight < 0:
            raise UsageError("gate_from must be in (0, 1], gate_sharpness above 0, gate_weight not negative")
        if self.fixed_halting and self.gate_from < 1:
            raise UsageError("fixed_halting and gate_from do not go together")
        if self.memory_documents and not self.most_memory():
            raise UsageError("memory_documents needs memory")

    def max_steps(self, step: int, steps: int) -> int:
        """Recurrences allowed at a step."""
        return _stage(self.growth, step / steps)

    def memory_tokens(self, step: int, steps: int) -> int:
        """Tokens of segment memory at a step."""
        return _stage(self.memory, step / steps)

    def most_memory(self) -> int:
        """The longest segment memory of the run."""
        return max(tokens for _, tokens in self.memory)

    def gate_step(self, steps: int) -> int:
        """The first step of the phase that trains the halting head alone; ``steps`` when there is none."""
        return math.ceil(self.gate_from * steps)

    def price_at(self, step: int, steps: int) -> float:
        """Nats per recurrence at a step."""
        share = step / steps
        if share >= self.price_full:
            return self.price
        if share <= self.price_from:
            return 0.0
        return self.price * (share - self.price_from) / (self.price_full - self.price_from)


def _stage(pairs: tuple[tuple[float, int], ...], share: float) -> int:
    return [value for start, value in pairs if share >= start][-1]
