"""The published rlm-48m checkpoint: names, settings, and its head, which is the token table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlm_engine.config import BlendConfig
from rlm_engine.errors import ModelError
from rlm_engine.published.names import Fields, Layout, Shapes, Source, build

GPT2_VOCABULARY = 50257
GPT2_END_OF_TEXT = 50256
TOKEN_TABLE = "embedding_layer.token_embedding.weight"
HEAD = "language_model_head.weight"  # tied: most files leave it out

# ours -> theirs, within one block
_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "qkv.weight": "self_attn.in_proj_weight",
    "qkv.bias": "self_attn.in_proj_bias",
    "out.weight": "self_attn.out_proj.weight",
    "out.bias": "self_attn.out_proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "up.weight": "linear1.weight",
    "up.bias": "linear1.bias",
    "down.weight": "linear2.weight",
    "down.bias": "linear2.bias",
}


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether these are rlm-48m's tensor names."""
    return any(name.startswith("transformer_layers.") for name in shapes) and any(
        name.startswith("recursive_processing_layer.") for name in shapes
    )


def config(data: Mapping[str, Any], shapes: Shapes, where: str) -> BlendConfig:
    """The configuration, checked against the tensors' shapes; ModelError naming ``where`` otherwise.

    The model continues text: it was never taught roles, and not even its end-of-text.
    """
    fields = Fields(data, where)
    vocab_size = fields.integer("vocab_size")
    is_gpt2 = vocab_size == GPT2_VOCABULARY
    result = build(
        lambda: BlendConfig(
            vocab_size=vocab_size,
            d_model=fields.integer("embedding_dim"),
            n_heads=fields.integer("num_attention_heads"),
            eos_token_id=fields.integer("eos_token_id", GPT2_END_OF_TEXT if is_gpt2 else None),
            context_length=fields.integer("max_position_embeddings"),
            tokenizer="gpt2" if is_gpt2 else "none",
            provenance={"published_as": "rlm-48m"},
            n_layers=fields.integer("num_layers"),
            max_steps=fields.integer("max_recursion_steps"),
            dropout=fields.number("dropout_rate", 0.1),
        ),
        where,
    )
    assert isinstance(result, BlendConfig)
    _layout(result).check(shapes, where)
    return result


def tensors(config: BlendConfig, published: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under `BlendModel`'s names; ModelError when one is missing, unknown, misshaped or untied."""
    converted = _layout(config).convert(published, "rlm-48m checkpoint")
    head = published.get(HEAD)
    if head is not None and not np.array_equal(head, published[TOKEN_TABLE], equal_nan=True):
        raise ModelError(f"rlm-48m checkpoint: tensor {HEAD!r} differs from {TOKEN_TABLE!r}, this design ties them")
    return converted


def _layout(config: BlendConfig) -> Layout:
    d, ffn, vocabulary = config.d_model, config.ffn, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "qkv.weight": (3 * d, d),
        "qkv.bias": (3 * d,),
        "out.weight": (d, d),
        "up.weight": (ffn, d),
        "up.bias": (ffn,),
        "down.weight": (d, ffn),
    }
    sources = {
        "tokens.weight": Source((TOKEN_TABLE,), (vocabulary, d)),
        "positions.weight": Source(("embedding_layer.position_embedding.weight",), (config.context_length, d)),
        "router.weight": Source(("recursion_router.depth_classifier.weight",), (config.max_steps + 1, d)),
        "router.bias": Source(("recursion_router.depth_classifier.bias",), (config.max_steps + 1,)),
        "norm.weight": Source(("output_layer_norm.weight",), (d,)),
        "norm.bias": Source(("output_layer_norm.bias",), (d,)),
    }
    blocks = {f"layers.{n}": f"transformer_layers.{n}" for n in range(config.n_layers)}
    for ours, theirs in (blocks | {"recursion": "recursive_processing_layer"}).items():
        for name, published in _BLOCK.items():
            sources[f"{ours}.{name}"] = Source((f"{theirs}.{published}",), shapes.get(name, (d,)))
    return Layout(sources, {HEAD: ((vocabulary, d), lambda head: None)})
