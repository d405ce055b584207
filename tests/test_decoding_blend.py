"""What only the blend decoder does: weighing depths, and learned positions that end."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_routers import VOCABULARY, WINDOW, CountingBackend, decoder_of, dense_last, tiny_model

from rlm_engine.decoding.interface import Depth

IDS = np.random.default_rng(5).integers(0, VOCABULARY, WINDOW + 4).tolist()


def test_trace_is_the_blend_and_its_expected_depth() -> None:
    trace = decoder_of(tiny_model("blend")).feed([IDS[:6]]).traces[0]
    assert trace.steps == (3,)
    assert sum(trace.halting) == pytest.approx(1.0)
    assert trace.depth == pytest.approx(sum(k * p for k, p in enumerate(trace.halting)))


def test_depths_beyond_the_budget_are_left_out_of_the_blend() -> None:
    model = tiny_model("blend")
    full, shallow = (decoder_of(model, depth=Depth(max_steps=m)).feed([IDS[:6]]) for m in (None, 2))
    assert shallow.traces[0].halting == full.traces[0].halting
    assert shallow.traces[0].steps == (2,)
    assert shallow.traces[0].depth == pytest.approx(full.traces[0].depth - 3 * full.traces[0].halting[3])
    expected, _ = dense_last(model, IDS[:6], max_steps=2)
    np.testing.assert_allclose(shallow.logits[0], expected, rtol=0, atol=1e-9)
    assert not np.allclose(shallow.logits, full.logits)


def test_depths_nobody_asked_for_are_not_computed_until_somebody_does() -> None:
    model = tiny_model("blend")
    decoder = decoder_of(model, depth=Depth(max_steps=1))
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    decoder.feed([IDS[:7]])
    assert backend.tokens == {"layer.0": 7, "layer.1": 7, "recursion": 7}
    decoder.depth = Depth()
    decoder.feed([IDS[7:8]])
    assert backend.tokens == {"layer.0": 8, "layer.1": 8, "recursion": 3 * 8}


def test_past_the_learned_positions_the_whole_window_runs_for_each_token() -> None:
    model = tiny_model("blend")
    decoder = decoder_of(model)
    decoder.feed([IDS[:WINDOW]])
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    result = decoder.feed([IDS[WINDOW:]], "all")
    assert backend.tokens["layer.0"] == 4 * WINDOW
    assert decoder.dropped(0) == 4
    for n in range(4):
        expected, _ = dense_last(model, IDS[n + 1 : WINDOW + n + 1])
        np.testing.assert_allclose(result.logits[n], expected, rtol=0, atol=1e-9)


def test_a_long_prompt_runs_only_its_window() -> None:
    model = tiny_model("blend")
    decoder = decoder_of(model)
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    decoder.feed([IDS])
    assert backend.tokens["layer.0"] == WINDOW
