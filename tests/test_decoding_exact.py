"""Claims that hold for every published design with a router over the sequence: decoding equals dense forwards."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_routers import (
    DESIGNS,
    PAD,
    VOCABULARY,
    WINDOW,
    CountingBackend,
    assert_as_dense,
    cut_positions,
    decoder_of,
    defined,
    dense_last,
    feed_in_chunks,
    seeds,
    texts,
    tiny_model,
)

from rlm_engine.decoding import trunk
from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import InputError, ModelError, UsageError

each_design = pytest.mark.parametrize("design", DESIGNS)
few = settings(max_examples=12, deadline=None)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@each_design
@few
@given(ids=texts, cuts=cut_positions, seed=seeds)
def test_cached_decode_equals_dense_forward_of_every_prefix(
    design: str, ids: list[int], cuts: list[int], seed: int
) -> None:
    model = tiny_model(design, seed)
    results = feed_in_chunks(decoder_of(model), ids, cuts)
    logits = np.concatenate([r.logits for r in results])
    traces = [t for r in results for t in r.traces]
    assert len(logits) == len(traces) == len(ids)
    for n, trace in enumerate(traces):
        assert_as_dense(model, ids[: n + 1], logits[n], trace)


@each_design
@few
@given(ids=texts, cuts=cut_positions, seed=seeds)
def test_float32_agrees_to_1e_4_and_chooses_the_same(design: str, ids: list[int], cuts: list[int], seed: int) -> None:
    single, double = tiny_model(design, seed, torch.float32), tiny_model(design, seed)
    results = feed_in_chunks(decoder_of(single), ids, cuts, "last")
    assert results[-1].logits.dtype == np.float32
    if not defined(double, ids[-WINDOW:]):
        return
    expected = decoder_of(double).feed([ids])
    np.testing.assert_allclose(results[-1].logits, expected.logits, rtol=0, atol=1e-4)
    assert results[-1].traces[0].steps == expected.traces[0].steps


@each_design
@few
@given(ids=texts.map(lambda ids: ids[:WINDOW]), seed=seeds)
def test_prefix_routing_in_one_dense_pass_equals_decoding(design: str, ids: list[int], seed: int) -> None:
    model = tiny_model(design, seed)
    fed = decoder_of(model).feed([ids], "all")
    with torch.no_grad():
        dense = model(torch.tensor([ids]), routing="prefix")
    good = [n for n in range(len(ids)) if defined(model, ids[: n + 1])]
    np.testing.assert_allclose(fed.logits[good], dense.logits[0, good].numpy(), rtol=0, atol=1e-9)
    if design != "blend":
        assert [fed.traces[n].steps[0] for n in good] == dense.steps[0, good].tolist()


@each_design
def test_random_models_use_every_choice(design: str) -> None:
    """Guards the tests above: routers that always say the same would prove little."""
    seen: set[int] = set()
    for seed in range(4):
        for trace in decoder_of(tiny_model(design, seed)).feed([text(WINDOW, seed)], "all").traces:
            seen.add(int(np.argmax(trace.halting)))
    assert len(seen) >= 3


@each_design
@few
@given(data=st.data(), seed=seeds)
def test_rows_of_different_lengths_do_not_influence_each_other(design: str, data: st.DataObject, seed: int) -> None:
    model = tiny_model(design, seed)
    together = decoder_of(model, rows=3)
    alone = [decoder_of(model) for _ in range(3)]
    report = data.draw(st.sampled_from(["all", "last"]))
    for _ in range(3):
        chunk = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=7)) for _ in range(3)]
        result = together.feed(chunk, report)
        separate = [d.feed([c], report) for d, c in zip(alone, chunk, strict=True)]
        expected_rows = [row for row, r in enumerate(separate) for _ in r.traces]
        assert result.rows.tolist() == expected_rows
        np.testing.assert_allclose(result.logits, np.concatenate([r.logits for r in separate]), rtol=0, atol=1e-9)
        steps = [t.steps for r in separate for t in r.traces]
        assert [t.steps for t in result.traces] == steps
    assert [together.length(row) for row in range(3)] == [d.length(0) for d in alone]


@each_design
@pytest.mark.parametrize("window", ["exact", "block"])
@few
@given(data=st.data())
def test_truncating_and_going_on_equals_never_having_been_there(design: str, window: str, data: st.DataObject) -> None:
    model = tiny_model(design, 1)
    decoder = decoder_of(model, window=window)
    ids: list[int] = []
    for _ in range(4):
        keep = data.draw(st.integers(0, len(ids)))
        assert decoder.truncate(0, keep)
        del ids[keep:]
        ids += data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))
        result = decoder.feed([ids[keep:]])
        fresh = decoder_of(model, window=window)
        expected = fresh.feed([ids])
        np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-9)
        assert result.traces[0].steps == expected.traces[0].steps
        assert (decoder.length(0), decoder.dropped(0)) == (len(ids), fresh.dropped(0))
    assert not decoder.truncate(0, len(ids) + 1)


@each_design
def test_truncated_tokens_are_not_run_again(design: str) -> None:
    model = tiny_model(design)
    decoder = decoder_of(model)
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    decoder.feed([text(10)])
    decoder.truncate(0, 8)
    decoder.feed([[1, 2]])
    assert backend.tokens["layer.0"] == 12


@pytest.mark.parametrize("design", ["blend", "rlm-198m"])
def test_block_window_drops_a_quarter_at_once_and_then_runs_single_tokens(design: str) -> None:
    model = tiny_model(design)
    decoder = decoder_of(model, window="block")
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    ids = text(WINDOW + 2 * (WINDOW // 4) + 1)
    run = []
    for n in range(1, len(ids) + 1):
        before = backend.tokens.get("layer.0", 0)
        result = decoder.feed([ids[n - 1 : n]])
        run.append(backend.tokens["layer.0"] - before)
        expected, _ = dense_last(model, ids[decoder.dropped(0) : n])
        np.testing.assert_allclose(result.logits[0], expected, rtol=0, atol=1e-9)
        assert n - decoder.dropped(0) <= WINDOW
    kept = WINDOW - WINDOW // 4 + 1
    assert run == [1] * WINDOW + ([kept] + [1] * (WINDOW // 4 - 1)) * 2 + [kept]


@pytest.mark.parametrize("design", ["blend", "rlm-198m"])
@few
@given(ids=texts, cuts=cut_positions)
def test_block_window_does_not_depend_on_the_chunking(design: str, ids: list[int], cuts: list[int]) -> None:
    model = tiny_model(design)
    results = feed_in_chunks(decoder_of(model, window="block"), ids, cuts)
    one_by_one = decoder_of(model, window="block")
    singles = np.concatenate([one_by_one.feed([[i]]).logits for i in ids])
    np.testing.assert_allclose(np.concatenate([r.logits for r in results]), singles, rtol=0, atol=1e-9)


@each_design
def test_depth_budget_may_change_between_tokens(design: str) -> None:
    model = tiny_model(design, 2)
    decoder = decoder_of(model, depth=Depth(max_steps=1))
    ids = text(WINDOW)
    for n, budget in enumerate(itertools.islice(itertools.cycle([1, 1, 3, 2, None]), len(ids))):
        decoder.depth = Depth(max_steps=budget)
        result = decoder.feed([[ids[n]]])
        expected, _ = dense_last(model, ids[: n + 1], max_steps=budget)
        np.testing.assert_allclose(result.logits[0], expected, rtol=0, atol=1e-9)
        assert result.traces[0].steps[0] <= (budget or 5)


@each_design
def test_long_prompts_run_in_chunks_with_the_same_result(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(design)
    ids = [text(WINDOW), text(WINDOW - 5, 1)]
    expected = decoder_of(model, rows=2).feed(ids, "all")
    monkeypatch.setattr(trunk, "CHUNK", 4)
    result = decoder_of(model, rows=2).feed(ids, "all")
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-9)


@each_design
@pytest.mark.parametrize("piece", ["layer.1", "recursion"])
def test_an_interrupted_feed_is_made_up_for(design: str, piece: str) -> None:
    model = tiny_model(design)
    decoder = decoder_of(model)
    decoder._backend = decoder._trunk._backend = backend = CountingBackend(model)
    ids = text(9)
    decoder.feed([ids[:5]])
    backend.fail_at = piece
    with pytest.raises(KeyboardInterrupt):
        decoder.feed([ids[5:7]])
    backend.fail_at = None
    assert decoder.length(0) == 7
    result = decoder.feed([ids[7:]])
    assert_as_dense(model, ids, result.logits[0], result.traces[0])


@each_design
def test_small_capacity_grows(design: str) -> None:
    model = tiny_model(design)
    decoder = decoder_of(model, capacity=2)
    ids = text(WINDOW)
    for n in range(len(ids)):
        result = decoder.feed([[ids[n]]])
        assert_as_dense(model, ids[: n + 1], result.logits[0], result.traces[0])


@each_design
def test_nothing_fed_reports_nothing(design: str) -> None:
    decoder = decoder_of(tiny_model(design), rows=2)
    result = decoder.feed([[], []])
    assert result.logits.shape == (0, VOCABULARY) and not result.traces and not len(result.rows)
    assert decoder.feed([[], [1]]).rows.tolist() == [1]


@each_design
def test_numbers_that_are_not_finite_are_an_error(design: str) -> None:
    model = tiny_model(design, 3, torch.float32)
    decoder = decoder_of(model)
    decoder._backend._pieces["head"] = lambda y: (model.pieces()["head"](y)[0] * float("inf"),)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="not finite"):
        decoder.feed([[1]])


@each_design
def test_misuse_is_refused_and_changes_nothing(design: str) -> None:
    decoder = decoder_of(tiny_model(design))
    with pytest.raises(InputError, match=f"{VOCABULARY} is outside"):
        decoder.feed([[1, VOCABULARY]])
    with pytest.raises(InputError, match="-1 is outside"):
        decoder.feed([[-1]])
    with pytest.raises(UsageError, match="2 rows"):
        decoder.feed([[1], [1]])
    with pytest.raises(UsageError, match="'all' or 'last'"):
        decoder.feed([[1]], "some")
    assert decoder.length(0) == 0
    with pytest.raises(UsageError, match="'exact' or 'block'"):
        decoder_of(tiny_model(design), window="sliding")


@each_design
def test_padding_only_prompts_decode(design: str) -> None:
    assert np.isfinite(decoder_of(tiny_model(design)).feed([[PAD, PAD]], "all").logits).all()
