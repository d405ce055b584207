"""The pieces of the four designs as graphs. Read beside `models/`: the same formulas, the same tensor names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig, ModelConfig, RoutedConfig
from rlm_engine.export.graphs import GraphBuilder, Weights
from rlm_engine.export.signatures import signatures


def build_graphs(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Name and graph of everything in `signatures(config)`; raises ModelError for weights that do not fit."""
    for name, signature in signatures(config).items():
        graph = GraphBuilder(name, signature, weights)
        if isinstance(config, ActConfig):
            _ACT[name](graph, config)
        elif isinstance(config, BlendConfig):
            _blend(name, graph, config)
        elif isinstance(config, RoutedConfig):
            _routed(name, graph, config)
        else:
            _mixture(name, graph, config)
        yield name, graph.model()
    weights.check_all_used()


def _act_embed(g: GraphBuilder, c: ActConfig) -> None:
    rows = g.lookup("ids", "embedding.weight", c.vocab_size, c.d_model)
    g.result(g.rms_norm(rows, "gain_in", c.d_model, c.norm_eps), "out")


def _act_step(g: GraphBuilder, c: ActConfig) -> None:
    d, eps = c.d_model, c.norm_eps
    steps = g.constant("step_embedding", g.weights.take("step_embedding", (c.max_steps, d)))
    e = g.op("Gather", steps, "step")
    u = g.rms_norm("x", "block.gain_attn_in", d, eps)
    q = g.linear(g.op("Add", u, e), "block.wq", d, d)
    k, v = g.linear(u, "block.wk", d, d), g.linear(u, "block.wv", d, d)
    q, k = (g.rotate(g.per_head(x, c, lambda h: g.rms_norm(h, None, c.head_dim, eps)), c) for x in (q, k))
    attended = g.linear(g.attention(q, k, v, c), "block.wo", d, d)
    r = g.op("Add", "x", g.rms_norm(attended, "block.gain_attn_out", d, eps))
    z = g.op("Add", g.rms_norm(r, "block.gain_mlp_in", d, eps), e)
    gate = g.silu(g.linear(z, "block.w_gate", d, c.ffn))
    inner = g.linear(g.op("Mul", gate, g.linear(z, "block.w_up", d, c.ffn)), "block.w_down", c.ffn, d)
    r = g.op("Add", r, g.rms_norm(inner, "block.gain_mlp_out", d, eps))
    new = g.op("Add", r, g.op("Mul", "initial", g.vector("block.inject", d)))
    score = g.linear(g.rms_norm(new, None, d, eps), "halt", d, 1, bias=True)
    g.result(g.op("Sigmoid", g.reshape(score, 0, 0)), "halting")
    g.result(new, "out")


def _act_key_value(g: GraphBuilder, c: ActConfig) -> None:
    d, eps = c.d_model, c.norm_eps
    u = g.rms_norm(g.reshape("x", 1, -1, d), "block.gain_attn_in", d, eps)
    k = g.rotate(g.per_head(g.linear(u, "block.wk", d, d), c, lambda h: g.rms_norm(h, None, c.head_dim, eps)), c)
    g.result(g.reshape(k, -1, c.n_heads, c.head_dim), "k")
    g.result(g.reshape(g.linear(u, "block.wv", d, d), -1, c.n_heads, c.head_dim), "v")


def _act_head(g: GraphBuilder, c: ActConfig) -> None:
    cap = g.constant("softcap", np.array(c.logit_softcap, dtype=np.float32))
    logits = g.unembed(
        g.rms_norm("x", "gain_final", c.d_model, c.norm_eps), "embedding.weight", c.vocab_size, c.d_model
    )
    g.result(g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap), "logits")


_ACT: dict[str, Callable[[GraphBuilder, ActConfig], None]] = {
    "embed": _act_embed,
    "step": _act_step,
    "key_value": _act_key_value,
    "head": _act_head,
}


def _pre_norm_block(g: GraphBuilder, c: BlendConfig | RoutedConfig, name: str, biases: bool, rotary: bool) -> None:
    """`models.encoder.PreNormBlock`."""
    d, eps = c.d_model, c.norm_eps
    packed = g.linear(g.layer_norm("x", f"{name}.norm1", d, eps), f"{name}.qkv", d, 3 * d, biases)
    parts = [[np.array([n * d]), np.array([(n + 1) * d]), np.array([2])] for n in range(3)]
    q, k, v = (
        g.op("Slice", packed, *(g.constant(f"part.{n}.{m}", end) for m, end in enumerate(ends)))
        for n, ends in enumerate(parts)
    )
    if rotary:
        q, k = g.rotate(q, c), g.rotate(k, c)
    x = g.op("Add", "x", g.linear(g.attention(q, k, v, c), f"{name}.out", d, d, biases))
    inner = g.gelu(g.linear(g.layer_norm(x, f"{name}.norm2", d, eps), f"{name}.up", d, c.ffn, biases))
    g.result(g.op("Add", x, g.linear(inner, f"{name}.down", c.ffn, d, biases)), "out")


