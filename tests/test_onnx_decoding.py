"""Decoding on ONNX Runtime equals the dense PyTorch forward: logits to rounding, depths exactly."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import DESIGNS, decoder_on, model_of, onnx_backend, torch_backend

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig, RoutedConfig
from rlm_engine.decoding.interface import Depth
from rlm_engine.models.act import ActModel

TOLERANCE = 5e-4  # float32 rounding, amplified by random weights; PyTorch's float32 is as far from its float64
each_design = pytest.mark.parametrize("design", DESIGNS)
few = settings(max_examples=10, deadline=None)


def visible(config: Any, ids: list[int]) -> list[int]:
    """The part of a text the last token depends on (act's window reaches further back through the recurrences)."""
    unbounded = isinstance(config, ActConfig) or (isinstance(config, RoutedConfig) and not config.rolling_window)
    return ids if unbounded else ids[-config.context_length :]


@torch.no_grad()
def dense_last(model: Any, ids: list[int], max_steps: int | None = None) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Logits and passes of the last token from a dense forward of the whole text; None: there is nothing to count."""
    config, tokens = model.config, torch.tensor([visible(model.config, ids)])
    if isinstance(config, ActConfig):
        out = model(tokens, window=config.context_length, max_steps=max_steps)
        return model.head(out.hidden)[0, -1].numpy(), (int(out.depth[0, -1]),)
    if isinstance(config, MixtureConfig):
        out = model(tokens, batch="rows", max_steps=max_steps)
        return out.logits[0, -1].numpy(), tuple(out.steps[0].tolist())
    out = model(tokens, max_steps=max_steps)
    return out.logits[0, -1].numpy(), None if isinstance(config, BlendConfig) else (int(out.steps[0]),)


def defined(config: Any, ids: list[int]) -> bool:
    """rlm-198m lets padding before any real token see the future, which decoding cannot know."""
    published = isinstance(config, RoutedConfig) and not config.biases
    return not published or any(i != config.pad_token_id for i in visible(config, ids))


def assert_as_dense(model: Any, ids: list[int], logits: np.ndarray, trace: Any, max_steps: int | None = None) -> None:
    if not defined(model.config, ids):
        return
    expected, passes = dense_last(model, ids, max_steps)
    if passes is not None:
        assert trace.steps == passes
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def texts(config: Any, most: int | None = None) -> st.SearchStrategy[list[int]]:
    """Ids up to a good way past the window, with plenty of padding."""
    padding = {"mixture": 0, "routed": getattr(config, "pad_token_id", 0)}.get(config.architecture, 1)
    ids = st.integers(0, config.vocab_size - 1) | st.just(padding)
    return st.lists(ids, min_size=1, max_size=most or config.context_length + 9)


@each_design
@few
@given(data=st.data(), seed=st.integers(0, 2))
def test_chunked_decoding_equals_the_dense_forward(design: str, data: st.DataObject, seed: int) -> None:
    model = model_of(design, seed)
    ids = data.draw(texts(model.config))
    cuts = data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=4))
    budget = data.draw(st.sampled_from([None, None, 1, 3]))
    decoder = decoder_on(onnx_backend(design, seed), model.config, depth=Depth(max_steps=budget))
    edges = [0, *sorted(c for c in cuts if c < len(ids)), len(ids)]
    for start, stop in itertools.pairwise(edges):
        result = decoder.feed([ids[start:stop]])
        assert result.logits.dtype == np.float32
        assert_as_dense(model, ids[:stop], result.logits[0], result.traces[0], budget)


@each_design
@few
@given(data=st.data())
def test_rows_of_different_lengths_equal_the_dense_forward(design: str, data: st.DataObject) -> None:
    """Batches: several prompts at once, then one token in each of several rows, whose depths differ."""
    model = model_of(design, 1)
    decoder = decoder_on(onnx_backend(design, 1), model.config, rows=3)
    fed: list[list[int]] = [[], [], []]
    for turn in range(4):
        most = 6 if turn == 0 else 1
        chunk = [data.draw(st.just([]) | texts(model.config, most)) for _ in range(3)]
        result = decoder.feed(chunk)
        fed = [old + new for old, new in zip(fed, chunk, strict=True)]
        assert result.rows.tolist() == [row for row, new in enumerate(chunk) if new]
        for row, logits, trace in zip(result.rows.tolist(), result.logits, result.traces, strict=True):
            assert_as_dense(model, fed[row], logits, trace)


@each_design
@few
@given(data=st.data())
def test_truncating_and_going_on_equals_the_torch_decoder(design: str, data: st.DataObject) -> None:
    model = model_of(design, 2)
    ours, theirs = (decoder_on(make(design, 2), model.config) for make in (onnx_backend, torch_backend))
    ids: list[int] = []
    for _ in range(3):
        keep = data.draw(st.integers(0, len(ids)))
        assert ours.truncate(0, keep) == theirs.truncate(0, keep)
        new = data.draw(texts(model.config, 9))
        ids = ids[:keep] + new
        found, expected = ours.feed([new], "all"), theirs.feed([new], "all")
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=TOLERANCE)
        assert [t.steps for t in found.traces] == [t.steps for t in expected.traces]
        if ours.length(0) != len(ids):  # act could not go back so far: what was fed is appended instead
            return


@pytest.mark.parametrize("kv", ["final", "reuse"])
@pytest.mark.parametrize("rule", ["act", "last"])
def test_act_variants_share_the_graphs(kv: str, rule: str) -> None:
    """The halting rule lives in the controller: the same export serves all of them."""
    base = model_of("act")
    config = dataclasses.replace(base.config, kv=kv, rule=rule)
    model = ActModel(config)
    model.load_state_dict(base.state_dict())
    ids = np.random.default_rng(4).integers(0, 61, 30).tolist()
    result = decoder_on(onnx_backend("act"), config).feed([ids], "all")
    for n in (5, 15, 29):
        assert_as_dense(model.eval(), ids[: n + 1], result.logits[n], result.traces[n])


@each_design
def test_random_models_use_several_depths(design: str) -> None:
    """Guards the tests above: if every token took the same path they would prove little."""
    model = model_of(design, 1)
    ids = np.random.default_rng(7).integers(0, model.config.vocab_size, 12).tolist()
    traces = decoder_on(onnx_backend(design, 1), model.config).feed([ids], "all").traces
    if design not in ("blend", "mixture-rope"):  # one runs every depth always, the other's router is fixed
        assert len({trace.steps for trace in traces}) >= 2


def test_long_rolling_decode_of_act_crosses_the_window_many_times() -> None:
    model = model_of("act")
    decoder = decoder_on(onnx_backend("act"), model.config)
    ids = np.random.default_rng(9).integers(0, 61, 260).tolist()
    for n, token in enumerate(ids):
        result = decoder.feed([[token]])
        if n % 37 == 0 or n == len(ids) - 1:
            assert_as_dense(model, ids[: n + 1], result.logits[0], result.traces[0])
    assert decoder.dropped(0) == 260 - model.config.context_length
