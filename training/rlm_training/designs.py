"""What training must know of each design: how to run it, which head it has, and which losses of its own it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlm_engine.errors import UsageError
from rlm_engine.models.blend import BlendModel
from rlm_engine.models.mixture import MixtureModel
from rlm_engine.models.routed import RoutedModel
from rlm_training.micro import Micro


@dataclass(frozen=True)
class RouterConfig:
    """Routers of blend, routed and mixture in training.

    ``routing``: "sequence", the router pools over the whole row, its future included, as published; "prefix": over
    each position's own prefix, which is what generation sees (blend and routed).
    ``gradient``: mixture only: "none", as published (argmax: its routers never learn), or "straight-through".
    ``computation_weight``: mixture's penalty on passes, times 0.1 per pass of a row through a layer.
    ``rows_alone``: mixture only: a stopped row stays as it is; false: while a batch-mate goes on it passes both norms
    again, as published, so that a row's result depends on its micro-batch.
    """

    routing: str = "sequence"
    gradient: str = "none"
    computation_weight: float = 1e-4
    rows_alone: bool = True

    def __post_init__(self) -> None:
        if self.routing not in ("sequence", "prefix"):
            raise UsageError(f"routing must be 'sequence' or 'prefix', got {self.routing!r}")
        if self.gradient not in ("none", "straight-through"):
            raise UsageError(f"gradient must be 'none' or 'straight-through', got {self.gradient!r}")
        if self.gradient == "straight-through" and not self.rows_alone:
            raise UsageError("gradient 'straight-through' trains each row alone: set rows_alone = true")
        if self.computation_weight < 0:
            raise UsageError("computation_weight must not be negative")


@dataclass(frozen=True)
class Plan:
    """What a step does, a function of the step alone. None means "does not apply".

    ``budget``: recurrences allowed; ``price``: nats per recurrence; ``memory``: tokens of segment memory;
    ``gate``: the recurrence whose improvement the halting head is trained on, the trunk being frozen.
    ``vocabulary``: ids [k] that compete, int64 [vocabulary] places among them, offset [k]: the sampled softmax.
    """

    step: int
    budget: int | None = None
    price: float = 0.0
    memory: int = 0
    gate: int | None = None
    vocabulary: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass
class Forward:
    """What a design's forward gives to the stage's loss.

    ``hidden`` [rows, tokens, d]: logits = cap(hidden . head^T). ``depth`` float32, broadcastable to [rows, tokens]:
    how deep each token went. ``extra``: whatever `auxiliary` needs.
    """

    hidden: Tensor
    depth: Tensor
    extra: Any = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Design(Protocol):
    """One design in training. ``deepest``: the largest depth, for histograms."""

    deepest: int

    @property
    def model(self) -> nn.Module:
        """The module that is trained."""
        ...

    @property
    def cap(self) -> float:
        """Logits are cap * tanh(logits / cap); 0: as they are."""
        ...

    @property
    def masked(self) -> bool:
        """Whether it takes document masks."""
        ...

    @property
    def padding(self) -> int | None:
        """The id that stands for padding; None: any, document masks hide it."""
        ...

    @property
    def all_used(self) -> bool:
        """Whether every trainable parameter gets a gradient in every step."""
        ...

    def head(self) -> Tensor:
        """The output matrix [vocabulary, d]."""
        ...

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """The dense forward of a micro-batch."""
        ...

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> Tensor | None:
        """The design's own loss for this slice, given the token losses [rows, tokens] (detached, nats).

        Summed over the slices of a batch it is the batch's. Adds what it reports to ``forward.statistics``.
        """
        ...


class Blend:
    """rlm-48m: no loss of its own, the router learns through the blend."""

    masked, all_used, cap = False, True, 0.0

    def __init__(self, model: BlendModel, router: RouterConfig):
        self.model, self._router = model, router
        self.deepest = model.config.max_steps
        self.padding = model.config.eos_token_id  # the card pads with end-of-text; causality hides it

    def head(self) -> Tensor:
        """Tied to the token table."""
        return self.model.tokens.weight

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """Depth is the expected one: sum of k p_k."""
        out = self.model(micro.inputs, routing=self._router.routing, return_states=True, with_logits=False)
        p = out.router_probabilities.detach().float()
        depth = (p * torch.arange(p.shape[-1], device=p.device)).sum(-1)
        return Forward(self.model.norm(out.states[-1]), depth if depth.dim() == 2 else depth[:, None])

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> Tensor | None:
        """None."""
        return None


class Routed:
    """rlm-90m and rlm-198m: 0.1 x cross-entropy of the router against labels made of the rows' perplexities."""

    masked, all_used, cap = False, True, 0.0

    def __init__(self, model: RoutedModel, router: RouterConfig):
        self.model, self._router = model, router
        self.deepest = max(model.config.steps)
        self.padding = model.config.pad_token_id

    def head(self) -> Tensor:
        """Never tied."""
        return self.model.unembedding.weight

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """Depth: passes through the shared layer."""
        out = self.model(micro.inputs, routing=self._router.routing, return_states=True, with_logits=False)
        depth = out.steps.float()
        return Forward(self.model.norm(out.states[-1]), depth if depth.dim() == 2 else depth[:, None], out)

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> Tensor | None:
        """The router's loss: mean over the batch's rows (with prefix routing over each row's tokens)."""
        counted = (micro.counts > 0).float()
        row_loss = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        _, labels = self.model.pseudo_labels(row_loss)
        logits = forward.extra.router_logits.float()
        if logits.dim() == 3:
            real = (micro.real > 0).float()
            each = F.cross_entropy(logits.flatten(0, 1), labels[:, None].expand(real.shape).flatten(), reduction="none")
            each = (each.view(real.shape) * real).sum(1) / real.sum(1).clamp(min=1)
        else:
            each = F.cross_entropy(logits, labels, reduction="none")
        router_loss = each.sum() / (len(labels) * micro.slices)
        forward.statistics["router_loss"] = router_loss.detach()
        return self.model.config.router_loss_weight * router_loss


