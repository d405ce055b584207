"""What the controllers, the backends and the generator expect of each other.

A *piece* is a pure tensor function of one model (embed, one block application, router, head). A *backend* runs
pieces and owns the arrays; a *decoder* (one per architecture) decides in numpy which piece runs next.
States stay in the backend's own array type (`Array`): numpy for ONNX Runtime, torch tensors for PyTorch. Decoders
only use what both understand: arithmetic operators, integer-array indexing and the few methods below.

Tokens are *flat*: a call handles N tokens of any sequences at once, each with the row of its sequence and the slot
in that row's cache. Different lengths, compaction of halted tokens and batches then need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlm_engine.errors import UsageError
from rlm_engine.trace import TokenTrace

Array = Any  # the backend's own array type: numpy.ndarray or torch.Tensor


@dataclass(frozen=True)
class Depth:
    """The reader's depth budget. None leaves the model's own value.

    ``max_steps``: recurrences (act), passes (routed, mixture per layer), depth (blend) at most, >= 1.
    ``halt_threshold``: act only; halt when the cumulative halting probability reaches it, in (0, 1].
    """

    max_steps: int | None = None
    halt_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"max depth must be at least 1, got {self.max_steps}")
        if self.halt_threshold is not None and not 0.0 < self.halt_threshold <= 1.0:
            raise UsageError(f"halt threshold must be above 0 and at most 1, got {self.halt_threshold}")


@dataclass(frozen=True)
class Placement:
    """Where N flat tokens live in a cache.

    ``rows[i]``: the sequence; ``slots[i]``: the slot the token's key and value are written to;
    ``first[i]``: the first slot it may see. Token i attends to slots first[i]..slots[i] of its row
    (after all N tokens are written), minus slots the cache marks hidden.
    The tokens of one row appear in rising slot order.
    ``hidden[i]``: token i's key is never seen by anybody, itself included (padding); None: all are seen.
    """

    rows: np.ndarray  # int64 [N]
    slots: np.ndarray  # int64 [N]
    first: np.ndarray  # int64 [N]
    hidden: np.ndarray | None = None  # bool [N]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> Placement:
        """The placement of a subset of the tokens (integer index, rising)."""
        hidden = None if self.hidden is None else self.hidden[index]
        return Placement(self.rows[index], self.slots[index], self.first[index], hidden)


class Cache(Protocol):
    """Preallocated keys and values of one attention application: [rows, heads, capacity, head_dim]."""

    capacity: int

    def write(self, where: Placement, k: Array, v: Array) -> None:
        """Store k and v, each [N, heads, head_dim], at the tokens' slots, and whether those are hidden."""

    def shift(self, row: int, start: int, stop: int) -> None:
        """Move slots start..stop of a row to its beginning (window eviction)."""

    def hide(self, row: int, slots: np.ndarray) -> None:
        """Never let anybody attend to these slots (published models mask padding keys). write() unhides a slot."""

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots per row, keeping what is stored."""


class Backend(Protocol):
    """Runs the pieces of one model on one device."""

    name: str

    def run(self, piece: str, *inputs: Array) -> tuple[Array, ...]:
        """Run a stateless piece. numpy inputs are converted; outputs are the backend's arrays."""

    def attend(self, piece: str, x: Array, cache: Cache, where: Placement, *inputs: Array) -> tuple[Array, ...]:
        """Run a piece that contains one attention: write the N tokens' K/V into the cache, attend, return the rest.

        x is [N, d]; further inputs as the piece wants them (rotary tables [N, head_dim/2], an integer step).
        """

    def new_cache(self, rows: int, heads: int, capacity: int, head_dim: int) -> Cache:
        """A zeroed cache."""

    def array(self, values: np.ndarray) -> Array:
        """A numpy array as the backend's array; floating point becomes the backend's dtype."""

    def numpy(self, array: Array) -> np.ndarray:
        """The backend's array as numpy (float32, or float64 for a float64 model)."""

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Concatenate along the first axis."""


@dataclass
class Result:
    """What a decoder returns for the tokens it was fed.

    Flat over the *reported* tokens, rows in order: every fed token when ``report="all"``, the last token of each fed
    row when ``report="last"``. ``logits`` is float32 (float64 for float64 models) [reported, vocabulary].
    """

    logits: np.ndarray
    traces: list[TokenTrace]
    rows: np.ndarray  # int64 [reported]


class Decoder(Protocol):
    """Exact incremental decoding of `rows` sequences with preallocated caches."""

    rows: int
    depth: Depth  # may be replaced between calls; applies from the next token on

    def feed(self, tokens: Sequence[Sequence[int]], report: str = "last") -> Result:
        """Append tokens to each row (an empty sequence leaves a row as it is) and return logits and depths.

        Cutting a text into chunks differently never changes the result. Past the context window the published
        models re-forward or drop a block (see `window`), act rolls.
        Raises ModelError when a state or logit is not finite.
        """

    def truncate(self, row: int, length: int) -> bool:
        """Forget the row's tokens from position `length` on; False if that is no longer possible (evicted)."""

    def length(self, row: int) -> int:
        """How many tokens the row has been fed, evicted ones included."""

    def dropped(self, row: int) -> int:
        """How many of the row's oldest tokens are no longer seen."""
