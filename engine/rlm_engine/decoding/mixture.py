"""Exact cached decoding of `mixture` models.

A layer's inputs, at every position, depend on how many passes the layers below take, and those are chosen anew at
each token from a mean over the whole text. For one fixed choice everything is causal, and within a layer the passes
are nested. So what is cached is keyed by the *path*, the passes taken by the layers below: a node holds its layer's
input states, their running sum, and per pass the keys, values and outputs, each filled only as far as it was needed.
When the choice comes back to a path its node catches up from where it lagged. Nodes not used for longest are dropped
when memory runs out; a dropped node is rebuilt from its parent's outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlm_engine.config import MixtureConfig
from rlm_engine.decoding.interface import Array, Backend, Cache, Depth, Placement, Result
from rlm_engine.decoding.rotary import rotary_tables
from rlm_engine.errors import InputError, ModelError, UsageError
from rlm_engine.trace import TokenTrace

Path = tuple[int, ...]  # passes taken by layers 0, 1, ... below a node

_FIRST_CAPACITY = 64  # slots a node starts with; it doubles up to the window


def sinusoidal_table(positions: np.ndarray, d_model: int) -> np.ndarray:
    """Sinusoidal positions (Vaswani et al. 2017): float64 [positions, d_model], sine and cosine interleaved."""
    frequencies = 10_000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    table = np.empty((len(angles), d_model))
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles)[:, : d_model // 2]
    return table


def embedding_inputs(config: MixtureConfig, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the piece "embed" takes beside the ids: positions (learned), their table (sinusoidal), nothing (rope)."""
    if config.positions == "learned":
        return (np.asarray(positions, dtype=np.int64),)
    if config.positions == "sinusoidal":
        return (sinusoidal_table(positions, config.d_model),)
    return ()


