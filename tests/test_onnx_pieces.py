"""Every piece's graph computes what the PyTorch piece computes, whatever the placement of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import DESIGNS, model_of, onnx_backend, torch_backend

from rlm_engine.config import ActConfig, MixtureConfig, ModelConfig
from rlm_engine.decoding.interface import Placement
from rlm_engine.decoding.rotary import rotary_tables
from rlm_engine.export.signatures import pieces, signatures

ROWS, CAPACITY, TOLERANCE = 4, 20, 2e-5
each_design = pytest.mark.parametrize("design", DESIGNS)


def random_inputs(config: ModelConfig, name: str, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """What the piece takes after x (attention) or all it takes (others), over `count` flat tokens."""
    graph = pieces(config)[name]
    signature = signatures(config)[graph.graph]
    inputs: list[np.ndarray] = []
    for port in signature.inputs[: signature.values]:
        if port.name in ("cos", "sin"):
            tables = rotary_tables(rng.integers(0, 50, count), config.head_dim, 10_000.0)
            inputs.append(tables[0 if port.name == "cos" else 1])
        elif port.name == "step":
            if graph.step is None:
                inputs.append(np.asarray(int(rng.integers(0, config.max_steps))))  # type: ignore[union-attr]
        elif port.type == "tensor(int64)":
            limit = config.vocab_size if port.name == "ids" else config.context_length
            inputs.append(rng.integers(0, limit, count))
        else:
            inputs.append(rng.standard_normal((count, config.d_model)).astype(np.float32))
    return inputs


def assert_same(design: str, piece: str, found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == tuple(other.shape)
        scale = max(1.0, float(np.abs(other.numpy()).max()))
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE * scale, err_msg=f"{design} {piece}")


@each_design
def test_graphs_cover_exactly_the_pieces(design: str) -> None:
    assert set(pieces(model_of(design).config)) == set(model_of(design).pieces())


@each_design
@pytest.mark.parametrize("count", [1, 5])
def test_pieces_without_attention(design: str, count: int) -> None:
    model, ours, theirs = model_of(design), onnx_backend(design), torch_backend(design)
    rng = np.random.default_rng(count)
    seen = 0
    for name, graph in pieces(model.config).items():
        if not signatures(model.config)[graph.graph].attends:
            inputs = random_inputs(model.config, name, count, rng)
            assert_same(design, name, ours.run(name, *inputs), theirs.run(name, *inputs))
            seen += 1
    assert seen >= 2


@st.composite
def placements(draw: st.DrawFn, hides: bool) -> tuple[Placement, ...]:
    """A few calls: any rows, gaps between slots, sliding windows, hidden tokens. Slots rise within a row."""
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        rows, slots = [], []
        for row in draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True)):
            chosen = draw(st.sets(st.integers(0, CAPACITY - 1), min_size=1, max_size=draw(st.sampled_from([1, 1, 6]))))
            rows += [row] * len(chosen)
            slots += sorted(chosen)
        first = [draw(st.integers(0, slot)) if draw(st.booleans()) else 0 for slot in slots]
        hidden = np.array([draw(st.booleans()) for _ in slots]) if hides and draw(st.booleans()) else None
        calls.append(Placement(*(np.array(a, dtype=np.int64) for a in (rows, slots, first)), hidden))  # type: ignore[arg-type]
    return tuple(calls)


@each_design
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_attention_pieces_at_any_placement(design: str, data: st.DataObject, seed: int) -> None:
    model, ours, theirs = model_of(design), onnx_backend(design), torch_backend(design)
    config, rng = model.config, np.random.default_rng(seed)
    attending = [n for n, graph in pieces(config).items() if signatures(config)[graph.graph].attends]
    name = data.draw(st.sampled_from(attending))
    caches = [b.new_cache(ROWS, config.n_heads, CAPACITY, config.head_dim) for b in (ours, theirs)]
    if data.draw(st.booleans(), label="written before"):
        every = [a.reshape(-1) for a in np.meshgrid(np.arange(ROWS), np.arange(CAPACITY), indexing="ij")]
        kv = [rng.standard_normal((ROWS * CAPACITY, config.n_heads, config.head_dim), np.float32) for _ in range(2)]
        for backend, cache in zip((ours, theirs), caches, strict=True):
            cache.write(Placement(*every, np.zeros_like(every[0])), *(backend.array(a) for a in kv))
    act = isinstance(config, ActConfig)
    for where in data.draw(placements(hides=not act and config.architecture != "blend")):
        change = data.draw(st.sampled_from(["none", "none", "shift", "grow"] + ([] if act else ["hide"])))
        for cache in caches:
            if change == "shift":
                cache.shift(1, 3, 9)
            elif change == "grow":
                cache.grow(cache.capacity + 5)
            elif change == "hide" and config.architecture != "blend":
                cache.hide(2, np.array([0, 2]))
        inputs = random_inputs(config, name, len(where), rng)
        found = ours.attend(name, inputs[0], caches[0], where, *inputs[1:])
        expected = theirs.attend(name, inputs[0], caches[1], where, *inputs[1:])
        assert_same(design, name, found, expected)
    k, v = caches[0].k[..., : config.head_dim], caches[0].v[..., : config.head_dim]
    np.testing.assert_allclose(k, caches[1].k.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(v, caches[1].v.numpy(), rtol=0, atol=1e-4)


def test_results_are_not_overwritten_by_the_next_call() -> None:
    """Buffers are reused inside; what a decoder holds on to must not change under it."""
    config, backend = model_of("act").config, onnx_backend("act")
    cache = backend.new_cache(1, config.n_heads, CAPACITY, config.head_dim)
    rng = np.random.default_rng(0)
    kept = []
    for slot in range(3):
        x, *inputs = random_inputs(config, "step", 1, rng)
        one = np.array([0])
        where = Placement(one, one + slot, one)
        kept.append((backend.attend("step", x, cache, where, *inputs), [x, *inputs], where))
        kept[-1] = (*kept[-1], [a.copy() for a in kept[-1][0]])  # type: ignore[assignment]
    for outputs, _, _, copies in kept:  # type: ignore[misc]
        for output, copy in zip(outputs, copies, strict=True):
            np.testing.assert_array_equal(output, copy)


def test_the_passes_of_a_mixture_layer_share_one_graph() -> None:
    """Otherwise every pass would keep its own copy of the layer's weights in memory."""
    config = model_of("mixture-learned").config
    assert isinstance(config, MixtureConfig)
    graphs = {graph.graph for name, graph in pieces(config).items() if name.startswith("layer.1.step.")}
    assert graphs == {"layer.1"} and config.max_steps == 3
