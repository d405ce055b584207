"""Losses: cross-entropy through a large vocabulary head without ever holding all logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


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
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(compute)
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                h = hidden[part].to(compute)
                losses[part], gradient = step(h, matrix, targets[part], scale[part], offset, cap)
                grad_hidden[part] = gradient @ matrix
                grad_weight += gradient.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses.double() * scale.double()).sum().float(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None, None, None


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
    ``chunk`` tokens are computed at a time.
    """
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
        """ids [k] to compete, the targets [n] as indices into them, and the offset [k] for their logits.

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
        return ids, place[targets], offset
