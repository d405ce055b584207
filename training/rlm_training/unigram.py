"""The weakest model worth beating: every token by how often it occurs in the training text, whatever came before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlm_training.micro import Micro


def expected_counts(counts: Mapping[str, Tensor], mix: Mapping[str, float], tokens: int) -> Tensor:
    """How often each id occurs in ``tokens`` tokens of a mix, float64 [vocabulary].

    ``counts``: each source's own counts [vocabulary]; ``mix``: its share of the tokens, in any unit.
    """
    total = sum(mix.values())
    shares = [counts[name].double() / counts[name].sum().clamp(min=1) * share / total for name, share in mix.items()]
    return torch.stack(shares).sum(0) * tokens


def unigram_losses(counts: Tensor, heldout: Mapping[str, Micro]) -> dict[str, float]:
    """Nats per token of each held-out source under the unigram model of ``counts``, with add-one smoothing."""
    smoothed = counts.double() + 1.0
    nats = smoothed.sum().log() - smoothed.log()
    return {name: float((nats[m.targets.cpu()] * m.scale.cpu().double()).sum()) for name, m in heldout.items()}
