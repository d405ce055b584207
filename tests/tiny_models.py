"""Tiny real models with random weights, for tests."""

from __future__ import annotations

import torch

from rlm_engine.config import ActConfig
from rlm_engine.models.act import ActModel


def tiny_act(seed: int, dtype: torch.dtype = torch.float64, **changes: object) -> ActModel:
    """An act model of a few thousand parameters whose halting head really varies from token to token."""
    values: dict[str, object] = {
        "vocab_size": 61,
        "d_model": 16,
        "n_heads": 2,
        "ffn": 24,
        "eos_token_id": 0,
        "context_length": 16,
        "tokenizer": "none",
        "max_steps": 5,
    }
    config = ActConfig(**(values | changes))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    model = ActModel(config).initialise(generator)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=generator)
        model.step_embedding.normal_(std=0.5, generator=generator)
        for gain in (model.block.gain_attn_out, model.block.gain_mlp_out):
            gain.fill_(1.0)
        model.halt.weight.normal_(std=1.0, generator=generator)
        model.halt.bias.fill_(-0.7)
    return model.to(dtype).eval()
