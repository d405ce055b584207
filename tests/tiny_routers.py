"""Tiny random models of the published designs, whose routers really choose, and their references for decoding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from golden_vectors import make_decoder, make_model
from hypothesis import strategies as st

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import BlendConfig, RoutedConfig
from rlm_engine.decoding.blend import BlendDecoder
from rlm_engine.decoding.routed import RoutedDecoder
from rlm_engine.models.blend import BlendModel
from rlm_engine.models.routed import RoutedModel

VOCABULARY, WINDOW, PAD = 23, 12, 3
DESIGNS = ("blend", "rlm-90m", "rlm-198m")

Config = BlendConfig | RoutedConfig
Model = BlendModel | RoutedModel
Decoder = BlendDecoder | RoutedDecoder


def config_of(design: str) -> Config:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 12, "n_heads": 2, "n_layers": 2}
    sizes |= {"eos_token_id": PAD, "context_length": WINDOW, "tokenizer": "none"}
    if design == "blend":
        return BlendConfig(**sizes, max_steps=3)
    newer = design == "rlm-198m"
    return RoutedConfig(**sizes, ffn=20, pad_token_id=PAD, biases=not newer, rolling_window=newer)


@functools.cache
def tiny_model(design: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """Weights large enough that attention and routers depend strongly on the tokens."""
    model = make_model(config_of(design))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                router = 1.5 if design == "blend" else 6.0  # a real blend, and classes that differ
                scale = router if "router" in name else 1.5
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def decoder_of(model: Model, **options: Any) -> Decoder:
    return make_decoder(model, model.config, **options)


@torch.no_grad()
def dense_last(model: Model, ids: Sequence[int], **options: Any) -> tuple[np.ndarray, Any]:
    """Logits of the last position of a dense forward, and the router's choice (p, or the number of passes)."""
    out = model(torch.tensor([list(ids)]), **options)
    if isinstance(model, BlendModel):
        return out.logits[0, -1].numpy(), out.router_probabilities[0].numpy()
    return out.logits[0, -1].numpy(), int(out.steps[0])


def visible(model: Model, ids: Sequence[int]) -> Sequence[int]:
    """The part of a text the published loops forward."""
    windowed = isinstance(model.config, BlendConfig) or model.config.rolling_window
    return ids[-WINDOW:] if windowed else ids


def defined(model: Model, ids: Sequence[int]) -> bool:
    """Whether decoding must agree at the last token: rlm-198m lets padding before any real token see the future."""
    if isinstance(model.config, BlendConfig) or model.config.biases:
        return True
    return any(i != PAD for i in ids)


def assert_as_dense(
    model: Model, ids: Sequence[int], logits: np.ndarray, trace: Any, tolerance: float = 1e-9, **options: Any
) -> None:
    """One decoded position against the dense forward of the text up to it."""
    if not defined(model, visible(model, ids)):
        return
    expected, choice = dense_last(model, visible(model, ids), **options)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    if isinstance(model, BlendModel):
        np.testing.assert_allclose(trace.halting, choice, rtol=0, atol=tolerance)
    else:
        assert trace.steps == (choice,)


def feed_in_chunks(decoder: Decoder, ids: Sequence[int], cuts: Sequence[int], report: str = "all") -> list[Any]:
    """Feed ids cut at these positions; returns the results."""
    edges = [0, *sorted({c for c in cuts if 0 < c < len(ids)}), len(ids)]
    return [decoder.feed([list(ids[a:b])], report) for a, b in itertools.pairwise(edges)]


class CountingBackend(TorchBackend):
    """Counts the tokens that went through each piece, and can be told to fail."""

    def __init__(self, model: Model):
        super().__init__(model.pieces(), next(model.parameters()).dtype)
        self.tokens: dict[str, int] = {}
        self.fail_at: str | None = None

    def attend(self, piece: str, x: Any, cache: Any, where: Any, *inputs: Any) -> Any:
        if piece == self.fail_at:
            raise KeyboardInterrupt
        self.tokens[piece] = self.tokens.get(piece, 0) + len(where)
        return super().attend(piece, x, cache, where, *inputs)


texts = st.lists(st.integers(0, VOCABULARY - 1) | st.just(PAD), min_size=1, max_size=WINDOW + 8)
cut_positions = st.lists(st.integers(1, WINDOW + 8), max_size=5)
seeds = st.integers(0, 3)