class Mixture:
    """mor: a penalty on passes, which reaches the routers with straight-through gradients only."""

    masked, all_used, cap = False, False, 0.0  # passes that no row takes get no gradient

    def __init__(self, model: MixtureModel, router: RouterConfig):
        self.model, self._router = model, router
        self.deepest = model.config.max_steps
        self.padding = model.config.padding_id

    def head(self) -> Tensor:
        """Never tied."""
        return self.model.head.weight

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """Depth: mean passes over the layers."""
        mates = "rows" if self._router.rows_alone else "published"
        out = self.model(micro.inputs, batch=mates, keep_states=True, with_logits=False)
        return Forward(out.states[-1], out.steps.float().mean(1, keepdim=True), out)

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> Tensor | None:
        """Summed over the batch's rows, as published."""
        cost: Tensor = forward.extra.computation_loss
        forward.statistics["computation_loss"] = cost.detach()
        return self._router.computation_weight * cost


def prepare_blocks(blocks: list[nn.Module], compiled: bool, recompute: bool) -> None:
    """Compile blocks in place and let them be computed again in the backward pass instead of being remembered."""
    for block in blocks:
        if compiled:
            block.compile()
        if recompute:
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)

    return run


def published_design(model: nn.Module, router: RouterConfig, compiled: bool, recompute: bool) -> Design:
    """The adapter of a blend, routed or mixture model."""
    if isinstance(model, MixtureModel):
        if compiled or recompute:
            raise UsageError("train.compile and train.recompute are not for mixture: its passes are chosen row by row")
        model.router_gradient = router.gradient
        if router.gradient == "none":
            for name, parameter in model.named_parameters():
                if ".router_" in name:
                    parameter.requires_grad_(False)  # argmax gives them no gradient anyway
        return Mixture(model, router)
    assert isinstance(model, BlendModel | RoutedModel)
    prepare_blocks([*model.layers, model.recursion], compiled, recompute)
    return Blend(model, router) if isinstance(model, BlendModel) else Routed(model, router)
