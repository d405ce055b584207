"""Incremental decoding of `routed` (rlm-90m, rlm-198m): the router picks the depth that is read, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlm_engine.config import RoutedConfig
from rlm_engine.decoding.interface import Array, Backend, Depth, Result
from rlm_engine.decoding.reporting import Report, reported_tokens
from rlm_engine.decoding.rotary import rotary_tables
from rlm_engine.decoding.sequences import Push, Sequences
from rlm_engine.decoding.trunk import CACHE_LIMIT_BYTES, RunningMean, Trunk
from rlm_engine.trace import TokenTrace


class RoutedDecoder:
    """Exact decoding with one key/value cache per base layer and per depth, deeper depths filled when first needed.

    A position's logits are those of a dense forward of its prefix. rlm-90m never crops: its caches double as the
    text grows, up to ``cache_limit_bytes`` (InputError). rlm-198m (`rolling_window`) sees the latest
    `context_length` tokens; past that window="exact" re-forwards them for each token, as the published loop does,
    and "block" drops a quarter at once (see `Sequences`).

    Padding (``pad_token_id``; rlm-90m's is its end-of-text) is hidden as a key and left out of the router's mean;
    while a row holds nothing else the mean is zero. A padding token that sees no real token gathers nothing: rlm-90m
    is NaN there, rlm-198m lets it attend to everything, its future included, which decoding cannot know.
    ``depth.max_steps``: at most this many passes, whatever the class.
    """

    def __init__(
        self,
        backend: Backend,
        config: RoutedConfig,
        depth: Depth | None = None,
        rows: int = 1,
        capacity: int | None = None,
        window: str = "exact",
        cache_limit_bytes: int = CACHE_LIMIT_BYTES,
    ):
        self.rows = rows
        self.depth = depth or Depth()
        self._backend = backend
        self._config = config
        limit = config.context_length if config.rolling_window else None
        self._sequences = Sequences(rows, config.vocab_size, limit, window)
        self._trunk = Trunk(
            backend,
            layers=config.n_layers,
            depths=max(config.steps),
            heads=config.n_heads,
            head_dim=config.head_dim,
            rows=rows,
            capacity=capacity or config.context_length,
            limit=limit,
            inputs=self._rotary,
            cache_limit_bytes=cache_limit_bytes,
        )
        self._mean = RunningMean(rows, self._trunk.capacity, config.d_model)
        self._tables = rotary_tables(np.arange(self._trunk.capacity), config.head_dim, config.rope_theta)

    def feed(self, tokens: Sequence[Sequence[int]], report: str = "last") -> Result:
        """See `Decoder.feed`.

        Raises InputError for ids outside the vocabulary and texts too long for the caches' limit (nothing is fed
        then), ModelError for non-finite logits.
        """
        self._trunk.reserve(self._sequences.slots_needed(tokens))
        collected = Report(report)
        for pushes in self._sequences.extend(tokens, collected.everything):
            self._run(pushes, collected)
        return collected.result(self._config.vocab_size)

    def _run(self, pushes: list[Push], collected: Report) -> None:
        backend = self._backend
        ids = np.concatenate([np.asarray(push.ids, dtype=np.int64) for push in pushes])
        pads = ids == self._config.pad_token_id
        h = self._trunk.base(backend.run("embed", ids)[0], pushes, pads)
        offset, states = 0, backend.numpy(h)
        for push in pushes:
            part = slice(offset, offset + len(push.ids))
            self._mean.append(push.row, push.slot, states[part], ~pads[part])
            offset += len(push.ids)

        _, rows, slots = reported_tokens(pushes)
        scores = backend.numpy(backend.run("router", self._mean.at(rows, slots))[0])
        steps = np.asarray(self._config.steps, dtype=np.int64)[scores.argmax(axis=1)]
        if self.depth.max_steps is not None:
            steps = np.minimum(steps, self.depth.max_steps)

        (logits,) = backend.run("head", self._states_at(rows, slots, steps))
        traces = [
            TokenTrace(depth=float(passes), steps=(int(passes),), halting=tuple(p))
            for passes, p in zip(steps.tolist(), _softmax(scores).tolist(), strict=True)
        ]
        collected.add(rows, backend.numpy(logits), traces)

    def _states_at(self, rows: np.ndarray, slots: np.ndarray, steps: np.ndarray) -> Array:
        """Each token's state after its own number of passes; depths are extended just as far as these need."""
        parts, taken = [], []
        for depth in range(1, int(steps.max()) + 1):
            stops: dict[int, int] = {}
            for i in np.flatnonzero(steps >= depth):
                stops[int(rows[i])] = int(slots[i]) + 1  # slots rise within a row: the last one wins
            deeper = self._trunk.deepen(depth, stops)
            here = np.flatnonzero(steps == depth)
            if len(here):
                parts.append(deeper.at(rows[here], slots[here]))
                taken.append(here)
        if len(parts) == 1:
            return parts[0]
        return self._backend.concatenate(parts)[np.argsort(np.concatenate(taken))]

    def _rotary(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._trunk.capacity > len(self._tables[0]):
            positions = np.arange(self._trunk.capacity)
            self._tables = rotary_tables(positions, self._config.head_dim, self._config.rope_theta)
        return self._tables[0][slots], self._tables[1][slots]

    def truncate(self, row: int, length: int) -> bool:
        """Forget the row's tokens from position `length` on; False when it has fewer.

        Past a rolling window the visible tokens change, so the next `feed` runs all of them again.
        """
        return self._sequences.truncate(row, length)

    def length(self, row: int) -> int:
        """How many tokens the row has been fed, dropped ones included."""
        return self._sequences.length(row)

    def dropped(self, row: int) -> int:
        """How many of the row's oldest tokens are no longer seen."""
        return self._sequences.dropped(row)


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
