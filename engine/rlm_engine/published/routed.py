"""The published rlm-90m and rlm-198m checkpoints: two sets of names for one design, with and without biases.

Their head is never tied, whatever a library makes of their config: it is read from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlm_engine.config import ChatFormat, RoutedConfig
from rlm_engine.published.names import Fields, Layout, Shapes, Source, build

GPT2_END_OF_TEXT = 50256


@dataclass(frozen=True)
class _Names:
    """How one of the two checkpoints spells things."""

    published_as: str
    tokens: str
    head: str
    norm: str
    layers: str
    recursion: str
    attention: str
    feed_forward: str
    inv_freq: str
    router_classes: str
    biases: bool
    rolling_window: bool
    added_tokens: tuple[str, ...]
    pad_token_id: int


_RLM_90M = _Names(
    published_as="rlm-90m",
    tokens="embedding_layer.weight",
    head="language_model_head.weight",
    norm="final_layer_norm",
    layers="base_transformer",
    recursion="recursion_layer.transformer_block",
    attention="attention",
    feed_forward="feed_forward",
    inv_freq="attention.rotary_emb.inv_freq",
    router_classes="router.classifier",
    biases=True,
    rolling_window=False,
    added_tokens=("<|user|>", "<|assistant|>"),
    pad_token_id=GPT2_END_OF_TEXT,
)
_RLM_198M = _Names(
    published_as="rlm-198m",
    tokens="embed.weight",
    head="lm_head.weight",
    norm="ln_f",
    layers="layers",
    recursion="rec_layer.block",
    attention="attn",
    feed_forward="ff",
    inv_freq="attn.rope.inv_freq",
    router_classes="router.head",
    biases=False,
    rolling_window=True,
    added_tokens=("<|pad|>", "<|user|>", "<|assistant|>"),
    pad_token_id=50257,
)
_GPT2_VOCABULARY = 50257
_STEPS_MAP = "router.steps_map"
CHAT_FORMAT = ChatFormat(
    prefix={"user": "<|user|>\n", "assistant": "<|assistant|>\n"},
    suffix={"user": "\n", "assistant": "\n"},
    stop=("<|endoftext|>", "<|user|>"),
)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether these are rlm-90m's or rlm-198m's tensor names."""
    return _names(shapes) is not None


def config(data: Mapping[str, Any], shapes: Shapes, where: str) -> RoutedConfig:
    """The configuration, checked against the tensors' shapes; ModelError naming ``where`` otherwise.

    Settings the published code never reads (max_recursion_steps, confidence_threshold, use_adaptive_stopping) are
    not read here either.
    """
    names = _names(shapes)
    assert names is not None, "config() is for checkpoints that matches() recognised"
    fields = Fields(data, where)
    vocab_size = fields.integer("vocab_size")
    is_gpt2 = vocab_size == _GPT2_VOCABULARY + len(names.added_tokens)
    result = build(
        lambda: RoutedConfig(
            vocab_size=vocab_size,
            d_model=fields.integer("embedding_dim"),
            n_heads=fields.integer("num_attention_heads"),
            eos_token_id=fields.integer("eos_token_id", GPT2_END_OF_TEXT if is_gpt2 else None),
            context_length=fields.integer("max_position_embeddings", 512),
            tokenizer="gpt2" if is_gpt2 else "none",
            added_tokens=names.added_tokens if is_gpt2 else (),
            chat_format=CHAT_FORMAT if is_gpt2 else None,
            provenance={"published_as": names.published_as},
            n_layers=fields.integer("num_layers"),
            ffn=fields.integer("intermediate_size"),
            steps=(
                fields.integer("simple_recursion_steps", 1),
                fields.integer("medium_recursion_steps", 3),
                fields.integer("complex_recursion_steps", 5),
            ),
            pad_token_id=fields.integer("pad_token_id", names.pad_token_id if is_gpt2 else None),
            biases=names.biases,
            rolling_window=names.rolling_window,
            hidden_dropout=fields.number("hidden_dropout_prob", 0.1),
            attention_dropout=fields.number("attention_dropout_prob", 0.1),
            norm_eps=fields.number("layer_norm_eps", 1e-5),
        ),
        where,
    )
    assert isinstance(result, RoutedConfig)
    _layout(result, names).check(shapes, where)
    return result


