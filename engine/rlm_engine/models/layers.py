"""Parts that several designs share: normalisation, rotary positions, attention over a dense batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_engine.decoding.rotary import rotary_tables as rotary_tables

# (q, k, v) each [..., tokens, heads, head_dim] -> [..., tokens, heads, head_dim]; the caller decides whether this is
# dense causal attention (training) or writes to and reads from a cache (decoding). Block code is the same for both.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# What computes attention over dense batches; rlm_training puts a kernel of its own here while it trains on the CPU.
dense_kernel: Callable[..., Tensor] = F.scaled_dot_product_attention


def rms_norm(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root mean square normalisation over the last axis (Zhang and Sennrich 2019), optionally times a gain."""
    return F.rms_norm(x, (x.shape[-1],), None if gain is None else gain.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, half layout: x [..., tokens, heads, head_dim], cos/sin [..., tokens, head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over a batch; q [batch, tokens, heads, head_dim], k and v may hold more (earlier) tokens.

    Without a mask attention is causal and aligned at the end. ``mask`` is boolean (True = may see) or additive,
    broadcastable to [batch, heads, tokens, keys]. Scores are divided by sqrt(head_dim).
    """
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    if mask is None and q.shape[-2] == k.shape[-2]:
        out = dense_kernel(q, k, v, is_causal=True)
    else:
        if mask is None:
            mask = causal_mask(q.shape[-2], k.shape[-2], device=q.device)
        out = dense_kernel(q, k, v, attn_mask=mask)
    return out.transpose(-2, -3)


def causal_mask(tokens: int, keys: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """Boolean [tokens, keys], True where query i may see key j; the last query sees the last key.

    With ``window`` a query sees at most its `window` latest keys, itself included.
    """
    query = torch.arange(keys - tokens, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask
