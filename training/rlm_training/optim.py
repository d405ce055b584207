"""Optimizers: Muon for matrices, AdamW for everything else, or AdamW for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rlm_engine.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """Peak learning rates and decay.

    ``name``: "muon" (Jordan et al. 2024: momentum orthogonalised by Newton-Schulz, for the block's matrices; AdamW
    for the rest) or "adamw". ``lr``: matrices; ``embedding_lr``, ``gain_lr`` (norm gains, biases, step embedding),
    ``halt_lr`` (halting head). ``clip``: gradient norm of the AdamW parameters.
    """

    name: str = "muon"
    lr: float = 0.012
    embedding_lr: float = 0.02
    gain_lr: float = 0.01
    halt_lr: float = 0.003
    weight_decay: float = 0.03
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise UsageError(f"optim: name must be 'muon' or 'adamw', got {self.name!r}")
        for key in ("lr", "embedding_lr", "gain_lr", "halt_lr", "clip"):
            if not 0 <= getattr(self, key) < 100:
                raise UsageError(f"optim: {key} is out of range: {getattr(self, key)}")


class HybridOptimizer:
    """Both optimizers behind one door; a group's learning rate is its peak times the schedule."""

    def __init__(self, model: nn.Module, config: OptimConfig, frozen: tuple[str, ...] = ()):
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "gain": [], "halt": []}
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
                continue
            if name.startswith("halt."):
                groups["halt"].append(parameter)
            elif "embedding" in name and name.endswith("weight"):
                groups["embedding"].append(parameter)
            elif parameter.ndim == 2 and name.startswith("block."):
                groups["matrix"].append(parameter)
            else:
                groups["gain"].append(parameter)
        self._clip, self._adam_parameters = config.clip, [*groups["embedding"], *groups["gain"], *groups["halt"]]
        adam = [
            {"params": groups["embedding"], "lr": config.embedding_lr, "weight_decay": 0.0},
            {"params": groups["gain"], "lr": config.gain_lr, "weight_decay": 0.0},
            {"params": groups["halt"], "lr": config.halt_lr, "weight_decay": 0.0},
        ]
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if config.name == "muon":
            self._optimizers["muon"] = torch.optim.Muon(
                groups["matrix"], lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
            )
        else:
            adam.append({"params": groups["matrix"], "lr": config.lr, "weight_decay": config.weight_decay})
            self._adam_parameters += groups["matrix"]
        self._optimizers["adamw"] = torch.optim.AdamW(
            [g for g in adam if g["params"]], betas=(config.beta1, config.beta2), eps=1e-8, fused=True
        )
        self._peaks = {
            name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in self._optimizers.items()
        }

    def step(self, scale: float) -> float:
        """Update with learning rates at `scale` of their peaks, clear gradients; returns the AdamW gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self._adam_parameters, self._clip)
        for name, optimizer in self._optimizers.items():
            for group, peak in zip(optimizer.param_groups, self._peaks[name], strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def skip(self) -> None:
        """Clear gradients without an update."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """State of both optimizers."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Restore `state_dict`."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])