def tensors(config: RoutedConfig, published: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under `RoutedModel`'s names, q, k and v packed; ModelError when they are not what config says.

    Rotary frequencies and the step table in the file are checked and dropped: the former are recomputed, because a
    half-precision file has them wrong by up to 2 rad at position 512.
    """
    names = _RLM_90M if config.biases else _RLM_198M
    return _layout(config, names).convert(published, f"{names.published_as} checkpoint")


def _names(shapes: Shapes) -> _Names | None:
    if any(name.startswith("base_transformer.") for name in shapes):
        return _RLM_90M
    layers = any(name.startswith("layers.") for name in shapes)
    return _RLM_198M if layers and any(name.startswith("rec_layer.") for name in shapes) else None


def _layout(config: RoutedConfig, names: _Names) -> Layout:
    d, ffn, vocabulary = config.d_model, config.ffn, config.vocab_size
    sources = {
        "tokens.weight": Source((names.tokens,), (vocabulary, d)),
        "unembedding.weight": Source((names.head,), (vocabulary, d)),
        "norm.weight": Source((f"{names.norm}.weight",), (d,)),
        "norm.bias": Source((f"{names.norm}.bias",), (d,)),
    }
    router = {
        "pooler": ("router.pooler", d, d),
        "hidden": (f"{names.router_classes}.0", d // 2, d),
        "classes": (f"{names.router_classes}.3", len(config.steps), d // 2),
    }
    for ours, (theirs, rows, columns) in router.items():
        sources[f"router.{ours}.weight"] = Source((f"{theirs}.weight",), (rows, columns))
        sources[f"router.{ours}.bias"] = Source((f"{theirs}.bias",), (rows,))

    attention, feed_forward = names.attention, names.feed_forward
    linears = {
        "qkv": ([f"{attention}.{part}_proj" for part in "qkv"], d, d),
        "out": ([f"{attention}.out_proj"], d, d),
        "up": ([f"{feed_forward}.fc1"], ffn, d),
        "down": ([f"{feed_forward}.fc2"], d, ffn),
    }
    dropped: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], str | None]]] = {}
    blocks = {f"layers.{n}": f"{names.layers}.{n}" for n in range(config.n_layers)}
    for ours, theirs in (blocks | {"recursion": names.recursion}).items():
        for norm, published in (("norm1", "ln1"), ("norm2", "ln2")):
            for part in ("weight", "bias"):
                sources[f"{ours}.{norm}.{part}"] = Source((f"{theirs}.{published}.{part}",), (d,))
        for linear, (parts, rows, columns) in linears.items():
            weights = tuple(f"{theirs}.{part}.weight" for part in parts)
            sources[f"{ours}.{linear}.weight"] = Source(weights, (rows, columns))
            if config.biases:
                biases = tuple(f"{theirs}.{part}.bias" for part in parts)
                sources[f"{ours}.{linear}.bias"] = Source(biases, (rows,))
        dropped[f"{theirs}.{names.inv_freq}"] = ((config.head_dim // 2,), _frequency_check(config))
    if not names.biases:
        dropped[_STEPS_MAP] = ((len(config.steps),), lambda steps: _wrong_steps(steps, config.steps))
    return Layout(sources, dropped)


def _frequency_check(config: RoutedConfig) -> Callable[[np.ndarray], str | None]:
    expected = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)

    def wrong(found: np.ndarray) -> str | None:
        # loose enough for frequencies that were rounded to bfloat16
        if np.allclose(np.asarray(found, dtype=np.float64), expected, rtol=1e-2, atol=1e-6):
            return None
        return f"holds rotary frequencies of another base than {config.rope_theta:g}"

    return wrong


def _wrong_steps(found: np.ndarray, expected: tuple[int, ...]) -> str | None:
    if found.tolist() == list(expected):
        return None
    return f"says {found.tolist()} passes, the config says {list(expected)}"
