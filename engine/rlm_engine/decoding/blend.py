"""Incremental decoding of `blend` (rlm-48m): every depth is computed, the router only weighs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlm_engine.config import BlendConfig
from rlm_engine.decoding.interface import Backend, Depth, Result
from rlm_engine.decoding.reporting import Report, reported_tokens
from rlm_engine.decoding.sequences import Push, Sequences
from rlm_engine.decoding.trunk import CACHE_LIMIT_BYTES, RunningMean, Trunk
from rlm_engine.trace import TokenTrace


class BlendDecoder:
    """Exact decoding with one key/value cache per base layer and per depth, and the running mean of the base states.

    A position's logits are those of a dense forward of its prefix. Positions are learned and absolute, so beyond
    `context_length` tokens every state changes when the window slides: window="exact" re-forwards the latest
    `context_length` tokens for each token, as the published loop does; "block" drops a quarter at once (see
    `Sequences`). ``depth.max_steps``: deeper states are left out of the blend; the weights stay as they are.
    """

    def __init__(
        self,
        backend: Backend,
        config: BlendConfig,
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
        self._sequences = Sequences(rows, config.vocab_size, config.context_length, window)
        self._trunk = Trunk(
            backend,
            layers=config.n_layers,
            depths=config.max_steps,
            heads=config.n_heads,
            head_dim=config.head_dim,
            rows=rows,
            capacity=capacity or config.context_length,
            limit=config.context_length,
            inputs=lambda slots: (),
            cache_limit_bytes=cache_limit_bytes,
        )
        self._mean = RunningMean(rows, self._trunk.capacity, config.d_model)

    def feed(self, tokens: Sequence[Sequence[int]], report: str = "last") -> Result:
        """See `Decoder.feed`. Raises InputError for ids outside the vocabulary, ModelError for non-finite logits."""
        self._trunk.reserve(self._sequences.slots_needed(tokens))
        collected = Report(report)
        for pushes in self._sequences.extend(tokens, collected.everything):
            self._run(pushes, collected)
        return collected.result(self._config.vocab_size)

    def _run(self, pushes: list[Push], collected: Report) -> None:
        backend, config = self._backend, self._config
        ids = np.concatenate([np.asarray(push.ids, dtype=np.int64) for push in pushes])
        positions = np.concatenate([np.arange(push.slot, push.stop, dtype=np.int64) for push in pushes])
        h = self._trunk.base(backend.run("embed", ids, positions)[0], pushes)
        offset, states = 0, backend.numpy(h)
        for push in pushes:
            self._mean.append(push.row, push.slot, states[offset : offset + len(push.ids)])
            offset += len(push.ids)

        index, rows, slots = reported_tokens(pushes)
        (weights,) = backend.run("router", self._mean.at(rows, slots))
        y = h[index]
        depths = min(config.max_steps, self.depth.max_steps or config.max_steps)
        for k in range(1, depths + 1):
            deeper = self._trunk.deepen(k, {push.row: push.stop for push in pushes})
            y = y + weights[:, k : k + 1] * deeper.at(rows, slots)

        traces = []
        for p in backend.numpy(weights).tolist():
            expected = sum(k * p[k] for k in range(1, depths + 1))
            traces.append(TokenTrace(depth=expected, steps=(depths,), halting=tuple(p)))
        collected.add(rows, backend.numpy(backend.run("head", y)[0]), traces)

    def truncate(self, row: int, length: int) -> bool:
        """Forget the row's tokens from position `length` on; False when it has fewer.

        Past the window the visible tokens change, so the next `feed` runs all of them again.
        """
        return self._sequences.truncate(row, length)

    def length(self, row: int) -> int:
        """How many tokens the row has been fed, dropped ones included."""
        return self._sequences.length(row)

    def dropped(self, row: int) -> int:
        """How many of the row's oldest tokens are no longer seen."""
        return self._sequences.dropped(row)