def _blend(name: str, g: GraphBuilder, c: BlendConfig) -> None:
    d = c.d_model
    if name == "embed":
        places = g.lookup("positions", "positions.weight", c.context_length, d)
        g.result(g.op("Add", g.lookup("ids", "tokens.weight", c.vocab_size, d), places), "out")
    elif name == "router":
        g.result(g.op("Softmax", g.linear("x", "router", d, c.max_steps + 1, bias=True), axis=-1), "scores")
    elif name == "head":
        normal = g.layer_norm("x", "norm", d, c.norm_eps)
        g.result(g.unembed(normal, "tokens.weight", c.vocab_size, d), "logits")
    else:
        _pre_norm_block(g, c, name.replace("layer.", "layers."), biases=True, rotary=False)


def _routed(name: str, g: GraphBuilder, c: RoutedConfig) -> None:
    d = c.d_model
    if name == "embed":
        g.result(g.lookup("ids", "tokens.weight", c.vocab_size, d), "out")
    elif name == "router":
        pooled = g.op("Tanh", g.linear("x", "router.pooler", d, d, bias=True))
        hidden = g.gelu(g.linear(pooled, "router.hidden", d, d // 2, bias=True))
        g.result(g.linear(hidden, "router.classes", d // 2, len(c.steps), bias=True), "scores")
    elif name == "head":
        normal = g.layer_norm("x", "norm", d, c.norm_eps)
        g.result(g.unembed(normal, "unembedding.weight", c.vocab_size, d), "logits")
    else:
        _pre_norm_block(g, c, name.replace("layer.", "layers."), biases=c.biases, rotary=True)


def _mixture(name: str, g: GraphBuilder, c: MixtureConfig) -> None:
    d = c.d_model
    if name == "embed":
        x = g.lookup("ids", "embedding.weight", c.vocab_size, d)
        if c.positions == "learned":
            x = g.op("Add", x, g.lookup("positions", "positions.weight", c.context_length, d))
        elif c.positions == "sinusoidal":
            x = g.op("Add", x, "positions")
        g.result(g.layer_norm(x, "norm_in", d, c.norm_eps), "out")
    elif name == "head":
        g.result(g.unembed(g.layer_norm("x", "norm_out", d, c.norm_eps), "head.weight", c.vocab_size, d), "logits")
    elif name.endswith(".router"):
        layer = name.removesuffix(".router").replace("layer.", "layers.")
        hidden = g.gelu(g.linear("x", f"{layer}.router_in", d, d // 4, bias=True))
        scores = g.linear(hidden, f"{layer}.router_out", d // 4, c.max_steps + 1, bias=True)
        g.result(g.op("Softmax", scores, axis=-1), "scores")
    else:
        _mixture_pass(g, c, name.replace("layer.", "layers."))


def _mixture_pass(g: GraphBuilder, c: MixtureConfig, layer: str) -> None:
    """`models.mixture.MixtureLayer.step`: the pass's own projection, then what all passes of the layer share."""
    d, eps = c.d_model, c.norm_eps
    branches = [
        functools.partial(g.linear, "x", f"{layer}.step_projections.{s}", d, d, True) for s in range(c.max_steps)
    ]
    projected = g.select("step", branches)
    q, k, v = (g.linear(projected, f"{layer}.{w}", d, d) for w in ("wq", "wk", "wv"))
    if c.positions == "rope":
        q, k = g.rotate(q, c), g.rotate(k, c)
    attended = g.linear(g.attention(q, k, v, c), f"{layer}.wo", d, d, bias=True)
    x = g.layer_norm(g.op("Add", "x", attended), f"{layer}.norm_attention", d, eps)
    inner = g.linear(g.gelu(g.linear(x, f"{layer}.w_up", d, c.ffn, bias=True)), f"{layer}.w_down", c.ffn, d, bias=True)
    g.result(g.layer_norm(g.op("Add", x, inner), f"{layer}.norm_ffn", d, eps), "out")
