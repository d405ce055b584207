"""Cached decoding of the mixture design equals the dense forward of each prefix, whatever the path does."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import MixtureConfig
from rlm_engine.decoding import mixture
from rlm_engine.decoding.interface import Depth
from rlm_engine.decoding.mixture import MixtureDecoder
from rlm_engine.errors import InputError, ModelError, UsageError
from rlm_engine.models.mixture import MixtureLayer, MixtureModel

VOCABULARY, WINDOW = 29, 16
KINDS = [(p, r) for p in ("learned", "sinusoidal", "rope") for r in ("adaptive", "fixed")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@lru_cache
def tiny(positions: str = "learned", router: str = "adaptive", seed: int = 0, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """A model whose routers really choose: scaled up until the path changes from token to token."""
    config = MixtureConfig(
        vocab_size=VOCABULARY, d_model=12, n_heads=2, eos_token_id=7, context_length=WINDOW, tokenizer="none",
        n_layers=3, ffn=20, max_steps=3, router=router, positions=positions,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = MixtureModel(config).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4, generator=generator)
        for layer in model.layers:
            assert isinstance(layer, MixtureLayer)
            if layer.router_in is not None and layer.router_out is not None:
                layer.router_in.weight.mul_(3.0)
                layer.router_in.bias.normal_(0.0, 1.0, generator=generator)
                layer.router_out.weight.mul_(3.0)
        model.embedding.weight.mul_(4.0)  # else the sinusoidal positions outweigh the tokens in the means
    return model.to(dtype).eval()


def decoder(model: MixtureModel, **options: object) -> MixtureDecoder:
    dtype = model.head.weight.dtype
    return MixtureDecoder(TorchBackend(model.pieces(), dtype), model.config, **options)  # type: ignore[arg-type]


def forward(model: MixtureModel, ids: list[int], max_steps: int | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
    """What the plain loop computes for the last token: everything afresh."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), batch="rows", max_steps=max_steps)
    return out.logits[0, -1].numpy(), tuple(out.steps[0].tolist())


def same(model: MixtureModel, logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE[model.head.weight.dtype])


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=WINDOW + 8)


def test_the_tiny_models_change_their_path() -> None:
    """Otherwise the tests below would not try what is hard."""
    text = np.random.default_rng(0).integers(0, VOCABULARY, WINDOW).tolist()
    for positions in ("learned", "sinusoidal", "rope"):
        traces = [decoder(tiny(positions, seed=seed)).feed([text], report="all").traces for seed in range(4)]
        assert np.mean([len({trace.steps for trace in one}) for one in traces]) >= 3
        assert {0, 1, 2, 3} == {step for one in traces for trace in one for step in trace.steps}


