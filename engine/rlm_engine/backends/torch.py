"""Runs pieces with PyTorch, on CPU or CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_engine.decoding.interface import Array, Cache, Placement
from rlm_engine.models.layers import Attend

# A piece: (x, attend, *inputs) -> tensors for pieces with attention, (*inputs) -> tensors for the others.
Piece = Callable[..., tuple[Tensor, ...]]


class TorchCache:
    """Keys and values of one attention application, [rows, heads, capacity, head_dim], written in place."""

    def __init__(self, rows: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.k = torch.zeros(rows, heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self._hidden = np.zeros((rows, capacity), dtype=bool)

    def write(self, where: Placement, k: Tensor, v: Tensor) -> None:
        if len(where) == 1:
            row, slot = int(where.rows[0]), int(where.slots[0])
            self.k[row, :, slot] = k[0]
            self.v[row, :, slot] = v[0]
        else:
            rows = torch.from_numpy(where.rows).to(self.k.device)
            slots = torch.from_numpy(where.slots).to(self.k.device)
            self.k[rows, :, slots] = k
            self.v[rows, :, slots] = v
        self._hidden[where.rows, where.slots] = False if where.hidden is None else where.hidden

    def shift(self, row: int, start: int, stop: int) -> None:
        count = stop - start
        # clone: source and destination overlap
        self.k[row, :, :count] = self.k[row, :, start:stop].clone()
        self.v[row, :, :count] = self.v[row, :, start:stop].clone()
        self._hidden[row, :count] = self._hidden[row, start:stop].copy()
        self._hidden[row, count:] = False

    def hide(self, row: int, slots: np.ndarray) -> None:
        self._hidden[row, slots] = True

    def grow(self, capacity: int) -> None:
        extra = capacity - self.capacity
        self.k, self.v = F.pad(self.k, (0, 0, 0, extra)), F.pad(self.v, (0, 0, 0, extra))
        self._hidden = np.pad(self._hidden, ((0, 0), (0, extra)))
        self.capacity = capacity

    def attend(self, where: Placement) -> Attend:
        """Attention of flat tokens over this cache, writing their keys and values first."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(where, k, v)
            rows = where.rows
            if len(rows) == 1 or (rows == rows[0]).all():
                return self._attend_row(q, int(rows[0]), where.slots, where.first)
            out = torch.empty_like(q)
            for row in np.unique(rows):
                index = np.flatnonzero(rows == row)
                out[index] = self._attend_row(q[index], int(row), where.slots[index], where.first[index])
            return out

        return attend

    def _attend_row(self, q: Tensor, row: int, slots: np.ndarray, first: np.ndarray) -> Tensor:
        start, stop = int(first.min()), int(slots.max()) + 1
        k, v = self.k[row, :, start:stop], self.v[row, :, start:stop]
        hidden = self._hidden[row, start:stop]
        mask = None
        blind = np.zeros(0, dtype=np.int64)
        if len(slots) > 1 or hidden.any():
            key = np.arange(start, stop)
            visible = (key[None, :] <= slots[:, None]) & (key[None, :] >= first[:, None]) & ~hidden[None, :]
            blind = np.flatnonzero(~visible.any(axis=1))
            visible[blind, 0] = True  # keeps the softmax finite; these outputs are zeroed below
            mask = torch.from_numpy(visible).to(q.device)
        # [heads, tokens, head_dim]
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask)[0]
        out = out.transpose(0, 1)
        if len(blind):
            out = out.clone()
            out[blind] = 0.0  # a token that may see nothing gathers nothing
        return out


@functools.cache
def _outside_graphs() -> Callable[[Attend], Attend]:
    """Wraps attention over a cache so that a compiled piece calls it between two graphs.

    Instances of one class: the compiler guards on what it is handed, and would compile anew for every new function.
    Made when first asked for, because marking it imports the compiler (about 2 s).
    """

    class OutsideGraphs:
        def __init__(self, attend: Attend):
            self._attend = attend

        @torch.compiler.disable
        def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(q, k, v)

    return OutsideGraphs


class TorchBackend:
    """Runs the pieces of one PyTorch model (`model.pieces()`), without gradients.

    ``compiled``: compile each piece with torch.compile when it first runs (tens of seconds in all), sizes left open.
    What surrounds the attention is compiled; the attention itself, which reads and writes caches in place, is not.
    """

    name = "torch"

    def __init__(
        self, pieces: dict[str, Piece], dtype: torch.dtype, device: torch.device | str = "cpu", compiled: bool = False
    ):
        self._pieces = {n: torch.compile(p, dynamic=True) for n, p in pieces.items()} if compiled else pieces
        self._wrap = _outside_graphs() if compiled else None
        self.dtype = dtype
        self.device = torch.device(device)

    @torch.no_grad()
    def run(self, piece: str, *inputs: Array) -> tuple[Array, ...]:
        return self._pieces[piece](*(self._convert(i) for i in inputs))

    @torch.no_grad()
    def attend(self, piece: str, x: Array, cache: Cache, where: Placement, *inputs: Array) -> tuple[Array, ...]:
        assert isinstance(cache, TorchCache)
        attention = cache.attend(where)
        if self._wrap is not None:
            attention = self._wrap(attention)
        return self._pieces[piece](self._convert(x), attention, *(self._convert(i) for i in inputs))

    def new_cache(self, rows: int, heads: int, capacity: int, head_dim: int) -> TorchCache:
        return TorchCache(rows, heads, capacity, head_dim, self.dtype, self.device)

    def array(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor.to(self.device)

    def numpy(self, array: Array) -> np.ndarray:
        tensor = array.detach().to("cpu")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        return np.asarray(tensor.numpy())

    @torch.no_grad()
    def concatenate(self, arrays: Sequence[Array]) -> Tensor:
        return torch.cat(list(arrays), dim=0)

    def _convert(self, value: Array) -> Array:
        return self.array(value) if isinstance(value, np.ndarray) else value
