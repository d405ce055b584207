"""The model designs in PyTorch: dense forward for training and reference, and the pieces decoding runs."""

from __future__ import annotations

from typing import Any

from rlm_engine.config import ActConfig, BlendConfig, ModelConfig, RoutedConfig


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
