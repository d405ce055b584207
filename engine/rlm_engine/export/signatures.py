"""What goes into and comes out of every piece's graph: the contract of the exporter and the ONNX Runtime backend.

A piece without attention takes N flat tokens. A piece with attention takes B rows of S tokens, consecutive slots of
caches that hold T slots per row, K of which are filled once the new tokens are written; the plumbing inputs that tell
the graph so come last and are the backend's business. Names and order of the others are those of `model.pieces()`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig, ModelConfig, RoutedConfig

F32, I64, I32 = "tensor(float)", "tensor(int64)", "tensor(int32)"  # as ONNX Runtime names them
CACHE_MULTIPLE = 8  # GroupQueryAttention takes heads of a multiple of this width; narrower ones are padded by zeros
Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class Port:
    """One input or output of a graph. A letter in the shape is a size known only when it runs."""

    name: str
    type: str
    shape: Shape


@dataclass(frozen=True)
class Signature:
    """Inputs (those of the piece, then the plumbing) and outputs of one graph.

    ``values``: how many inputs are the piece's own.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: int
    attends: bool

    @property
    def plumbing(self) -> tuple[str, ...]:
        """Names of the inputs the backend makes by itself."""
        return tuple(port.name for port in self.inputs[self.values :])


@dataclass(frozen=True)
class PieceGraph:
    """Which graph computes a piece; ``step`` fills the graph's first input after x when one graph serves several."""

    graph: str
    step: int | None = None


def cache_width(head_dim: int) -> int:
    """How wide a head is in the cache."""
    return -(-head_dim // CACHE_MULTIPLE) * CACHE_MULTIPLE


def pieces(config: ModelConfig) -> dict[str, PieceGraph]:
    """Every piece of a model and the graph that computes it. The passes of a mixture layer share one graph."""
    if isinstance(config, MixtureConfig):
        return {name: PieceGraph(name) for name in signatures(config) if not _is_layer(name)} | {
            f"layer.{n}.step.{s}": PieceGraph(f"layer.{n}", s)
            for n in range(config.n_layers)
            for s in range(config.max_steps)
        }
    return {name: PieceGraph(name) for name in signatures(config)}


def signatures(config: ModelConfig) -> dict[str, Signature]:
    """Every graph of a model by name; the file is `<name>.onnx`."""
    d, vocabulary = config.d_model, config.vocab_size
    ids = Port("ids", I64, ("N",))
    head = _plain([Port("x", F32, ("N", d))], [Port("logits", F32, ("N", vocabulary))])
    embedded = [Port("out", F32, ("N", d))]
    if isinstance(config, ActConfig):
        return {
            "embed": _plain([ids], embedded),
            "step": _attention(
                config,
                [Port("initial", F32, ("B", "S", d)), Port("step", I64, ())],
                [Port("halting", F32, ("B", "S"))],
                rotary=True,
            ),
            "key_value": Signature(
                (Port("x", F32, ("N", d)), *_rotary(config), Port("rotary_rows", I64, (1, "N"))),
                tuple(Port(name, F32, ("N", config.n_heads, config.head_dim)) for name in ("k", "v")),
                values=3,
                attends=False,
            ),
            "head": head,
        }
    if isinstance(config, BlendConfig | RoutedConfig):
        routed = isinstance(config, RoutedConfig)
        layer = _attention(config, rotary=routed, hides=routed)
        classes = len(config.steps) if isinstance(config, RoutedConfig) else config.max_steps + 1
        return {
            "embed": _plain([ids] if routed else [ids, Port("positions", I64, ("N",))], embedded),
            **{f"layer.{n}": layer for n in range(config.n_layers)},
            "recursion": layer,
            "router": _plain([Port("x", F32, ("N", d))], [Port("scores", F32, ("N", classes))]),
            "head": head,
        }
    positions = {
        "learned": [Port("positions", I64, ("N",))],
        "sinusoidal": [Port("positions", F32, ("N", d))],
        "rope": [],
    }[config.positions]
    layer = _attention(config, [Port("step", I64, ())], rotary=config.positions == "rope", hides=True)
    router = _plain([Port("x", F32, ("N", d))], [Port("scores", F32, ("N", config.max_steps + 1))])
    adaptive = config.router == "adaptive"
    return {
        "embed": _plain([ids, *positions], embedded),
        **{f"layer.{n}": layer for n in range(config.n_layers)},
        **({f"layer.{n}.router": router for n in range(config.n_layers)} if adaptive else {}),
        "head": head,
    }


def _is_layer(name: str) -> bool:
    return name.startswith("layer.") and not name.endswith(".router")


def _plain(inputs: list[Port], outputs: list[Port]) -> Signature:
    return Signature(tuple(inputs), tuple(outputs), values=len(inputs), attends=False)


def _rotary(config: ModelConfig) -> list[Port]:
    return [Port(name, F32, ("N", config.head_dim // 2)) for name in ("cos", "sin")]


def _attention(
    config: ModelConfig,
    more: list[Port] | None = None,
    outputs: list[Port] | None = None,
    *,
    rotary: bool,
    hides: bool = False,
) -> Signature:
    """``hides``: some tokens are never seen, so that a token may see nothing at all and must then gather zero."""
    states: Shape = ("B", "S", config.d_model)
    cache: Shape = ("B", config.n_heads, "T", cache_width(config.head_dim))
    values = [Port("x", F32, states), *(more or []), *(_rotary(config) if rotary else [])]
    plumbing = [
        *([Port("rotary_rows", I64, ("B", "S"))] if rotary else []),  # each token's row of cos and sin
        *([Port("sighted", F32, ("B", "S", 1))] if hides else []),  # 0 for a token that sees nothing, else 1
        Port("bias", F32, ("B", 1, "S", "K")),  # added to the scores: 0, or very negative for what is not seen
        Port("last", I32, ("B",)),  # the last slot written
        Port("total", I32, (1,)),  # K
        Port("past_k", F32, cache),
        Port("past_v", F32, cache),
    ]
    out = [Port("out", F32, states), *(outputs or [])]
    present = [Port("present_k", F32, cache), Port("present_v", F32, cache)]
    return Signature(tuple(values + plumbing), tuple(out + present), values=len(values), attends=True)
