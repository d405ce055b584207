"""What a step minimises: the tokens' cross-entropy (pretraining, SFT) or DPO's preference loss, for every design.

The loss is computed inside `forward`, so that DDP and FSDP see every parameter's use. Losses and statistics are each
slice's share: summed over the slices of a batch and over all processes they are the batch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.errors import UsageError
from rlm_training.designs import Design, Forward, Plan
from rlm_training.losses import head_cross_entropy, token_cross_entropy
from rlm_training.micro import Micro

Statistics = dict[str, Tensor]  # float64 sums; "depth_histogram" is a vector


@dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation (Rafailov et al. 2023).

    ``beta``: how strongly the policy is held to the reference. ``length_normalised``: log-probabilities per token
    instead of per reply, against growing replies (Meng et al. 2024). ``sft_weight``: weight of the chosen replies'
    cross-entropy beside it. ``epochs`` over the pairs. ``max_length_ratio``: pairs whose replies' lengths differ
    more are left out (0: none).
    """

    beta: float = 0.5
    length_normalised: bool = True
    sft_weight: float = 0.1
    epochs: int = 2
    max_length_ratio: float = 1.5

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.sft_weight < 0 or self.epochs < 1:
            raise UsageError("beta must be above 0, sft_weight not negative, epochs at least 1")
        if self.max_length_ratio and self.max_length_ratio < 1:
            raise UsageError("max_length_ratio must be 0 or at least 1")


class TokenObjective(nn.Module):
    """Mean cross-entropy of the tokens that count, plus the design's own loss."""

    def __init__(self, design: Design, compiled: bool = False):
        super().__init__()
        self.model = design.model  # registered, so that its parameters are the objective's
        self.design, self._compiled = design, compiled

    def forward(self, micro: Micro, plan: Plan) -> tuple[Tensor, Statistics]:
        """The slice's share of the loss in nats (scalar, differentiable), and its statistics."""
        return _token_loss(self.design, micro, plan, self._compiled)


class PreferenceObjective(nn.Module):
    """-log sigmoid(beta * margin), margin = how much more than the reference the policy prefers the chosen reply."""

    def __init__(self, design: Design, config: PreferenceConfig):
        super().__init__()
        self.model = design.model
        self.design, self._config = design, config

    def forward(self, micro: Micro, plan: Plan) -> tuple[Tensor, Statistics]:
        """The slice's share of the loss, and its statistics (accuracy, margin, the chosen replies' nats per token).

        A slice without reference is held-out text: its cross-entropy.
        """
        if micro.reference is None:
            return _token_loss(self.design, micro, plan, compiled=False)
        forward, losses = self._token_losses(micro, plan)
        length = micro.counts.sum(1).clamp(min=1) if self._config.length_normalised else 1.0
        policy = -(losses * micro.counts).sum(1) / length  # [2 pairs]
        reference = micro.reference.T.flatten() / length
        chosen, rejected = (policy - reference).chunk(2)
        margin = self._config.beta * (chosen - rejected)
        pairs = len(margin) * micro.slices
        chosen_loss = (losses * micro.scale).sum()
        loss = -F.logsigmoid(margin).sum() / pairs + self._config.sft_weight * chosen_loss
        statistics = {
            "loss": loss.detach().double(),
            "accuracy": ((margin > 0).double() + 0.5 * (margin == 0)).sum() / pairs,
            "margin": margin.detach().double().sum() / pairs,
            "chosen_loss": chosen_loss.detach().double(),
        }
        return _finish(self.design, forward, micro, plan, loss, losses.detach(), statistics)

    @torch.no_grad()
    def log_probabilities(self, micro: Micro, plan: Plan) -> Tensor:
        """log p(reply | prompt) in nats of chosen and rejected replies, [pairs, 2]."""
        _, losses = self._token_losses(micro, plan)
        return -(losses * micro.counts).sum(1).view(2, -1).T

    def _token_losses(self, micro: Micro, plan: Plan) -> tuple[Forward, Tensor]:
        forward = self.design.run(micro, plan)
        kept = (micro.counts > 0).flatten().nonzero().squeeze(1)
        hidden = forward.hidden.flatten(0, 1)[kept]
        some = token_cross_entropy(hidden, self.design.head(), micro.targets.flatten()[kept], cap=self.design.cap)
        losses = torch.zeros(micro.counts.numel(), dtype=some.dtype, device=some.device).index_copy(0, kept, some)
        return forward, losses.view(micro.counts.shape)


def _token_loss(design: Design, micro: Micro, plan: Plan, compiled: bool) -> tuple[Tensor, Statistics]:
    forward = design.run(micro, plan)
    weight, targets, offset = design.head(), micro.targets.flatten(), None
    if plan.vocabulary is not None:
        ids, places, offset = plan.vocabulary
        weight, targets = weight[ids], places[targets]
    loss, losses = head_cross_entropy(
        forward.hidden.flatten(0, 1),
        weight,
        targets,
        micro.scale.flatten(),
        offset=offset,
        cap=design.cap,
        compiled=compiled and torch.is_grad_enabled(),
    )
    losses = losses.view(micro.counts.shape)
    statistics = {"loss": (losses.double() * micro.scale.double()).sum()}
    return _finish(design, forward, micro, plan, loss, losses, statistics)


def _finish(
    design: Design, forward: Forward, micro: Micro, plan: Plan, loss: Tensor, losses: Tensor, statistics: Statistics
) -> tuple[Tensor, Statistics]:
    extra = design.auxiliary(forward, micro, losses, plan)
    if extra is not None:
        loss = loss + extra
    statistics["total"] = loss.detach().double()
    statistics |= {name: value.double() for name, value in forward.statistics.items()}
    depths = forward.depth.double().expand(micro.counts.shape)[micro.counts > 0]
    statistics["depth"], statistics["depth_squared"] = depths.sum(), depths.square().sum()
    bins = torch.bincount(depths.round().long(), minlength=design.deepest + 1)
    statistics["depth_histogram"] = bins.double()
    return loss, statistics
