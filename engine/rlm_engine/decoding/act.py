"""Exact incremental decoding of `act`: early exit per token, one key and value for all deeper recurrences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlm_engine.config import ActConfig
from rlm_engine.decoding.halting import HaltingState, advance
from rlm_engine.decoding.interface import Array, Backend, Depth, Placement, Result
from rlm_engine.decoding.reporting import Report
from rlm_engine.decoding.rotary import rotary_tables
from rlm_engine.decoding.trunk import CACHE_LIMIT_BYTES, CHUNK
from rlm_engine.errors import ModelError, UsageError
from rlm_engine.trace import TokenTrace


class ActDecoder:
    """Decodes `rows` sequences; implements `Decoder`.

    A token that halts at recurrence n runs no deeper block; its final state is projected once and the key and value
    are written into every deeper recurrence's cache, where later tokens see them. Within a prompt the same holds:
    halted tokens leave the batch. A token sees the `context_length` latest tokens, itself included; older ones leave
    the cache in blocks, which changes nothing for what is seen.
    """

    def __init__(
        self,
        backend: Backend,
        config: ActConfig,
        depth: Depth | None = None,
        rows: int = 1,
        capacity: int | None = None,
    ):
        self.backend, self.config, self.rows = backend, config, rows
        self.depth = depth or Depth()
        window = config.context_length
        # room to move the window only every so often: moving costs a copy of the whole cache
        self._capacity = max(capacity or 0, window + max(64, window // 4))
        size = 2 * 4 * config.max_steps * rows * self._capacity * config.d_model  # at least: single precision
        if size > CACHE_LIMIT_BYTES:
            raise ModelError(
                f"a context of {window} tokens needs {size / 2**30:.1f} GiB of key/value cache, more than the "
                f"{CACHE_LIMIT_BYTES / 2**30:.0f} GiB allowed; lower context_length in config.json"
            )
        self._caches = [
            backend.new_cache(rows, config.n_heads, self._capacity, config.head_dim) for _ in range(config.max_steps)
        ]
        self._lengths = np.zeros(rows, dtype=np.int64)  # tokens fed so far
        self._bases = np.zeros(rows, dtype=np.int64)  # position of slot 0

    def feed(self, tokens: Sequence[Sequence[int]], report: str = "last") -> Result:
        """Append tokens to each row; see `Decoder.feed`."""
        waiting = [np.asarray(row, dtype=np.int64) for row in tokens]
        if len(waiting) != self.rows:
            raise UsageError(f"tokens for {len(waiting)} rows were given to a decoder of {self.rows}")
        collected = Report(report)
        while any(len(row) for row in waiting):
            parts = [row[: self._make_room(r, min(len(row), CHUNK))] for r, row in enumerate(waiting)]
            waiting = [row[len(part) :] for row, part in zip(waiting, parts, strict=True)]
            wanted = [
                np.arange(len(part))
                if collected.everything
                else np.arange(len(part))[len(part) - 1 + bool(len(rest)) :]
                for part, rest in zip(parts, waiting, strict=True)
            ]
            self._run(parts, wanted, collected)
        return collected.result(self.config.vocab_size)

    def truncate(self, row: int, length: int) -> bool:
        """Forget the row's tokens from `length` on; False when tokens it would see again have left the cache."""
        if length > self._lengths[row]:
            return False
        if length == 0:
            self._bases[row] = 0
        if self._bases[row] > max(0, length - (self.config.context_length - 1)):
            return False
        self._lengths[row] = length
        return True

    def length(self, row: int) -> int:
        """Tokens fed to the row, evicted ones included."""
        return int(self._lengths[row])

    def dropped(self, row: int) -> int:
        """How many of the row's oldest tokens are no longer seen."""
        return max(0, int(self._lengths[row]) - self.config.context_length)

    def _make_room(self, row: int, wanted: int) -> int:
        """Move the window if the cache is full; returns how many tokens fit now."""
        used = int(self._lengths[row] - self._bases[row])
        keep = self.config.context_length - 1
        if used + wanted > self._capacity and used > keep:
            for cache in self._caches:
                cache.shift(row, used - keep, used)
            self._bases[row] += used - keep
            used = keep
        return min(wanted, self._capacity - used)

    def _place(self, parts: list[np.ndarray]) -> tuple[np.ndarray, Placement]:
        """Positions [N] and placement of the parts' tokens."""
        rows = np.repeat(np.arange(self.rows), [len(part) for part in parts])
        positions = np.concatenate([self._lengths[r] + np.arange(len(part)) for r, part in enumerate(parts)])
        slots = positions - self._bases[rows]
        first = np.maximum(0, slots - (self.config.context_length - 1))
        return positions, Placement(rows, slots, first)

    def _run(self, parts: list[np.ndarray], wanted: list[np.ndarray], collected: Report) -> None:
        """Run one chunk of every row through the recurrences; report the tokens at `wanted` of each part."""
        positions, where = self._place(parts)
        total, halting = self._recur(np.concatenate(parts), positions, where)
        starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
        chosen = np.concatenate([start + index for start, index in zip(starts, wanted, strict=True)])
        if len(chosen):
            (out,) = self.backend.run("head", total if len(chosen) == len(where) else total[chosen])
            traces = [TokenTrace(float(len(halting[i])), (len(halting[i]),), tuple(halting[i])) for i in chosen]
            collected.add(where.rows[chosen], self.backend.numpy(out), traces)
        for row, part in enumerate(parts):
            self._lengths[row] += len(part)

    def _recur(self, ids: np.ndarray, positions: np.ndarray, where: Placement) -> tuple[Array, list[list[float]]]:
        """Returns the weighted states y [N, d] and every token's halting probabilities."""
        config, backend = self.config, self.backend
        steps = min(config.max_steps, self.depth.max_steps or config.max_steps)
        threshold = self.depth.halt_threshold or 1.0 - config.halt_epsilon
        tables = rotary_tables(positions, config.head_dim, config.rope_theta)
        cos, sin = backend.array(tables[0]), backend.array(tables[1])
        (state,) = backend.run("embed", ids)
        initial, y = state, state * 0.0
        live = np.arange(len(ids))
        state_of: HaltingState | None = None
        recorded: list[list[float]] = [[] for _ in live]
        for n in range(steps):
            before = state
            state, p = backend.attend("step", state, self._caches[n], where, initial, np.asarray(n), cos, sin)
            probability = backend.numpy(p)
            if not np.isfinite(probability).all():
                raise ModelError("a halting probability is NaN; the model's weights are damaged")
            if n + 1 < config.min_steps:
                probability = probability * 0
            if state_of is None:
                state_of = HaltingState(np.zeros_like(probability), np.ones(len(live), dtype=bool))
            weight, state_of, stopped = advance(state_of, probability, n + 1 == steps, threshold)
            for index, value in zip(live, probability, strict=True):
                recorded[index].append(float(value))
            self._accumulate(y, live, weight, state, stopped)
            if stopped.any():
                halted = np.flatnonzero(stopped)
                self._settle(n, before if config.kv == "reuse" else state, halted, where, cos, sin)
                if len(halted) == len(live):
                    break
                going = np.flatnonzero(~stopped)
                state, initial, cos, sin = state[going], initial[going], cos[going], sin[going]
                live, where = live[going], where.take(going)
                state_of = HaltingState(state_of.cumulative[going], state_of.running[going])
        return y, recorded

    def _accumulate(self, y: Array, live: np.ndarray, weight: np.ndarray, state: Array, stopped: np.ndarray) -> None:
        """y[live] += weight * state (rule "act"), or y takes the state of those that stop (rule "last")."""
        if self.config.rule == "last":
            halted = np.flatnonzero(stopped)
            y[live[halted]] = state[halted]
        else:
            y[live] = y[live] + self.backend.array(weight[:, None]) * state

    def _settle(self, n: int, state: Array, halted: np.ndarray, where: Placement, cos: Array, sin: Array) -> None:
        """Write what every deeper recurrence sees of the tokens that halted at recurrence n."""
        deeper = self._caches[n + 1 :]
        if deeper:
            k, v = self.backend.run("key_value", state[halted], cos[halted], sin[halted])
            for cache in deeper:
                cache.write(where.take(halted), k, v)
