"""The blend design against vectors of the published rlm-48m: forward, losses, and decoding through the decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_vectors import Golden, greedy, load, prefixes

from rlm_engine.published import blend as published

TOLERANCE = 5e-5
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


def test_vectors_are_there() -> None:
    assert PREFIXES and CASES


@each_case("logits")
def test_logits_router_and_losses(prefix: Path, name: str) -> None:
    golden = load(prefix)
    out = forward(golden, name)
    torch.testing.assert_close(out.logits, golden.case(name, "logits"), rtol=0, atol=TOLERANCE)
    probabilities = golden.case(name, "router_probs")
    torch.testing.assert_close(out.router_probabilities, probabilities, rtol=0, atol=1e-5)
    assert torch.equal(out.router_probabilities.argmax(-1), probabilities.argmax(-1))
    for field in ("loss", "lm_loss"):
        expected = golden.case(name, field)
        if expected is not None:
            torch.testing.assert_close(getattr(out, field), expected[0], rtol=0, atol=1e-5)
        else:
            assert golden.case(name, "labels") is None


@each_case("logits_f64")
def test_float64_matches_the_published_model_run_in_float64(prefix: Path, name: str) -> None:
    golden = load(prefix, torch.float64)
    expected = golden.case(name, "logits_f64")
    torch.testing.assert_close(forward(golden, name).logits, expected, rtol=0, atol=1e-10)


@each_case("hidden_base")
def test_hidden_states(prefix: Path, name: str) -> None:
    golden = load(prefix)
    base = golden.case(name, "hidden_base")
    out = forward(golden, name, return_states=True)
    torch.testing.assert_close(out.states[0], base, rtol=1e-5, atol=TOLERANCE)
    for k in range(1, golden.config.max_steps + 1):
        expected = golden.case(name, f"hidden_rec{k}_raw")
        torch.testing.assert_close(out.states[k], expected, rtol=1e-5, atol=TOLERANCE)
    final = golden.model.norm(out.states[-1])
    torch.testing.assert_close(final, golden.case(name, "hidden_final"), rtol=0, atol=TOLERANCE)


@each_model
@torch.no_grad()
def test_greedy_continuations_and_the_blend_at_each_token(golden: Golden) -> None:
    crossed = False
    for run in golden.facts["greedy"]:
        prompt, output, choices = run["prompt"], run["output"], run["per_step_choice"]
        decoder = golden.decoder()
        ids, traces = greedy(decoder, prompt, len(output) - len(prompt))
        assert prompt + ids == output
        np.testing.assert_allclose([t.halting for t in traces], choices, rtol=0, atol=1e-5)
        crossed |= decoder.dropped(0) > 0
    assert crossed, "one published run goes past the learned positions"


@each_model
def test_greedy_stops_at_end_of_text_without_appending_it(golden: Golden) -> None:
    run = golden.facts["greedy_eos"]
    ids, _ = greedy(golden.decoder(), run["prompt"], run["new_tokens"] + 1)
    assert ids[-1] == run["eos_token_id"]
    assert run["eos_token_id"] not in ids[:-1]
    assert run["prompt"] + ids[:-1] == run["output"]


@each_model
def test_parameter_count(golden: Golden) -> None:
    assert sum(p.numel() for p in golden.model.parameters()) == golden.facts["parameter_count"]
