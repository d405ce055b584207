"""ACT's recurrences for the tokens that still run: the dense forward pass without the work of halted tokens.

A halted token's state no longer changes and nothing reads what a further recurrence would make of it; what later
tokens see of it is one key and value, projected once. So from the recurrence on at which enough tokens have halted,
queries, MLP and halting head are computed for running tokens only, and the result is that of
`rlm_engine.models.act.ActModel.forward` with the same gradients (to the rounding of sums in another order). What it
brings: benchmarks/LOG.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlm_engine.models.act import ActModel
from rlm_engine.models.layers import dense_attention, rms_norm

MOST_RUNNING = 0.8  # above this share of running tokens the dense recurrence is cheaper
ROUNDING = 256  # rows of a matrix product are padded to a multiple: kernels are made per shape


class _Rows(torch.autograd.Function):
    """Rows of a matrix by distinct indices; its gradient is a copy, where that of indexing is a slow sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def rows_of(x: Tensor, index: Tensor, padded: int = 0) -> Tensor:
    """x[index] for distinct indices; with ``padded`` rows of zeros follow until there are that many."""
    taken: Tensor = _Rows.apply(x, index)
    if padded > len(index):
        taken = torch.cat((taken, taken.new_zeros(padded - len(index), *taken.shape[1:])))
    return taken


@dataclass(frozen=True)
class Places:
    """Where the running tokens of a batch [rows, tokens] are.

    ``flat`` int64 [n]: their numbers in the flattened batch, ascending. For attention they stand in a rectangle of
    ``width`` columns, at the right end of their row (then none of them sees beyond the keys that a causal
    rectangle of this width may see): ``slots`` int64 [n] are their numbers in it, flattened, and ``positions``
    int64 [rows, width] what stands where (0 where nothing does).
    """

    flat: Tensor
    slots: Tensor
    positions: Tensor
    width: int

    @property
    def padded(self) -> int:
        """Their number, rounded up."""
        return rounded_up(len(self.flat))


def rounded_up(rows: int) -> int:
    """The least multiple of ROUNDING that holds them, at least one."""
    return -(-max(rows, 1) // ROUNDING) * ROUNDING


def find_places(running: Tensor) -> Places:
    """Places of the tokens where running, boolean [rows, tokens], is True."""
    rows, tokens = running.shape
    flat = running.flatten().nonzero().squeeze(1)
    counts = running.sum(1)
    width = min(tokens, -(-max(int(counts.max()), 1) // 64) * 64)
    starts = counts.cumsum(0) - counts
    row, position = flat // tokens, flat % tokens
    rank = torch.arange(len(flat), device=flat.device) - starts[row]
    slots = row * width + (width - counts)[row] + rank
    positions = torch.zeros(rows * width, dtype=torch.int64, device=flat.device)
    positions[slots] = position
    return Places(flat, slots, positions.view(rows, width), width)


class ActiveTokens:
    """`running_step` of `ActModel.forward`; called for every recurrence of a forward pass but the first."""

    def __init__(self, model: ActModel, compiled: bool):
        self._model = model
        compile_ = _compiled if compiled else lambda function: function
        self._project = compile_(self._key_value)
        self._ask = compile_(self._query)
        self._finish = compile_(self._after_attention)
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, state: Tensor, initial: Tensor, n: int, running: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Recurrence n (from 0) of the running tokens [rows, tokens]: the states [rows, tokens, d], p_n [rows, tokens].

        States of halted tokens stay, their p_n is 0. ``mask``: boolean, broadcastable to [rows, 1, tokens, tokens].
        None while too many run. Once few enough do, that stays so for the rest of the forward pass.
        """
        if n == 1:
            self._seen = None
        if self._seen is None and float(running.float().mean()) > MOST_RUNNING:
            return None
        rows, tokens, d = state.shape
        heads = self._model.config.n_heads
        places = find_places(running)
        flat_state = state.flatten(0, 1)
        k, v = self._keys_values(flat_state, cos, sin, rows, tokens, running)
        embedding = self._model.step_embedding[n]
        own = rows_of(flat_state, places.flat, places.padded)
        turn = torch.nn.functional.pad(places.flat % tokens, (0, places.padded - len(places.flat)))
        q = self._ask(own, embedding, cos[turn], sin[turn])
        q = q.new_zeros(rows * places.width, heads, q.shape[-1]).index_copy(0, places.slots, q[: len(places.flat)])
        shape = (rows, -1, heads, q.shape[-1])
        attended = dense_attention(q.view(shape), k.view(shape), v.view(shape), _visible(places, tokens, mask))
        attended = rows_of(attended.reshape(rows * places.width, heads, -1), places.slots, places.padded)
        first = rows_of(initial.flatten(0, 1), places.flat, places.padded)
        new, p = self._finish(own, attended, first, embedding)
        count = len(places.flat)
        states = flat_state.index_copy(0, places.flat, new[:count].to(flat_state.dtype)).view(rows, tokens, d)
        probabilities = p.new_zeros(rows * tokens).index_copy(0, places.flat, p[:count])
        return states, probabilities.view(rows, tokens)

    def _keys_values(
        self, state: Tensor, cos: Tensor, sin: Tensor, rows: int, tokens: int, running: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens: anew where the last recurrence changed the state, else those it had."""
        if self._seen is None:
            everywhere = torch.arange(tokens, device=state.device).repeat(rows)
            k, v = self._project(state, cos[everywhere], sin[everywhere])
        else:
            k, v, changed = self._seen
            padded = rounded_up(len(changed))
            turn = torch.nn.functional.pad(changed % tokens, (0, padded - len(changed)))
            new = self._project(rows_of(state, changed, padded), cos[turn], sin[turn])
            k, v = (old.index_copy(0, changed, x[: len(changed)]) for old, x in zip((k, v), new, strict=True))
        self._seen = k, v, running.flatten().nonzero().squeeze(1)
        return k, v

    def _key_value(self, state: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        block = self._model.block
        return block.key_value(rms_norm(state, block.gain_attn_in, block.norm_eps), cos, sin)

    def _query(self, state: Tensor, step: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        block = self._model.block
        return block.query(rms_norm(state, block.gain_attn_in, block.norm_eps), step, cos, sin)

    def _after_attention(self, state: Tensor, attended: Tensor, initial: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        new = self._model.block.after_attention(state, attended, initial, step)
        return new, self._model.halting_probability(new)


def _visible(places: Places, tokens: int, mask: Tensor | None) -> Tensor:
    """Boolean [rows, 1, width, tokens]: what the running tokens see."""
    if mask is None:
        return (torch.arange(tokens, device=places.flat.device) <= places.positions[..., None])[:, None]
    rows = len(places.positions)
    full = mask[(None,) * (4 - mask.dim())].expand(rows, 1, tokens, tokens)[:, 0]
    return full.gather(1, places.positions[..., None].expand(-1, -1, tokens))[:, None]


def _compiled(function: Any) -> Any:
    """Compiled once for any number of tokens, which is the first size of every argument of more than one axis."""
    inner = torch.compile(function)

    def call(*inputs: Tensor) -> Any:
        for tensor in inputs:
            if tensor.dim() > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        return inner(*inputs)

    return call
