"""The routed design against vectors of rlm-90m and rlm-198m: forward, routing, losses, decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_vectors import Golden, greedy, load, prefixes

from rlm_engine.published import routed as published

TOLERANCE = 5e-5
# rlm-198m's rows that see padding only have scores near -1e4, where float32 has steps of 1/1024
SOFT_MASK_TOLERANCE = 5e-3
PREFIXES = prefixes(published)
CASES = [(prefix, case["name"]) for prefix in PREFIXES for case in load(prefix).facts["cases"]]


def each_case(field: str):  # type: ignore[no-untyped-def]
    """Run a test for every case that has this field."""
    cases = [(prefix, name) for prefix, name in CASES if load(prefix).case(name, field) is not None]
    assert cases
    return pytest.mark.parametrize(("prefix", "name"), cases, ids=lambda p: p.name if isinstance(p, Path) else p)


each_model = pytest.mark.parametrize("golden", [load(p) for p in PREFIXES], ids=[p.name for p in PREFIXES])


def forward(golden: Golden, name: str, **options):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return golden.model(golden.case(name, "input_ids"), golden.case(name, "labels"), **options)


def facts_of(golden: Golden, name: str) -> dict:  # type: ignore[type-arg]
    return next(case for case in golden.facts["cases"] if case["name"] == name)


def leading_pads(golden: Golden, name: str) -> torch.Tensor:
    ids = golden.case(name, "input_ids")
    assert ids is not None
    return (ids == golden.config.pad_token_id).long().cumprod(1).bool()


def test_vectors_of_both_variants_are_there() -> None:
    assert {load(prefix).config.biases for prefix in PREFIXES} == {True, False}


@each_case("input_ids")
def test_logits(prefix: Path, name: str) -> None:
    golden = load(prefix)
    out = forward(golden, name)
    expected = golden.case(name, "logits")
    if expected is None:  # the published rlm-90m yields NaN for rows that start with padding
        good = ~torch.tensor(facts_of(golden, name)["nan_rows"])
        expected = golden.case(name, "logits_nan_as_zero")
        torch.testing.assert_close(out.logits[good], expected[good], rtol=0, atol=TOLERANCE)
        assert not expected[~good].any()
        assert torch.isfinite(out.logits).all()
        return
    error = (out.logits - expected).abs().amax(-1)
    soft = leading_pads(golden, name)
    assert error[~soft].max() <= TOLERANCE
    assert not soft.any() or error[soft].max() <= SOFT_MASK_TOLERANCE


@each_case("steps")
def test_routing_decisions(prefix: Path, name: str) -> None:
    golden = load(prefix)
    out = forward(golden, name)
    good = ~torch.tensor(facts_of(golden, name).get("nan_rows", [False] * len(out.steps)))
    assert torch.equal(out.router_class[good], golden.case(name, "router_class")[good])
    assert torch.equal(out.steps[good], golden.case(name, "steps")[good])
    expected = golden.case(name, "router_logits")
    torch.testing.assert_close(out.router_logits[good], expected[good], rtol=0, atol=2e-4)


@each_case("labels")
def test_losses_perplexities_and_pseudo_labels(prefix: Path, name: str) -> None:
    golden = load(prefix)
    out = forward(golden, name)
    for field in ("loss", "lm_loss", "router_loss"):
        torch.testing.assert_close(getattr(out, field), golden.case(name, field)[0], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(out.sample_ppl, golden.case(name, "sample_ppl"), rtol=1e-5, atol=0)
    assert torch.equal(out.pseudo_labels, golden.case(name, "pseudo_labels"))


@each_case("logits_f64")
def test_float64_matches_the_published_model_run_in_float64(prefix: Path, name: str) -> None:
    golden = load(prefix, torch.float64)
    expected = golden.case(name, "logits_f64")
    # the published model keeps its rotary tables in float32
    torch.testing.assert_close(forward(golden, name).logits, expected, rtol=0, atol=2e-5)


@each_case("hidden_base")
def test_hidden_states(prefix: Path, name: str) -> None:
    golden = load(prefix)
    base = golden.case(name, "hidden_base")
    out = forward(golden, name, return_states=True)
    torch.testing.assert_close(out.states[0], base, rtol=1e-5, atol=TOLERANCE)
    for s in range(1, int(out.steps.max()) + 1):
        running = out.steps >= s  # the published code computes stopped rows too, and drops the result
        expected = golden.case(name, f"hidden_rec{s}_raw")
        torch.testing.assert_close(out.states[s][running], expected[running], rtol=1e-5, atol=TOLERANCE)
    final = golden.model.norm(out.states[-1])
    torch.testing.assert_close(final, golden.case(name, "hidden_final"), rtol=0, atol=TOLERANCE)


@each_model
def test_greedy_continuations_and_the_passes_at_each_token(golden: Golden) -> None:
    longest = 0
    for run in golden.facts["greedy"]:
        prompt, output = run["prompt"], run["output"]
        decoder = golden.decoder()
        ids, traces = greedy(decoder, prompt, len(output) - len(prompt))
        assert prompt + ids == output
        assert [t.steps[0] for t in traces] == run["per_step_choice"]
        longest = max(longest, decoder.length(0))
        outside = max(0, decoder.length(0) - golden.config.context_length)
        assert decoder.dropped(0) == (outside if golden.config.rolling_window else 0)
    assert longest > golden.config.context_length, "one published run goes past the context length"


@each_model
def test_greedy_stops_after_appending_end_of_text(golden: Golden) -> None:
    run = golden.facts["greedy_eos"]
    ids, _ = greedy(golden.decoder(), run["prompt"], run["new_tokens"])
    assert ids.index(run["eos_token_id"]) == run["new_tokens"] - 1
    assert run["prompt"] + ids == run["output"]


@each_model
def test_parameter_count(golden: Golden) -> None:
    assert sum(p.numel() for p in golden.model.parameters()) == golden.facts["parameter_count"]
