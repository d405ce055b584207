"""The pre-norm transformer block that the published blend and routed designs are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.models import layers
from rlm_engine.models.layers import Attend, rotate


class PreNormBlock(nn.Module):
    """x + Attention(LN x), then x + FF(LN x) with the exact (erf) GELU; with or without rotary positions.

    Queries, keys and values come from one packed matrix, rows in the order q, k, v, heads contiguous.
    ``attention_out_dropout`` acts after the attention's output projection, ``dropout`` inside and after the
    feed-forward; dropout on attention weights belongs to the caller's Attend.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ffn: int,
        *,
        norm_eps: float,
        biases: bool = True,
        dropout: float = 0.0,
        attention_out_dropout: float = 0.0,
    ):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.attention_out_dropout = attention_out_dropout
        self.norm1 = nn.LayerNorm(d_model, eps=norm_eps)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=biases)
        self.out = nn.Linear(d_model, d_model, bias=biases)
        self.norm2 = nn.LayerNorm(d_model, eps=norm_eps)
        self.up = nn.Linear(d_model, ffn, bias=biases)
        self.down = nn.Linear(ffn, d_model, bias=biases)

    def forward(self, x: Tensor, attend: Attend, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """One application to x [..., tokens, d]; cos and sin are rotary tables [..., tokens, head_dim/2]."""
        # each [..., tokens, heads, head_dim]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).unbind(-3)
        if cos is not None and sin is not None:
            # the tables may be finer than the states: rotate in their precision, attend in the states'
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        attended = self.out(attend(q, k, v).flatten(-2))
        x = x + F.dropout(attended, self.attention_out_dropout, self.training)
        inner = F.dropout(F.gelu(self.up(self.norm2(x))), self.dropout, self.training)
        return x + F.dropout(self.down(inner), self.dropout, self.training)


def masked_attention(mask: Tensor | None, dropout: float, blind: Tensor | None = None) -> Attend:
    """Dense attention over a batch, scores divided by sqrt(head_dim); causal when there is no mask.

    ``mask``: boolean, True where a query may see a key, broadcastable to [batch, heads, tokens, tokens].
    ``blind``: boolean [batch, tokens], queries that may see nothing and therefore gather zeros; the mask must
    show them some key all the same, because a softmax over nothing is NaN.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = layers.dense_kernel(q, k, v, mask, dropout_p=dropout, is_causal=mask is None)
        out = out.transpose(1, 2)
        return out if blind is None else out.masked_fill(blind[..., None, None], 0.0)

    return attend


def shifted_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of predicting labels[:, t + 1] at t: losses [batch, tokens - 1] in nats and which count (bool).

    Labels of -100 count for nothing; their loss is 0.
    """
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = labels[:, 1:]
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(targets), targets != -100


def masked_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """Mean of the losses that count; 0 (not NaN) when none does."""
    return losses.sum() / valid.sum().clamp(min=1)


def running_mean(states: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over the positions up to each one: states [batch, tokens, d] -> the same shape.

    ``counted``: boolean [batch, tokens], positions that take part; before the first of them the mean is zero.
    Summed in float64: routers compare close scores.
    """
    wide = states.double()
    if counted is None:
        count = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
    else:
        wide = wide * counted[..., None]
        count = counted.cumsum(1).clamp(min=1)[..., None]
    return (wide.cumsum(1) / count).to(states.dtype)
