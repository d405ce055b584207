"""Exponential moving average of the weights: what is validated and exported when a recipe asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """mean <- decay * mean + (1 - decay) * weights, with decay rising from 0.1 so that the start is forgotten.

    Works on sharded parameters as on whole ones.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay, self._updates = model, decay, 0
        self._mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the mean."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 9))
        for name, parameter in self._model.named_parameters():
            self._mean[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries the mean inside, its own weights again afterwards."""
        own = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self._copy(self._mean)
        try:
            yield
        finally:
            self._copy(own)

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"updates": self._updates, "mean": self._mean}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore `state_dict`."""
        mean, updates = state["mean"], state["updates"]
        assert isinstance(mean, dict) and isinstance(updates, int)
        self._updates = updates
        for name, tensor in self._mean.items():
            tensor.copy_(mean[name])

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.detach().copy_(values[name])
