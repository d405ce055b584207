"""Tiny models exported to ONNX, each once per test run, and the backends that run them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import tiny_act

from rlm_engine.backends.onnx import OnnxBackend, open_onnx
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import MixtureConfig, ModelConfig
from rlm_engine.decoding.act import ActDecoder
from rlm_engine.decoding.blend import BlendDecoder
from rlm_engine.decoding.interface import Backend
from rlm_engine.decoding.mixture import MixtureDecoder
from rlm_engine.decoding.routed import RoutedDecoder
from rlm_engine.export.onnx import write_graphs
from rlm_engine.models import build_model

# name -> what is special about it
DESIGNS = (
    "act",  # heads of 8, as GroupQueryAttention wants them
    "act-64",  # heads of 64, as in the real models
    "blend",  # heads of 6: padded in the cache
    "rlm-90m",
    "rlm-198m",
    "mixture-learned",
    "mixture-sinusoidal",
    "mixture-rope",  # fixed router
)
_DECODERS = {"act": ActDecoder, "blend": BlendDecoder, "routed": RoutedDecoder, "mixture": MixtureDecoder}
_directory = Path(tempfile.mkdtemp(prefix="rlm-chat-tests-"))
atexit.register(shutil.rmtree, _directory, ignore_errors=True)
_models: dict[tuple[str, int], Any] = {}
_backends: dict[tuple[str, int, str], OnnxBackend] = {}


def model_of(design: str, seed: int = 0) -> Any:
    """A float32 model whose routers and halting head really choose."""
    if (design, seed) not in _models:
        _models[design, seed] = _build(design, seed).float().eval()
    return _models[design, seed]


def _build(design: str, seed: int) -> Any:
    if design == "act":
        return tiny_act(seed)
    if design == "act-64":
        return tiny_act(seed, d_model=128, ffn=96)
    generator = torch.Generator().manual_seed(seed)
    if not design.startswith("mixture"):
        from tiny_routers import tiny_model

        return tiny_model(design, seed, torch.float32)  # type: ignore[arg-type]
    positions = design.removeprefix("mixture-")
    config = MixtureConfig(
        vocab_size=23, d_model=16, n_heads=2, eos_token_id=7, context_length=12, tokenizer="none", n_layers=3, ffn=20,
        max_steps=3, router="fixed" if positions == "rope" else "adaptive", positions=positions,
    )  # fmt: skip
    model = build_model(config).initialise(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.2 if "router" in name or "embedding" in name else 0.4, generator=generator)
            elif "router_in" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def onnx_backend(design: str, seed: int = 0, precision: str = "fp32") -> OnnxBackend:
    key = design, seed, precision
    if key not in _backends:
        model = model_of(design, seed)
        directory = _directory / f"{design}-{seed}-{precision}"
        directory.mkdir()
        write_graphs(directory, model.config, tensors_of(model), precision)
        _backends[key] = open_onnx(directory, model.config, threads=1)
    return _backends[key]


def torch_backend(design: str, seed: int = 0) -> TorchBackend:
    return TorchBackend(model_of(design, seed).pieces(), torch.float32)


def decoder_on(backend: Backend, config: ModelConfig, **options: Any) -> Any:
    return _DECODERS[config.architecture](backend, config, **options)  # type: ignore[abstract]
