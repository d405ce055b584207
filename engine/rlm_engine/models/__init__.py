"""The model designs in PyTorch: dense forward for training and reference, and the pieces decoding runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlm_engine.config import ActConfig, BlendConfig, ModelConfig, RoutedConfig

if TYPE_CHECKING:
    import numpy as np


def build_model(config: ModelConfig) -> Any:
    """The PyTorch module of a configuration, weights not yet set (on the current default device)."""
    if isinstance(config, ActConfig):
        from rlm_engine.models.act import ActModel

        return ActModel(config)
    if isinstance(config, BlendConfig):
        from rlm_engine.models.blend import BlendModel

        return BlendModel(config)
    if isinstance(config, RoutedConfig):
        from rlm_engine.models.routed import RoutedModel

        return RoutedModel(config)
    from rlm_engine.models.mixture import MixtureModel

    return MixtureModel(config)


def module_from(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Any:
    """The module with these weights, which it shares rather than copies; evaluation mode."""
    import torch

    with torch.device("meta"):
        module = build_model(config)
    if any(buffer.is_meta for buffer in module.buffers()):  # tables that no checkpoint holds
        module = build_model(config)
    double = any(values.dtype.itemsize == 8 for values in tensors.values())
    module.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()}, assign=True)
    return module.to(torch.float64 if double else torch.float32).requires_grad_(False).eval()
