"""The published `mor` checkpoints (MixtureOfRecursions): their configuration keys and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlm_engine.config import ChatFormat, MixtureConfig
from rlm_engine.decoding.mixture import sinusoidal_table
from rlm_engine.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

EOS_TOKEN_ID = 7  # <|endoftext|>
_TECHNICAL_VOCABULARY = 300  # smaller tables cannot be a trained technical vocabulary: such a model takes ids only
_TOKENS = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.pos_encoding.pos_embedding.weight"
_SINUSOIDS = "embeddings.pos_encoding.pe"  # a constant some sinusoidal checkpoints carry

# A person's turn as the published training text has it. <bos> opens every text, so it opens the question here;
# in a second turn it is repeated, which the published data never show (they are cut at 128 tokens).
_CHAT = ChatFormat(
    prefix={"user": "<bos><user>", "assistant": "<assistant>"},
    suffix={"user": "", "assistant": ""},
    stop=("<|endoftext|>", "<eos>", "<user>"),
)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether tensors of these names and shapes are a published mor checkpoint."""
    return _TOKENS in shapes and "layers.0.step_projections.0.weight" in shapes


def config(data: Mapping[str, Any], shapes: Shapes, where: str) -> MixtureConfig:
    """The configuration of a published checkpoint, every size checked against the tensors' shapes.

    ``data``: config.json's object with the published keys; only n_heads cannot be read off the shapes (default:
    heads of 64). ModelError naming ``where`` and the tensor when something is missing, extra or contradicts.
    """
    sizes = _sizes(shapes, where)
    sizes |= {"n_heads": max(1, sizes["d_model"] // 64), "padding_idx": 0}
    for name in sizes:
        value = data.get(name, sizes[name])
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{where}: {name} must be an integer, got {value!r}")
        sizes[name] = value
    technical = sizes["vocab_size"] >= _TECHNICAL_VOCABULARY
    try:
        result = MixtureConfig(
            vocab_size=sizes["vocab_size"],
            d_model=sizes["d_model"],
            n_heads=sizes["n_heads"],
            eos_token_id=EOS_TOKEN_ID,
            context_length=sizes["max_seq_len"],
            tokenizer="technical" if technical else "none",
            chat_format=_CHAT if technical else None,
            provenance={"design": "mor"},
            n_layers=sizes["n_layers"],
            ffn=sizes["dim_feedforward"],
            max_steps=sizes["max_steps"],
            padding_id=sizes["padding_idx"],
            router=data.get("router_type", "adaptive"),
            positions="learned" if _POSITIONS in shapes else "sinusoidal",
            dropout=data.get("dropout", 0.1),
        )
    except ModelError as error:
        raise ModelError(f"{where}: {str(error).removeprefix('config: ')}") from None
    _check(result, shapes, f"{where}: ")
    return result


def tensors(config: MixtureConfig, published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under our own names; ModelError naming the tensor when one is missing, extra or misshaped."""
    _check(config, {name: tensor.shape for name, tensor in published.items()}, "")
    if _SINUSOIDS in published:
        table = np.asarray(published[_SINUSOIDS]).reshape(-1, config.d_model)[: config.context_length]
        if not np.allclose(table, sinusoidal_table(np.arange(len(table)), config.d_model), atol=1e-4):
            raise ModelError(f"tensor '{_SINUSOIDS}' does not hold the usual sinusoidal positions")
    return {ours: published[theirs] for theirs, (ours, _) in _names(config).items()}


def _sizes(shapes: Shapes, where: str) -> dict[str, int]:
    """Every size the shapes tell."""

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in shapes:
            raise ModelError(f"{where}: tensor '{name}' is missing")
        if len(shapes[name]) != dimensions:
            raise ModelError(f"{where}: tensor '{name}' is {list(shapes[name])}, expected {dimensions} dimensions")
        return shapes[name]

    vocabulary, d_model = shape(_TOKENS)
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    projections = {name.split(".")[3] for name in shapes if name.startswith("layers.0.step_projections.")}
    sizes = {
        "vocab_size": vocabulary,
        "d_model": d_model,
        "n_layers": len(layers),
        "max_steps": len(projections),
        "dim_feedforward": shape("layers.0.feedforward.linear1.weight")[0],
    }
    if _POSITIONS in shapes:
        sizes["max_seq_len"] = shape(_POSITIONS)[0]
    elif _SINUSOIDS in shapes:
        sizes["max_seq_len"] = shapes[_SINUSOIDS][-2] if len(shapes[_SINUSOIDS]) > 1 else 0
    else:
        sizes["max_seq_len"] = 512
    return sizes


def _check(config: MixtureConfig, shapes: Shapes, prefix: str) -> None:
    expected = _names(config)
    for name, (_, size) in expected.items():
        if name not in shapes:
            raise ModelError(f"{prefix}tensor '{name}' is missing")
        if tuple(shapes[name]) != size:
            raise ModelError(f"{prefix}tensor '{name}' is {list(shapes[name])}, config says {list(size)}")
    for name in shapes:
        fixed_router = config.router == "fixed" and ".router." in name  # never read: nothing is lost with them
        sinusoids = config.positions == "sinusoidal" and name == _SINUSOIDS
        if name not in expected and not fixed_router and not sinusoids:
            raise ModelError(f"{prefix}tensor '{name}' does not belong to this model")


def _names(config: MixtureConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> our name and shape."""
    d, ffn = config.d_model, config.ffn
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        _TOKENS: ("embedding.weight", (config.vocab_size, d)),
        "embeddings.layer_norm.weight": ("norm_in.weight", (d,)),
        "embeddings.layer_norm.bias": ("norm_in.bias", (d,)),
        "final_norm.weight": ("norm_out.weight", (d,)),
        "final_norm.bias": ("norm_out.bias", (d,)),
        "lm_head.weight": ("head.weight", (config.vocab_size, d)),
    }
    if config.positions == "learned":
        names[_POSITIONS] = ("positions.weight", (config.context_length, d))
    parts = {
        "attention.w_o": ("wo", d, d),
        "feedforward.linear1": ("w_up", ffn, d),
        "feedforward.linear2": ("w_down", d, ffn),
        **{f"step_projections.{s}": (f"step_projections.{s}", d, d) for s in range(config.max_steps)},
    }
    if config.router == "adaptive":
        parts["router.complexity_classifier.0"] = ("router_in", d // 4, d)
        parts["router.complexity_classifier.3"] = ("router_out", config.max_steps + 1, d // 4)
    for layer in range(config.n_layers):
        theirs, ours = f"layers.{layer}.", f"layers.{layer}."
        for letter in "qkv":
            names[f"{theirs}attention.w_{letter}.weight"] = (f"{ours}w{letter}.weight", (d, d))
        for part, (name, rows, columns) in parts.items():
            names[f"{theirs}{part}.weight"] = (f"{ours}{name}.weight", (rows, columns))
            names[f"{theirs}{part}.bias"] = (f"{ours}{name}.bias", (rows,))
        for part, name in (("norm1", "norm_attention"), ("norm2", "norm_ffn")):
            for kind in ("weight", "bias"):
                names[f"{theirs}{part}.{kind}"] = (f"{ours}{name}.{kind}", (d,))
    return names
