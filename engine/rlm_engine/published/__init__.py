"""Published checkpoints: recognised by their keys, read by their own names, their remote code never executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rlm_engine.config import ModelConfig
from rlm_engine.published import blend, mixture, routed


class Published(Protocol):
    """One published design. Functions of a module: `blend`, `routed`, `mixture`."""

    def matches(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a checkpoint with this config.json and these tensors is of this design."""

    def config(self, data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
        """The validated configuration; ModelError naming ``where`` when it and the tensors' shapes disagree."""

    def tensors(self, config: Any, published: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors under our names; ModelError when one is missing, unknown or misshaped."""


_DESIGNS: tuple[Published, ...] = (blend, routed, mixture)


def recognise(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Published | None:
    """The published design this checkpoint belongs to, None when it is none of them.

    All of them register the same `model_type`, so the tensors' names decide.
    """
    for design in _DESIGNS:
        if design.matches(config, shapes):
            return design
    return None
