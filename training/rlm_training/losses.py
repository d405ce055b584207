"""Losses: cross-entropy through a large vocabulary head without ever holding all logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, offset: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Losses [n] in nats and d(sum of scale * loss)/d(logits before the cap) [n, vocabulary] of one chunk."""
    logits = (hidden @ weight.T).float()
    slope = torch.ones_like(logits)
    if cap:
        squashed = torch.tanh(logits / cap)
        logits, slope = squashed * cap, 1.0 - squashed * squashed
    logits = logits + offset
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = normaliser.squeeze(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device)[None, :] == targets[:, None]
    gradient = (torch.exp(logits - normaliser) - is_target.float()) * slope * scale[:, None]
    return loss, gradient.to(hidden.dtype)


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradient is formed in the forward pass, chunk by chunk, while a chunk's logits are still in cache."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        offset: Tensor,
        cap: float,
        chunk: int,
        step: Any,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # A token's share of the loss may be 1e-6: float16 could not hold its gradient. The largest share becomes 1
        # here and is multiplied back in the backward pass, together with the loss scaler's factor.
        peak = scale.max().clamp(min=torch.finfo(torch.float32).tiny)
        relative = scale / peak
        with torch.autocast(device, enabled=False):
            matrix = weight.to(compute)
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                h = hidden[part].to(compute)
                losses[part], gradient = step(h, matrix, targets[part], relative[part], offset, cap)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ matrix
                if grad_weight is not None:
                    grad_weight += gradient.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight, peak)
        ctx.mark_non_differentiable(losses)
        return (losses.double() * scale.double()).sum().float(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, peak = ctx.saved_tensors
        factor = grads[0] * peak
        scaled = [None if grad is None else grad * factor for grad in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None, None, None


_compiled_chunk: Any = None


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    cap: float = 0.0,
    chunk: int = 1024,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """sum(scale * cross-entropy) (scalar, differentiable) and the losses per token [n] in nats (detached).

    hidden [n, d]; weight [vocabulary, d]; targets [n]; scale [n] float weights (0 leaves a token out).
    ``cap``: logits are cap * tanh(logits / cap), 0 for none; ``offset`` [vocabulary] is added afterwards.
    Under autocast the matrix products run in its dtype, softmax and sums in float32.
    ``chunk`` tokens are computed at a time; where many tokens do not count, only those that do are computed, and the
    others' loss is reported as 0.
    """
    counted = scale.count_nonzero()
    needed = -(-max(int(counted), 1) // chunk) * chunk  # whole chunks: compiled code never sees a new shape
    if needed < len(targets):
        # stable: tokens that count come first, in their order, then as many of the others as fill the last chunk
        index = torch.argsort((scale == 0).int(), stable=True)[:needed]
        total, some = _chunked(hidden[index], weight, targets[index], scale[index], offset, cap, chunk, compiled)
        losses = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        return total, losses.index_copy(0, index, some * (scale[index] != 0))
    return _chunked(hidden, weight, targets, scale, offset, cap, chunk, compiled)


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    cap: float,
    chunk: int,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    global _compiled_chunk
    step: Any = _chunk
    if compiled:
        if _compiled_chunk is None:
            _compiled_chunk = torch.compile(_chunk, dynamic=False)
        step = _compiled_chunk
    if offset is None:
        offset = torch.zeros(len(weight), device=weight.device)
    total, losses = _HeadCrossEntropy.apply(hidden, weight, targets, scale, offset, cap, chunk, step)
    return total, losses


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0, chunk: int = 1024
) -> Tensor:
    """Cross-entropy per token [n] in nats, each differentiable on its own (DPO needs sums that are no plain means).

    As `head_cross_entropy`, but the logits of a chunk are computed again in the backward pass.
    """

    def losses(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(h, w).float()
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return torch.nn.functional.cross_entropy(logits, t, reduction="none")

    parts = [
        checkpoint(losses, hidden[i : i + chunk], weight, targets[i : i + chunk], use_reentrant=False)
        for i in range(0, len(targets), chunk)
    ]
    return torch.cat(parts)


class SampledVocabulary:
    """Sampled softmax: all frequent ids, the batch's own, and a random part of the rare ids, importance-weighted.

    The rare sample stands for all rare ids: log(rare / sampled) is added to its logits, so the normaliser's
    expectation is the full one (Bengio and Senecal 2008; log-uniform variants: Jozefowicz et al. 2016).
    Cuts the cost of a 50k head about threefold; finish a run with the full softmax.
    """

    def __init__(self, counts: Tensor, frequent: int, sampled: int):
        """counts [vocabulary]: how often each id occurs in the training data."""
        order = torch.argsort(counts, descending=True, stable=True)
        self.frequent = order[:frequent].sort().values
        self.rare = order[frequent:]
        self.sampled = sampled
        self.size = len(counts)

    def draw(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids [k] to compete, every id's place among them [vocabulary] (-1: absent), the offset [k] for their logits.

        k is fixed, so that compiled code never sees a new shape: places that the batch's ids leave free are taken
        by more sampled ids.
        """
        chosen = torch.zeros(self.size, dtype=torch.bool)
        chosen[self.frequent] = True
        certain = chosen.clone()
        certain[targets] = True
        own = certain & ~chosen
        budget = max(self.sampled - int(own.sum()), 1)
        pool = self.rare[~own[self.rare]]
        picked = pool[torch.randperm(len(pool), generator=generator)[:budget]]
        ids = torch.cat((certain.nonzero().squeeze(1), picked))
        offset = torch.zeros(len(ids))
        offset[len(ids) - len(picked) :] = math.log(max(len(pool), 1) / max(len(picked), 1))
        place = torch.full((self.size,), -1, dtype=torch.int64)
        place[ids] = torch.arange(len(ids))
        return ids, place, offset
