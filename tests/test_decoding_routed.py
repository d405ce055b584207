"""What only the routed decoder does: lazy depths, hidden padding, and a cache that grows for ever (rlm-90m)."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_routers import PAD, VOCABULARY, WINDOW, CountingBackend, assert_as_dense, decoder_of, dense_last, tiny_model

from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import InputError
from rlm_engine.models.routed import RoutedModel

IDS = [i for i in np.random.default_rng(6).integers(0, VOCABULARY, 60).tolist() if i != PAD][:40]
each_variant = pytest.mark.parametrize("design", ["rlm-90m", "rlm-198m"])


def always(design: str, choice: int) -> RoutedModel:
    """A model whose router always says the same class."""
    model = copy.deepcopy(tiny_model(design))
    assert isinstance(model, RoutedModel)
    with torch.no_grad():
        model.router.classes.bias.copy_(1e3 * torch.nn.functional.one_hot(torch.tensor(choice), 3))
    return model


@each_variant
def test_deeper_passes_are_filled_when_the_class_first_asks_for_them(design: str) -> None:
    model = always(design, 0)
    decoder = decoder_of(model)
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    decoder.feed([IDS[:6]])
    assert backend.tokens["recursion"] == 6
    deeper = always(design, 2)
    backend._pieces["router"] = deeper.pieces()["router"]
    result = decoder.feed([IDS[6:7]])
    assert backend.tokens["recursion"] == 5 * 7
    assert_as_dense(deeper, IDS[:7], result.logits[0], result.traces[0])
    backend._pieces["router"] = model.pieces()["router"]
    decoder.feed([IDS[7:8]])  # going down needs nothing: only depth 1 moves on
    assert backend.tokens["recursion"] == 5 * 7 + 1


def test_reporting_every_token_extends_a_depth_only_to_its_last_user() -> None:
    model = tiny_model("rlm-90m", 1)
    decoder = decoder_of(model)
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    steps = [t.steps[0] for t in decoder.feed([IDS[:10]], "all").traces]
    users = [[n + 1 for n, s in enumerate(steps) if s >= depth] for depth in range(1, 6)]
    assert len(set(steps)) > 1
    assert backend.tokens["recursion"] == sum(max(u) for u in users if u)


@each_variant
def test_trace_says_passes_and_class_probabilities(design: str) -> None:
    result = decoder_of(tiny_model(design)).feed([IDS[:9]], "all")
    for trace in result.traces:
        assert len(trace.halting) == 3 and sum(trace.halting) == pytest.approx(1.0)
        assert trace.steps == ((1, 3, 5)[int(np.argmax(trace.halting))],)
        assert trace.depth == trace.steps[0]


@each_variant
def test_depth_budget_caps_the_passes(design: str) -> None:
    model = always(design, 2)
    result = decoder_of(model, depth=Depth(max_steps=2)).feed([IDS[:5]])
    assert result.traces[0].steps == (2,)
    expected, _ = dense_last(model, IDS[:5], max_steps=2)
    np.testing.assert_allclose(result.logits[0], expected, rtol=0, atol=1e-9)


def test_rlm_90m_never_forgets() -> None:
    model = tiny_model("rlm-90m")
    decoder = decoder_of(model)
    assert len(IDS) > 3 * WINDOW
    for n, token in enumerate(IDS):
        result = decoder.feed([[token]])
        if n % 7 == 0 or n == len(IDS) - 1:
            assert_as_dense(model, IDS[: n + 1], result.logits[0], result.traces[0])
    assert decoder.dropped(0) == 0 and decoder.length(0) == len(IDS)


def test_a_text_beyond_the_memory_limit_is_refused_and_the_rest_still_works() -> None:
    model = tiny_model("rlm-90m")
    config = model.config
    token_bytes = (config.n_layers + 5) * 2 * config.d_model * 4
    decoder = decoder_of(model, cache_limit_bytes=20 * token_bytes)
    decoder.feed([IDS[:15]])
    with pytest.raises(InputError, match="30 tokens need"):
        decoder.feed([IDS[15:30]])
    assert decoder.length(0) == 15
    result = decoder.feed([IDS[15:20]])  # 20 tokens fit, though twice the first capacity would not
    assert_as_dense(model, IDS[:20], result.logits[0], result.traces[0])
    with pytest.raises(InputError, match="21 tokens need"):
        decoder.feed([IDS[20:21]])


@each_variant
def test_padding_is_invisible_to_the_tokens_after_it(design: str) -> None:
    """Positions are relative and padding is neither a key nor in the mean: leading padding changes nothing."""
    model = tiny_model(design)
    plain = decoder_of(model).feed([IDS[:6]], "all")
    decoder = decoder_of(model)
    decoder.feed([[PAD] * 4])
    padded = decoder.feed([IDS[:6]], "all")
    np.testing.assert_allclose(padded.logits, plain.logits, rtol=0, atol=1e-9)
    assert [t.steps for t in padded.traces] == [t.steps for t in plain.traces]


def test_decoding_needs_no_torch() -> None:
    code = (
        "import sys, rlm_engine.decoding.blend, rlm_engine.decoding.routed;"
        "sys.exit('torch imported' if 'torch' in sys.modules else 0)"
    )
    paths = f"import sys; sys.path[:0] = {sys.path!r};"
    assert subprocess.run([sys.executable, "-c", paths + code], check=False).returncode == 0
