"""The published `mor` checkpoints (MixtureOfRecursions): their configuration keys and tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlm_engine.config import ChatFormat, MixtureConfig
from rlm_engine.decoding.mixture import sinusoidal_table
from rlm_engine.errors import ModelError
from rlm_engine.published.names import Fields, Layout, Shapes, Source, build

EOS_TOKEN_ID = 7  # <|endoftext|>
_TECHNICAL_VOCABULARY = 300  # smaller tables cannot be a trained technical vocabulary: such a model takes ids only
_TOKENS = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.pos_encoding.pos_embedding.weight"
_SINUSOIDS = "embeddings.pos_encoding.pe"  # a constant some sinusoidal checkpoints carry

# A person's turn as the published training text has it. <bos> opens every text, so it opens the question here;
# in a second turn it is repeated, which the published data never show (they are cut at 128 tokens).
CHAT_FORMAT = ChatFormat(
    prefix={"user": "<bos><user>", "assistant": "<assistant>"},
    suffix={"user": "", "assistant": ""},
    stop=("<|endoftext|>", "<eos>", "<user>"),
)


def matches(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether tensors of these names and shapes are a published mor checkpoint."""
    return _TOKENS in shapes and "layers.0.step_projections.0.weight" in shapes


def config(data: Mapping[str, Any], shapes: Shapes, where: str) -> MixtureConfig:
    """The configuration of a published checkpoint, every size checked against the tensors' shapes.

    ``data``: config.json's object with the published keys. What it leaves out is read off the shapes, all but n_heads
    (default: heads of 64). ModelError naming ``where`` and the tensor when something is missing, extra or contradicts.
    """
    sizes = _sizes(shapes, where)
    fields = Fields(data, where)
    n_heads = fields.integer("n_heads", max(1, sizes["d_model"] // 64))
    padding_id = fields.integer("padding_idx", 0)
    dropout = fields.number("dropout", 0.1)
    sizes = {name: fields.integer(name, size) for name, size in sizes.items()}
    technical = sizes["vocab_size"] >= _TECHNICAL_VOCABULARY

    def make() -> MixtureConfig:
        return MixtureConfig(
            vocab_size=sizes["vocab_size"],
            d_model=sizes["d_model"],
            n_heads=n_heads,
            eos_token_id=EOS_TOKEN_ID,
            context_length=sizes["max_seq_len"],
            tokenizer="technical" if technical else "none",
            chat_format=CHAT_FORMAT if technical else None,
            provenance={"published_as": "mor"},
            n_layers=sizes["n_layers"],
            ffn=sizes["dim_feedforward"],
            max_steps=sizes["max_steps"],
            padding_id=padding_id,
            router=data.get("router_type", "adaptive"),
            positions="learned" if _POSITIONS in shapes else "sinusoidal",
            dropout=dropout,
        )

    result = build(make, where)
    assert isinstance(result, MixtureConfig)
    _layout(result, shapes).check(shapes, where)
    return result


def tensors(config: MixtureConfig, published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under our own names; ModelError naming the tensor when one is missing, extra or misshaped."""
    shapes = {name: tensor.shape for name, tensor in published.items()}
    return _layout(config, shapes).convert(published, "published weights")


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


def _layout(config: MixtureConfig, shapes: Shapes) -> Layout:
    """Where our tensors come from; what a fixed router or constant positions leave unread may be there too."""
    d, ffn = config.d_model, config.ffn
    sources: dict[str, Source] = {}

    def add(ours: str, theirs: str, *shape: int) -> None:
        sources[ours] = Source((theirs,), shape)

    add("embedding.weight", _TOKENS, config.vocab_size, d)
    if config.positions == "learned":
        add("positions.weight", _POSITIONS, config.context_length, d)
    for kind in ("weight", "bias"):
        add(f"norm_in.{kind}", f"embeddings.layer_norm.{kind}", d)
        add(f"norm_out.{kind}", f"final_norm.{kind}", d)
    add("head.weight", "lm_head.weight", config.vocab_size, d)
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
        here = f"layers.{layer}."
        for letter in "qkv":
            add(f"{here}w{letter}.weight", f"{here}attention.w_{letter}.weight", d, d)
        for part, (name, rows, columns) in parts.items():
            add(f"{here}{name}.weight", f"{here}{part}.weight", rows, columns)
            add(f"{here}{name}.bias", f"{here}{part}.bias", rows)
        for kind in ("weight", "bias"):
            add(f"{here}norm_attention.{kind}", f"{here}norm1.{kind}", d)
            add(f"{here}norm_ffn.{kind}", f"{here}norm2.{kind}", d)
    dropped: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], str | None]]] = {}
    for name, shape in shapes.items():
        if config.router == "fixed" and ".router." in name:
            dropped[name] = (tuple(shape), lambda _: None)
        if config.positions == "sinusoidal" and name == _SINUSOIDS:
            dropped[name] = (tuple(shape), lambda values: _wrong_sinusoids(values, config))
    return Layout(sources, dropped)


def _wrong_sinusoids(values: np.ndarray, config: MixtureConfig) -> str | None:
    if values.shape[-1] == config.d_model:
        table = values.reshape(-1, config.d_model)[: config.context_length]
        if np.allclose(table, sinusoidal_table(np.arange(len(table)), config.d_model), atol=1e-4):
            return None
    return "does not hold the usual sinusoidal positions"
