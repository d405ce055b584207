"""Cached base layers and, on top, one shared layer applied again and again, each depth only as far as it is needed.

The depth-s state of a token depends on the depth-(s-1) states of the tokens up to it and on nothing else. Every depth
therefore has its own keys and values and its own length, and a depth nobody asked for simply lags behind until
somebody does (lazy back-fill).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlm_engine.decoding.interface import Array, Backend, Cache, Placement
from rlm_engine.decoding.sequences import Push
from rlm_engine.errors import InputError

# Tokens that run through a layer at once. Chunks bound the memory of long prompts (scores are tokens x keys) and
# never change the result.
CHUNK = 512
CACHE_LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Deepened:
    """States of one depth that were just computed: flat [M, d], with each row's first slot and place in them."""

    states: Array
    first_slot: dict[int, int]
    offset: dict[int, int]

    def at(self, rows: np.ndarray, slots: np.ndarray) -> Array:
        """The states of these tokens."""
        pairs = zip(rows.tolist(), slots.tolist(), strict=True)
        index = np.array([self.offset[r] + s - self.first_slot[r] for r, s in pairs], dtype=np.int64)
        return self.states[index]


class Trunk:
    """Base layers `layer.N` and the ladder of `recursion` depths, over preallocated caches that grow by doubling.

    ``inputs(slots)`` gives what the layer pieces want besides the states (rotary tables).
    ``limit``: no row ever holds more tokens than this (the window), None for no limit.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        layers: int,
        depths: int,
        heads: int,
        head_dim: int,
        rows: int,
        capacity: int,
        limit: int | None,
        inputs: Callable[[np.ndarray], tuple[np.ndarray, ...]],
        cache_limit_bytes: int = CACHE_LIMIT_BYTES,
    ):
        self._backend = backend
        self._heads, self._head_dim, self._rows = heads, head_dim, rows
        self._limit, self._cache_limit_bytes = limit, cache_limit_bytes
        self._inputs = inputs
        self.capacity = capacity if limit is None else min(capacity, limit)
        self.depths = depths
        self._check_memory(self.capacity, layers + depths)
        self._layers = [self._new_cache() for _ in range(layers)]
        self._depth_caches: list[Cache | None] = [None] * depths  # allocated when first needed
        self._hidden = np.zeros((rows, self.capacity), dtype=bool)
        # [depth 0..depths, row]: tokens whose state at that depth exists; depth 0 is the base
        self.lengths = np.zeros((depths + 1, rows), dtype=np.int64)
        # [depth 0..depths-1][row]: states of slots lengths[depth + 1].. lengths[depth], input of the next depth
        self._waiting: list[list[list[Array]]] = [[[] for _ in range(rows)] for _ in range(depths)]

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens per row. Raises InputError when the caches would outgrow their limit."""
        if slots <= self.capacity:
            return
        capacity = max(slots, 2 * self.capacity)
        if self._limit is not None:
            capacity = min(capacity, self._limit)
        try:
            self._check_memory(capacity, len(self._layers) + self.depths)
        except InputError:
            capacity = slots  # doubling is a luxury
            self._check_memory(capacity, len(self._layers) + self.depths)
        for cache in (*self._layers, *self._depth_caches):
            if cache is not None:
                cache.grow(capacity)
        self._hidden = np.pad(self._hidden, ((0, 0), (0, capacity - self.capacity)))
        self.capacity = capacity

    def base(self, x: Array, pushes: Sequence[Push], hidden: np.ndarray | None = None) -> Array:
        """Run embedded tokens, flat [N, d], through the base layers; returns their states [N, d].

        ``hidden`` [N]: tokens nobody may see. What the rows held from the pushes' slots on is forgotten first.
        """
        offset = 0
        for push in pushes:
            self._rewind(push.row, push.slot)
            count = len(push.ids)
            flags = False if hidden is None else hidden[offset : offset + count]
            self._hidden[push.row, push.slot : push.stop] = flags
            offset += count
        where = self._place([(push.row, push.slot, push.stop) for push in pushes])
        for n, cache in enumerate(self._layers):
            x = self._apply(f"layer.{n}", x, cache, where)
        offset = 0
        for push in pushes:
            count = len(push.ids)
            self._waiting[0][push.row].append(x[offset : offset + count])
            self.lengths[0, push.row] = push.stop
            offset += count
        return x

    def deepen(self, depth: int, stops: dict[int, int]) -> Deepened:
        """Compute the depth-`depth` states of the rows up to slot stops[row]; the depth below must reach that far."""
        spans, inputs, left = [], [], {}
        first_slot, offset, total = {}, {}, 0
        for row, stop in sorted(stops.items()):
            start = int(self.lengths[depth, row])
            waiting = self._joined(self._waiting[depth - 1][row])
            spans.append((row, start, stop))
            inputs.append(waiting[: stop - start])
            left[row] = [waiting[stop - start :]] if stop < self.lengths[depth - 1, row] else []
            first_slot[row], offset[row] = start, total
            total += stop - start
        cache = self._depth_caches[depth - 1]
        if cache is None:
            cache = self._depth_caches[depth - 1] = self._new_cache()
        states = self._apply("recursion", self._joined(inputs), cache, self._place(spans))
        for row, _, stop in spans:
            self._waiting[depth - 1][row] = left[row]
            if depth < self.depths:
                begin = offset[row]
                self._waiting[depth][row].append(states[begin : begin + stop - first_slot[row]])
            self.lengths[depth, row] = stop
        return Deepened(states, first_slot, offset)

    def _rewind(self, row: int, length: int) -> None:
        """Forget what the row holds from slot `length` on, at every depth."""
        for depth in range(self.depths):
            have = int(self.lengths[depth, row] - self.lengths[depth + 1, row])
            keep = max(0, min(int(self.lengths[depth, row]), length) - int(self.lengths[depth + 1, row]))
            if keep < have:
                self._waiting[depth][row] = [self._joined(self._waiting[depth][row])[:keep]] if keep else []
        np.minimum(self.lengths[:, row], length, out=self.lengths[:, row])

    def _place(self, spans: list[tuple[int, int, int]]) -> Placement:
        rows = np.concatenate([np.full(stop - start, row, dtype=np.int64) for row, start, stop in spans])
        slots = np.concatenate([np.arange(start, stop, dtype=np.int64) for _, start, stop in spans])
        hidden = self._hidden[rows, slots]
        return Placement(rows, slots, np.zeros_like(slots), hidden if hidden.any() else None)

    def _apply(self, piece: str, x: Array, cache: Cache, where: Placement) -> Array:
        if len(where) <= CHUNK:
            return self._backend.attend(piece, x, cache, where, *self._inputs(where.slots))[0]
        outputs = []
        for start in range(0, len(where), CHUNK):
            part = where.take(np.arange(start, min(start + CHUNK, len(where))))
            chunk = x[start : start + CHUNK]
            outputs.append(self._backend.attend(piece, chunk, cache, part, *self._inputs(part.slots))[0])
        return self._backend.concatenate(outputs)

    def _joined(self, arrays: list[Array]) -> Array:
        return arrays[0] if len(arrays) == 1 else self._backend.concatenate(arrays)

    def _new_cache(self) -> Cache:
        return self._backend.new_cache(self._rows, self._heads, self.capacity, self._head_dim)

    def _check_memory(self, capacity: int, caches: int) -> None:
        size_bytes = caches * 2 * self._rows * capacity * self._heads * self._head_dim * 4  # float32
        if size_bytes > self._cache_limit_bytes:
            raise InputError(
                f"{capacity} tokens need {size_bytes / 2**20:.0f} MiB of cache, the limit is "
                f"{self._cache_limit_bytes / 2**20:.0f} MiB; shorten the text or start a new conversation"
            )