def step_inputs(config: MixtureConfig, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a pass takes beside the states: rotary tables [tokens, head_dim/2] for "rope", else nothing."""
    if config.positions != "rope":
        return ()
    return rotary_tables(positions, config.head_dim, config.rope_theta)


@dataclass
class _States:
    """States [capacity, d] of positions 0..length-1, written in place."""

    buffer: Array
    length: int = 0

    def append(self, values: Array, count: int) -> None:
        self.buffer[self.length : self.length + count] = values
        self.length += count

    def since(self, start: int, stop: int) -> Array:
        return self.buffer[start:stop]


@dataclass
class _Pass:
    cache: Cache
    outputs: _States


@dataclass
class _Node:
    """One layer under one path: input states with their sum (float64), and the passes run so far."""

    inputs: _States
    capacity: int
    total: np.ndarray  # sum of the first `summed` input states
    summed: int = 0
    passes: list[_Pass] = field(default_factory=list)

    def truncate(self, length: int) -> None:
        if self.inputs.length > length:
            self.inputs.length = length
            self.total, self.summed = np.zeros_like(self.total), 0  # summed afresh from the states when needed
        for one in self.passes:
            one.outputs.length = min(one.outputs.length, length)

    @property
    def slots(self) -> int:
        """Vectors of width d held: inputs, and per pass keys, values and outputs."""
        return self.capacity * (1 + 3 * len(self.passes))


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)  # all of them: ids are small, and truncation needs them
    start: int = 0  # the first token the model still sees


class MixtureDecoder:
    """Decodes `rows` texts, each exactly as if it were alone.

    ``window``: what happens past the window. "exact": as published, the last context_length tokens are run afresh
    for every token (positions restart at 0, so nothing can be kept). "block": when the window is full a quarter of
    it is dropped and the rest is run afresh once; a deviation from the published loop that keeps decoding fast.
    ``capacity``: a smaller window than context_length. ``cache_bytes``: memory for cached paths, all rows together;
    the path in use is always kept, whatever it takes.

    ``report="all"`` gives what a forward of every prefix would give; each prefix makes its own choices, so it costs
    as much as feeding the tokens one by one.
    """

    def __init__(
        self,
        backend: Backend,
        config: MixtureConfig,
        depth: Depth | None = None,
        rows: int = 1,
        capacity: int | None = None,
        window: str = "exact",
        cache_bytes: int = 128 * 2**20,
    ):
        if window not in ("exact", "block"):
            raise UsageError(f"window must be 'exact' or 'block', got {window!r}")
        if rows < 1 or (capacity is not None and capacity < 1):
            raise UsageError("a decoder needs at least one row and room for one token")
        self.backend = backend
        self.config = config
        self.depth = depth or Depth()
        self.rows = rows
        self.window = window
        self.cache_bytes = cache_bytes
        self._size = config.context_length if capacity is None else min(capacity, config.context_length)
        self._rows = [_Row() for _ in range(rows)]
        self._nodes: OrderedDict[tuple[int, Path], _Node] = OrderedDict()  # least recently used first
        probe = backend.numpy(backend.array(np.zeros((1, 1), dtype=np.float32)))
        self._dtype, self._vector_bytes = probe.dtype, probe.dtype.itemsize * config.d_model

    def feed(self, tokens: Sequence[Sequence[int]], report: str = "last") -> Result:
        """Append tokens to each row; see `Decoder.feed`.

        InputError for an id outside the vocabulary, ModelError for numbers that are not finite; after either the
        rows are as they were before.
        """
        if report not in ("last", "all"):
            raise UsageError(f"report must be 'last' or 'all', got {report!r}")
        if len(tokens) != self.rows:
            raise UsageError(f"{len(tokens)} token lists for {self.rows} rows")
        fed = [[int(t) for t in row] for row in tokens]
        for token in (t for row in fed for t in row):
            if not 0 <= token < self.config.vocab_size:
                raise InputError(f"token {token} is outside the vocabulary of {self.config.vocab_size}")
        before = [self.length(row) for row in range(self.rows)]
        logits, traces, rows = [], [], []
        try:
            for row, new in enumerate(fed):
                parts = [[t] for t in new] if report == "all" else [new] if new else []
                for part in parts:
                    self._rows[row].tokens.extend(part)
                    self._place(row)
                    out, trace = self._forward(row)
                    logits.append(out)
                    traces.append(trace)
                    rows.append(row)
        except ModelError:
            for row, length in enumerate(before):
                self.truncate(row, length)
            raise
        stacked = np.concatenate(logits) if logits else np.zeros((0, self.config.vocab_size), dtype=self._dtype)
        return Result(stacked, traces, np.array(rows, dtype=np.int64))

    def truncate(self, row: int, length: int) -> bool:
        """Forget the tokens from position `length` on. Always possible: evicted tokens are simply run again."""
        if length < 0:
            raise UsageError(f"cannot keep {length} tokens")
        state = self._rows[row]
        if length < len(state.tokens):
            del state.tokens[length:]
            self._place(row)
            self._truncate_nodes(row, len(state.tokens) - state.start)
        return True

    def length(self, row: int) -> int:
        """How many tokens the row has been fed, evicted ones included."""
        return len(self._rows[row].tokens)

    def dropped(self, row: int) -> int:
        """How many of the row's oldest tokens are no longer seen."""
        return self._rows[row].start

    @property
    def cached_bytes(self) -> int:
        """Memory the cached paths hold now."""
        return sum(node.slots for node in self._nodes.values()) * self._vector_bytes

    def _place(self, row: int) -> None:
        """Set where the row's window starts: a function of its length alone, so chunks do not matter."""
        state = self._rows[row]
        excess = len(state.tokens) - self._size
        start = 0
        if excess > 0:
            block = max(1, self._size // 4) if self.window == "block" else 1
            start = -(-excess // block) * block
        if start != state.start:
            state.start = start
            self._truncate_nodes(row, 0)  # every position moved

    def _truncate_nodes(self, row: int, length: int) -> None:
        for (owner, _), node in self._nodes.items():
            if owner == row:
                node.truncate(length)

    def _forward(self, row: int) -> tuple[np.ndarray, TokenTrace]:
        """Logits [1, vocabulary] and the trace of the row's last token."""
        state = self._rows[row]
        ids = np.array(state.tokens[state.start :], dtype=np.int64)
        tokens = len(ids)
        path: Path = ()
        node = self._node(row, path, tokens)
        if node.inputs.length < tokens:
            positions = np.arange(node.inputs.length, tokens)
            (x,) = self.backend.run("embed", ids[positions], *embedding_inputs(self.config, positions))
            node.inputs.append(x, len(positions))
        used = [(row, path)]
        for layer in range(self.config.n_layers):
            steps = self._choose(layer, node, tokens)
            outputs = self._extend(layer, node, steps, ids)
            path = (*path, steps)
            if layer + 1 < self.config.n_layers:
                node = self._node(row, path, tokens)
                done = node.inputs.length
                if done < tokens:
                    node.inputs.append(outputs.since(done, tokens), tokens - done)
                used.append((row, path))
        (out,) = self.backend.run("head", outputs.since(tokens - 1, tokens))
        self._evict(set(used))
        logits = self.backend.numpy(out)
        if not np.isfinite(logits).all():
            raise ModelError("the model produced logits that are not finite numbers; its weights may be damaged")
        return logits, TokenTrace(depth=float(np.mean(path)), steps=path)

    def _choose(self, layer: int, node: _Node, tokens: int) -> int:
        """How many passes the layer takes, from the mean of its input states over all positions."""
        if node.summed < tokens:
            fresh = self.backend.numpy(node.inputs.since(node.summed, tokens)).astype(np.float64)
            # float64: the order of summation must not decide a near tie of the router
            node.total = node.total + fresh.sum(axis=0)
            node.summed = tokens
        if not np.isfinite(node.total).all():
            raise ModelError(f"the input of layer {layer} is not finite; the model's weights may be damaged")
        steps = self.config.max_steps
        if self.config.router == "adaptive":
            (probabilities,) = self.backend.run(f"layer.{layer}.router", (node.total / tokens)[None, :])
            steps = int(np.argmax(self.backend.numpy(probabilities)[0]))
        return steps if self.depth.max_steps is None else min(steps, self.depth.max_steps)

    def _extend(self, layer: int, node: _Node, steps: int, ids: np.ndarray) -> _States:
        """Bring passes 0..steps-1 up to date; the states after the last of them."""
        states, tokens = node.inputs, len(ids)
        for step in range(steps):
            if step == len(node.passes):
                node.passes.append(self._new_pass(node.capacity))
            one = node.passes[step]
            done = one.outputs.length
            if done < tokens:
                slots = np.arange(done, tokens)
                hidden = ids[slots] == self.config.padding_id
                zeros = np.zeros_like(slots)
                where = Placement(zeros, slots, zeros, hidden if hidden.any() else None)
                rotary = step_inputs(self.config, slots)
                x = states.since(done, tokens)
                (out,) = self.backend.attend(f"layer.{layer}.step.{step}", x, one.cache, where, *rotary)
                one.outputs.append(out, tokens - done)
            states = one.outputs
        return states

    def _node(self, row: int, path: Path, tokens: int) -> _Node:
        """The row's node for a path, with room for `tokens`, now the most recently used."""
        node = self._nodes.get((row, path))
        if node is None:
            capacity = self._room(_FIRST_CAPACITY, tokens)
            node = _Node(self._zeros(capacity), capacity, np.zeros(self.config.d_model))
            self._nodes[row, path] = node
        self._nodes.move_to_end((row, path))
        if node.capacity < tokens:
            capacity = self._room(node.capacity, tokens)
            for states in (node.inputs, *(one.outputs for one in node.passes)):
                more = self._zeros(capacity - node.capacity)
                states.buffer = self.backend.concatenate([states.buffer, more.buffer])
            for one in node.passes:
                one.cache.grow(capacity)
            node.capacity = capacity
        return node

    def _room(self, capacity: int, tokens: int) -> int:
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self._size)

    def _new_pass(self, capacity: int) -> _Pass:
        cache = self.backend.new_cache(1, self.config.n_heads, capacity, self.config.head_dim)
        return _Pass(cache, self._zeros(capacity))

    def _zeros(self, capacity: int) -> _States:
        return _States(self.backend.array(np.zeros((capacity, self.config.d_model), dtype=self._dtype)))

    def _evict(self, used: set[tuple[int, Path]]) -> None:
        excess = self.cached_bytes - self.cache_bytes
        if excess <= 0:
            return
        for key in [k for k in self._nodes if k not in used]:
            excess -= self._nodes.pop(key).slots * self._vector_bytes
            if excess <= 0:
                return