@settings(max_examples=60, deadline=None)
@given(
    text=tokens,
    cuts=st.sets(st.integers(1, WINDOW + 7)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    cache_bytes=st.sampled_from([0, 20_000, 1 << 24]),
    max_steps=st.sampled_from([None, 1, 2]),
)
def test_cached_decoding_equals_the_forward_of_each_prefix(  # type: ignore[no-untyped-def]
    text, cuts, kind, seed, dtype, cache_bytes, max_steps
) -> None:
    model = tiny(*kind, seed, dtype)
    decode = decoder(model, depth=Depth(max_steps=max_steps), cache_bytes=cache_bytes)
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    for start, stop in itertools.pairwise(edges):
        result = decode.feed([text[start:stop]])
        logits, steps = forward(model, text[max(0, stop - WINDOW) : stop], max_steps)
        same(model, result.logits[0], logits)
        assert result.traces[0].steps == steps
        assert result.traces[0].depth == pytest.approx(np.mean(steps))
        assert decode.length(0) == stop and decode.dropped(0) == max(0, stop - WINDOW)


@settings(max_examples=20, deadline=None)
@given(text=tokens, seed=st.integers(0, 3), positions=st.sampled_from(["learned", "sinusoidal", "rope"]))
def test_report_all_equals_every_prefix_alone(text: list[int], seed: int, positions: str) -> None:
    model = tiny(positions, "adaptive", seed)
    result = decoder(model).feed([text], report="all")
    for n in range(1, len(text) + 1):
        logits, steps = forward(model, text[max(0, n - WINDOW) : n])
        same(model, result.logits[n - 1], logits)
        assert result.traces[n - 1].steps == steps


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(tokens, min_size=3, max_size=3), seed=st.integers(0, 3))
def test_rows_are_independent(rows: list[list[int]], seed: int) -> None:
    model = tiny(seed=seed)
    decode = decoder(model, rows=3, cache_bytes=60_000)
    for part in range(2):
        fed = [row[: len(row) // 2] if part == 0 else row[len(row) // 2 :] for row in rows]
        result = decode.feed(fed)
        assert result.rows.tolist() == [n for n, new in enumerate(fed) if new]
        for row, logits, trace in zip(result.rows, result.logits, result.traces, strict=True):
            expected, steps = forward(model, rows[row][: decode.length(row)][-WINDOW:])
            same(model, logits, expected)
            assert trace.steps == steps


@settings(max_examples=30, deadline=None)
@given(text=tokens, keep=st.integers(0, WINDOW + 7), more=tokens, window=st.sampled_from(["exact", "block"]))
def test_truncation_forgets_exactly(text: list[int], keep: int, more: list[int], window: str) -> None:
    model = tiny()
    decode, fresh = decoder(model, window=window), decoder(model, window=window)
    decode.feed([text], report="all")
    assert decode.truncate(0, keep)
    kept = text[:keep]
    assert decode.length(0) == len(kept)
    result, expected = decode.feed([more]), fresh.feed([kept + more])
    same(model, result.logits, expected.logits)
    assert result.traces == expected.traces


@settings(max_examples=30, deadline=None)
@given(text=tokens, cut=st.integers(0, WINDOW + 7))
def test_block_window_drops_a_quarter_and_runs_the_rest_afresh(text: list[int], cut: int) -> None:
    model = tiny()
    decode = decoder(model, window="block")
    decode.feed([text[:cut]])
    result = decode.feed([text[cut:]]) if text[cut:] else None
    start = 0
    for n in range(1, len(text) + 1):
        if n - start > WINDOW:
            start += WINDOW // 4
    assert decode.dropped(0) == start
    if result is not None:
        same(model, result.logits[0], forward(model, text[start:])[0])


def test_block_window_runs_afresh_once_per_quarter() -> None:
    model = tiny()
    decode = decoder(model, window="block")
    decode.feed([list(range(1, WINDOW + 1))])
    starts = []
    for n in range(WINDOW):
        decode.feed([[n + 1]])
        starts.append(decode.dropped(0))
    assert starts == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4


def test_early_positions_are_not_run_again_while_the_path_stays() -> None:
    """The point of the cache: with a fixed path one new token costs one token of work in every pass."""
    model = tiny("rope", "fixed")
    counts: list[int] = []

    class Counting(TorchBackend):
        def attend(self, piece, x, cache, where, *inputs):  # type: ignore[no-untyped-def]
            counts.append(len(where))
            return super().attend(piece, x, cache, where, *inputs)

    decode = MixtureDecoder(Counting(model.pieces(), torch.float64), model.config)
    decode.feed([[1, 2, 3, 4, 5]])
    assert counts == [5] * 9
    counts.clear()
    decode.feed([[6]])
    assert counts == [1] * 9


def test_a_known_path_catches_up_instead_of_starting_over() -> None:
    model = tiny(seed=1)
    work: list[int] = []

    class Counting(TorchBackend):
        def attend(self, piece, x, cache, where, *inputs):  # type: ignore[no-untyped-def]
            work.append(len(where))
            return super().attend(piece, x, cache, where, *inputs)

    text = np.random.default_rng(1).integers(1, VOCABULARY, WINDOW).tolist()
    totals = []
    for cache_bytes in (1 << 24, 0):
        decode = MixtureDecoder(Counting(model.pieces(), torch.float64), model.config, cache_bytes=cache_bytes)
        work.clear()
        decode.feed([text], report="all")
        totals.append(sum(work))
    assert totals[0] < totals[1]


@pytest.mark.parametrize("bound", [0, 30_000, 90_000])
def test_path_cache_stays_within_its_bound(bound: int) -> None:
    model = tiny()
    decode = decoder(model, cache_bytes=bound)
    path_at_most = 3 * (1 + 3 * 3) * WINDOW * 12 * 8
    for token in np.random.default_rng(2).integers(0, VOCABULARY, 3 * WINDOW).tolist():
        decode.feed([[token]])
        assert decode.cached_bytes <= max(bound, path_at_most)
    assert decode.cached_bytes > 0


def test_caches_grow_without_losing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "_FIRST_CAPACITY", 2)
    model = tiny(seed=1)
    decode = decoder(model)
    text = np.random.default_rng(3).integers(0, VOCABULARY, WINDOW).tolist()
    for n, token in enumerate(text, start=1):
        same(model, decode.feed([[token]]).logits[0], forward(model, text[:n])[0])
    assert {node.capacity for node in decode._nodes.values()} <= {2, 4, 8, 16}


def test_a_new_depth_budget_applies_from_the_next_token_on() -> None:
    model = tiny()
    decode = decoder(model)
    decode.feed([[3, 9, 14, 2]])
    decode.depth = Depth(max_steps=1)
    result = decode.feed([[5]])
    logits, steps = forward(model, [3, 9, 14, 2, 5], max_steps=1)
    same(model, result.logits[0], logits)
    assert result.traces[0].steps == steps and max(steps) <= 1


def test_capacity_is_a_smaller_window() -> None:
    model = tiny()
    decode = decoder(model, capacity=6)
    text = list(range(1, 12))
    same(model, decode.feed([text]).logits[0], forward(model, text[-6:])[0])
    assert decode.dropped(0) == 5


def test_padding_is_no_key_but_counts_in_the_mean() -> None:
    model = tiny()
    decode = decoder(model)
    with_padding, without = [0, 0, 5, 0, 9, 0], [5, 9]
    same(model, decode.feed([with_padding]).logits[0], forward(model, with_padding)[0])
    assert np.isfinite(decode.feed([[0]]).logits).all()
    assert np.abs(forward(model, with_padding)[0] - forward(model, without)[0]).max() > 1e-3


def test_no_padding_effect_on_what_follows_when_the_path_is_fixed() -> None:
    """With a fixed router and no position table a hidden key changes nothing but the distances."""
    config = dataclasses.replace(tiny("learned", "fixed").config)
    model = MixtureModel(config).to(torch.float64).eval()
    model.load_state_dict(tiny("learned", "fixed").state_dict())
    with torch.no_grad():
        assert model.positions is not None
        model.positions.weight.zero_()
    one, two = decoder(model), decoder(model)
    same(model, one.feed([[0, 5, 0, 0, 9]]).logits, two.feed([[5, 9]]).logits)


def test_refused_input_changes_nothing() -> None:
    model = tiny()
    decode = decoder(model, rows=2)
    decode.feed([[1, 2], [3]])
    for wrong in ([[4], [VOCABULARY]], [[-1], []]):
        with pytest.raises(InputError, match="outside the vocabulary"):
            decode.feed(wrong)
    with pytest.raises(UsageError):
        decode.feed([[1]])
    assert decode.length(0) == 2
    same(model, decode.feed([[4], []]).logits[0], forward(model, [1, 2, 4])[0])
    assert decode.feed([[], []]).logits.shape == (0, VOCABULARY)


@pytest.mark.parametrize("where", ["embedding", "head"])
def test_numbers_that_are_not_finite_are_an_error_and_the_text_before_survives(where: str) -> None:
    model = MixtureModel(tiny().config).to(torch.float64).eval()
    model.load_state_dict(tiny().state_dict())
    decode = decoder(model)
    decode.feed([[1, 2, 3]])
    with torch.no_grad():
        (model.embedding if where == "embedding" else model.head).weight[11] = float("nan")
    with pytest.raises(ModelError, match="finite"):
        decode.feed([[11]])
    assert decode.length(0) == 3
    if where == "embedding":
        same(model, decode.feed([[4]]).logits[0], forward(model, [1, 2, 3, 4])[0])


def test_straight_through_router_learns_and_changes_no_value() -> None:
    config = dataclasses.replace(tiny().config, dropout=0.0)
    published = MixtureModel(config, "none").to(torch.float64)
    ours = MixtureModel(config, "straight-through").to(torch.float64)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (published, ours):
        model.load_state_dict(tiny().state_dict())
        model.train()
        for module in model.modules():
            if isinstance(module, MixtureLayer):
                module._drop = lambda x, rate=None: x  # type: ignore[method-assign]  # the router's fixed 0.1
        out = model(ids, labels=ids, batch="rows", shift_labels=True)
        assert out.loss is not None
        out.loss.backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[0].computation_loss, outputs[1].computation_loss)
    assert outputs[0].steps.tolist() == outputs[1].steps.tolist()
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for layer in published.layers:
        assert isinstance(layer, MixtureLayer) and layer.router_out is not None
        assert layer.router_out.weight.grad is None
    for layer in ours.layers:
        assert isinstance(layer, MixtureLayer) and layer.router_out is not None
        assert layer.router_out.weight.grad is not None and layer.router_out.weight.grad.abs().sum() > 0
    with pytest.raises(UsageError, match="rows"):
        ours(ids)
    with pytest.raises(InputError, match="more than the 16"):
        published(torch.ones(1, WINDOW + 1, dtype=torch.int64))
