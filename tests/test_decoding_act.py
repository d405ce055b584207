"""Cached, early-exiting decoding of `act` against the dense forward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_act

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import ActConfig
from rlm_engine.decoding.act import ActDecoder
from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import ModelError
from rlm_engine.models.act import ActModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # rounding of differently ordered sums, compounded over steps


def decoder(model: ActModel, rows: int = 1, depth: Depth | None = None) -> ActDecoder:
    dtype = model.embedding.weight.dtype
    return ActDecoder(TorchBackend(model.pieces(), dtype), model.config, depth, rows)


@torch.no_grad()
def dense(model: ActModel, ids: list[int], depth: Depth | None = None) -> tuple[np.ndarray, list[int]]:
    depth = depth or Depth()
    out = model(
        torch.tensor([ids]),
        window=model.config.context_length,
        max_steps=depth.max_steps,
        threshold=depth.halt_threshold,
    )
    return model.head(out.hidden)[0].numpy(), out.depth[0].tolist()


def chunks(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=4), label="cuts"))
    return [part for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True) if (part := ids[a:b])]


tokens = st.lists(st.integers(0, 60), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    ids=tokens,
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rule=st.sampled_from(["act", "last"]),
    kv=st.sampled_from(["final", "reuse"]),
    window=st.integers(3, 40),
    max_steps=st.none() | st.integers(1, 6),
    threshold=st.none() | st.floats(0.05, 1.0),
)
def test_cached_decode_equals_dense_forward(
    data: st.DataObject,
    ids: list[int],
    seed: int,
    dtype: torch.dtype,
    rule: str,
    kv: str,
    window: int,
    max_steps: int | None,
    threshold: float | None,
) -> None:
    model = tiny_act(seed, dtype, rule=rule, kv=kv, context_length=window)
    depth = Depth(max_steps, threshold)
    cached = decoder(model, depth=depth)
    results = [cached.feed([part], report="all") for part in chunks(data, ids)]
    logits = np.concatenate([r.logits for r in results])
    expected, depths = dense(model, ids, depth)
    assert [int(t.depth) for r in results for t in r.traces] == depths
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), texts=st.lists(tokens, min_size=2, max_size=4), seed=st.integers(0, 50))
def test_rows_of_different_lengths_do_not_touch_each_other(
    data: st.DataObject, texts: list[list[int]], seed: int
) -> None:
    model = tiny_act(seed)
    cached = decoder(model, rows=len(texts))
    parts = [chunks(data, ids) for ids in texts]
    logits: list[list[np.ndarray]] = [[] for _ in texts]
    for turn in range(max(map(len, parts))):
        result = cached.feed([p[turn] if turn < len(p) else [] for p in parts], report="all")
        for row, value in zip(result.rows, result.logits, strict=True):
            logits[row].append(value)
    for ids, got in zip(texts, logits, strict=True):
        np.testing.assert_allclose(np.stack(got), dense(model, ids)[0], rtol=0, atol=1e-9)


def test_depth_varies_and_the_window_is_crossed() -> None:
    """Guards the tests above: they would be empty if every token had the same depth."""
    model = tiny_act(3)
    _, depths = dense(model, list(np.random.default_rng(0).integers(0, 61, 40)))
    assert len(set(depths)) >= 3


def test_halted_token_runs_no_further_block() -> None:
    model = tiny_act(3)
    calls: Counter[str] = Counter()
    sizes: list[int] = []
    pieces = model.pieces()

    def counting(name: str) -> Any:
        def piece(*inputs: Any) -> Any:
            calls[name] += 1
            if name == "step":
                sizes.append(len(inputs[0]))
            return pieces[name](*inputs)

        return piece

    backend = TorchBackend({name: counting(name) for name in pieces}, torch.float64)
    cached = ActDecoder(backend, model.config)
    total = 0
    for token in np.random.default_rng(1).integers(0, 61, 30).tolist():
        before = calls["step"]
        depth = int(cached.feed([[token]]).traces[0].depth)
        assert calls["step"] - before == depth
        total += depth
    assert total < 30 * model.config.max_steps

    sizes.clear()
    prompt = np.random.default_rng(2).integers(0, 61, 12).tolist()
    depths = [int(t.depth) for t in ActDecoder(backend, model.config).feed([prompt], report="all").traces]
    # within a prompt, recurrence n is computed for exactly those tokens that use it
    assert sizes == [sum(d >= n for d in depths) for n in range(1, max(depths) + 1)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 50),
    segments=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    kv=st.sampled_from(["final", "reuse"]),
    budget=st.sampled_from([2, 5]),
)
def test_segment_memory_equals_one_long_forward(seed: int, segments: list[int], kv: str, budget: int) -> None:
    """Transformer-XL's carried keys and values: with memory for all earlier tokens nothing may change."""
    model = tiny_act(seed, kv=kv, context_length=100)
    ids = torch.randint(0, 61, (2, sum(segments)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = model(ids, max_steps=budget)
        memory, parts = None, []
        for part in ids.split(segments, dim=1):
            out = model(part, memory=memory, keep_memory=100, max_steps=budget)
            memory = out.memory
            parts.append(out.hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.hidden, rtol=0, atol=1e-9)
    cached = decoder(model, depth=Depth(max_steps=budget))
    logits = cached.feed([ids[0].tolist()], report="all").logits
    np.testing.assert_allclose(logits, model.head(whole.hidden)[0].detach().numpy(), rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(ids=tokens, keep=st.integers(0, 39), more=tokens, seed=st.integers(0, 20))
def test_truncated_row_continues_as_if_nothing_had_been(ids: list[int], keep: int, more: list[int], seed: int) -> None:
    model = tiny_act(seed, context_length=12)
    cached = decoder(model)
    cached.feed([ids])
    if cached.truncate(0, min(keep, len(ids))):
        logits = cached.feed([more], report="all").logits
        expected = dense(model, ids[:keep] + more)[0][-len(more) :]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9)
    else:
        assert len(ids) > 12


def test_dropped_counts_what_is_no_longer_seen() -> None:
    cached = decoder(tiny_act(0, context_length=8))
    cached.feed([list(range(20))])
    assert (cached.length(0), cached.dropped(0)) == (20, 12)
    assert not cached.truncate(0, 21)


def test_nan_weights_are_an_error_not_a_token() -> None:
    model = tiny_act(0)
    with torch.no_grad():
        model.block.wo.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        decoder(model).feed([[1, 2, 3]])


def test_parameter_count_of_act_110m() -> None:
    config = ActConfig(vocab_size=50257, d_model=1280, n_heads=20, ffn=10240, eos_token_id=50256, context_length=1024)
    with torch.device("meta"):
        model = ActModel(config)
    assert sum(p.numel() for p in model.parameters()) == 110_224_641
    assert sum(p.numel() for name, p in model.named_parameters() if name.startswith("block.w")) == 45_875_200
