"""The halting rule of adaptive computation time, the one copy that training and decoding share."""

from __future__ import annotations

from typing import Any, NamedTuple

# numpy arrays and torch tensors both work: only operators are used.
BoolArray = Any
FloatArray = Any


class HaltingState(NamedTuple):
    """Per token: the cumulative halting probability before this recurrence and whether the token still runs."""

    cumulative: FloatArray
    running: BoolArray


class HaltingStep(NamedTuple):
    """What one recurrence does to the tokens: its weight in the output, the new state, and who stopped here."""

    weight: FloatArray
    state: HaltingState
    stopped: BoolArray


def advance(state: HaltingState, probability: FloatArray, last: BoolArray | bool, threshold: float) -> HaltingStep:
    """One recurrence of the halting rule (Graves 2016, section 2.1), elementwise over tokens.

    A running token whose cumulative probability reaches ``threshold`` (1 - epsilon), or for which this is the
    ``last`` recurrence, stops; its weight is the remainder 1 - cumulative. A token that goes on weighs
    ``probability``; one that stopped earlier weighs 0. The weights of a token sum to 1.
    """
    cumulative, running = state
    reached = cumulative + probability >= threshold
    stopped = running & (reached | last)
    going = running & ~stopped
    weight = stopped * (1.0 - cumulative) + going * probability
    return HaltingStep(weight, HaltingState(cumulative + going * probability, going), stopped)
