"""What is known about a token: which one it is, how likely it was, and how hard the model thought about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenTrace:
    """How one position was computed.

    ``halting`` holds what the router or the halting head said, one number per choice:
    act: halting probability at each recurrence taken; routed: softmax over the classes (1/3/5 passes);
    blend: the blending weights of depths 0..R; mixture: empty.
    ``steps`` counts passes: one entry for the models with one recursive part, one per layer for mixture.
    """

    depth: float
    steps: tuple[int, ...] = ()
    halting: tuple[float, ...] = ()


@dataclass(frozen=True)
class Alternative:
    """A token the model might have chosen instead, under the plain softmax (before temperature and filters)."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token, as `Model.generate` yields it.

    ``text`` is what may be printed now: streaming never emits half a UTF-8 character, so a token that ends
    inside one has an empty text and the completing token carries the whole character.
    ``logprob`` is in nats, under the plain softmax of the model's logits (no temperature, no filters).
    ``depth`` counts recurrences used (act), passes (routed), expected depth (blend), mean over layers (mixture).
    """

    id: int
    text: str
    logprob: float
    depth: float
    halting: tuple[float, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    trace: TokenTrace = field(default_factory=lambda: TokenTrace(0.0))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for JSON Lines output; floats rounded to what is meaningful."""
        return {
            "id": self.id,
            "text": self.text,
            "logprob": round(self.logprob, 6),
            "depth": round(self.depth, 4),
            "steps": list(self.trace.steps),
            "halting": [round(p, 6) for p in self.halting],
            "alternatives": [{"id": a.id, "text": a.text, "logprob": round(a.logprob, 6)} for a in self.alternatives],
        }