class RunningMean:
    """Mean of the states of a row's tokens up to any slot, from float64 prefix sums; uncounted tokens stay out.

    Routers compare close scores: summed token by token in float64, the mean does not depend on the chunking.
    """

    def __init__(self, rows: int, capacity: int, d_model: int):
        self._sums = np.zeros((rows, capacity, d_model))
        self._counts = np.zeros((rows, capacity), dtype=np.int64)

    def append(self, row: int, slot: int, states: np.ndarray, counted: np.ndarray | None = None) -> None:
        """Put states [n, d] at slots slot..; ``counted`` [n] bool, None for all."""
        stop = slot + len(states)
        missing = stop - self._sums.shape[1]
        if missing > 0:
            grow = max(missing, self._sums.shape[1])
            self._sums = np.pad(self._sums, ((0, 0), (0, grow), (0, 0)))
            self._counts = np.pad(self._counts, ((0, 0), (0, grow)))
        wide = states.astype(np.float64) if counted is None else states * counted[:, None].astype(np.float64)
        ones = np.ones(len(states), dtype=np.int64) if counted is None else counted.astype(np.int64)
        if slot:
            wide[0] += self._sums[row, slot - 1]
            ones[0] += self._counts[row, slot - 1]
        np.cumsum(wide, axis=0, out=self._sums[row, slot:stop])
        np.cumsum(ones, out=self._counts[row, slot:stop])

    def at(self, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The means [n, d] up to and including these slots; zeros where no token counts yet."""
        return self._sums[rows, slots] / np.maximum(self._counts[rows, slots], 1)[:, None]
