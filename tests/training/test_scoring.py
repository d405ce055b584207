"""The dense scorer against the decoder and against plain forwards; forced depths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_scoring import END, byte_act, byte_router, byte_scorer, random_bytes, scorer_of

from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import UsageError
from rlm_training.scoring import Passage, Run, Scorer

LENGTHS = (1, 2, 7, 13, 16, 16, 5)


def passages(first: bool = True) -> list[Passage]:
    found = []
    for i, length in enumerate(LENGTHS):
        ids = np.concatenate(([END], random_bytes(length, i)))
        found.append(Passage(ids[:-1], ids[1:], length // 2 if first else 0))
    return found


def assert_same(a: Scorer, b: Scorer, run: Run) -> None:
    for one, two in zip(a.score(passages(), run, entropy=True), b.score(passages(), run, entropy=True), strict=True):
        np.testing.assert_allclose(one.logprob, two.logprob, atol=1e-9)
        np.testing.assert_allclose(one.entropy, two.entropy, atol=1e-9)  # type: ignore[arg-type]
        np.testing.assert_allclose(one.depth, two.depth, atol=1e-9)
        np.testing.assert_array_equal(one.greedy, two.greedy)


@pytest.mark.parametrize("depth", [Depth(), Depth(max_steps=2), Depth(halt_threshold=0.6), Depth(4, 0.8)])
def test_dense_scores_of_act_equal_the_decoder(depth: Depth) -> None:
    module = byte_act(3, context=16)
    assert_same(scorer_of(module), scorer_of(module, dense=False), Run(depth))


@pytest.mark.parametrize("design", ["blend", "routed", "mixture"])
@pytest.mark.parametrize("depth", [Depth(), Depth(max_steps=1)])
def test_dense_causal_scores_of_routers_equal_the_decoder(design: str, depth: Depth) -> None:
    module = byte_router(design)
    assert_same(scorer_of(module), scorer_of(module, dense=False), Run(depth))


def test_teacher_forced_routers_see_the_future() -> None:
    for design in ("blend", "routed", "mixture"):
        module = byte_router(design)
        scorer = scorer_of(module)
        forced = scorer.score(passages(first=False), Run(routing="teacher-forced"))
        causal = scorer.score(passages(first=False))
        assert any(abs(a.logprob - b.logprob).max() > 1e-3 for a, b in zip(forced, causal, strict=True)), design
        # batching and the padding in a batch must not reach the router's mean
        for passage, score in zip(passages(first=False), forced, strict=True):
            options = {"batch": "rows"} if design == "mixture" else {"routing": "sequence"}
            with torch.no_grad():
                logits = module(torch.from_numpy(passage.inputs)[None], **options).logits[0]
            expected = logits.log_softmax(-1).gather(1, torch.from_numpy(passage.targets)[:, None])[:, 0]
            np.testing.assert_allclose(score.logprob, expected, atol=1e-9)


def test_act_scores_equal_one_plain_forward_per_prefix() -> None:
    module = byte_act(1)
    ids = np.concatenate(([END], random_bytes(9)))
    score = scorer_of(module).score([Passage(ids[:-1], ids[1:])], entropy=True)[0]
    for t in range(9):
        with torch.no_grad():
            out = module(torch.from_numpy(ids[: t + 1])[None])
            logprobs = module.head(out.hidden)[0, -1].log_softmax(-1)
        assert score.logprob[t] == pytest.approx(float(logprobs[ids[t + 1]]), abs=1e-10)
        assert score.depth[t] == int(out.depth[0, -1])
        assert score.entropy is not None
        assert score.entropy[t] == pytest.approx(-float((logprobs.exp() * logprobs).sum()), abs=1e-9)
        assert score.greedy[t] == (int(logprobs.argmax()) == ids[t + 1])


def test_forcing_the_learned_depths_changes_nothing() -> None:
    for rule in ("act", "last"):
        for kv in ("final", "reuse"):
            module = byte_act(5, rule=rule, kv=kv)
            ids = torch.from_numpy(random_bytes(24).reshape(2, 12))
            with torch.no_grad():
                learned = module(ids)
                forced = module(ids, forced_depth=learned.depth)
            assert len(learned.depth.unique()) > 1
            assert torch.equal(learned.hidden, forced.hidden)
            assert torch.equal(learned.depth, forced.depth)
            assert torch.equal(learned.remainder, forced.remainder)


def test_a_token_stops_exactly_where_it_is_forced_to() -> None:
    module = byte_act(5)
    ids = torch.from_numpy(random_bytes(12)[None])
    depths = torch.from_numpy(np.random.default_rng(0).integers(1, 6, (1, 12)))
    with torch.no_grad():
        out = module(ids, forced_depth=depths, keep_states=True)
    assert torch.equal(out.depth, depths)
    cumulative = torch.zeros(1, 12, dtype=torch.float64)
    weighted = torch.zeros_like(out.hidden)
    for n, (p, state) in enumerate(zip(out.halting, out.states, strict=True), 1):
        weight = torch.where(depths == n, 1.0 - cumulative, torch.minimum(p, 1.0 - cumulative)) * (depths >= n)
        assert (weight >= -1e-12).all()
        cumulative = cumulative + weight
        weighted = weighted + weight[..., None] * state
    torch.testing.assert_close(cumulative, torch.ones_like(cumulative))
    torch.testing.assert_close(module.final_norm(weighted), out.hidden)


def test_forcing_everything_to_the_last_budgeted_step_equals_no_halting() -> None:
    module = byte_act(5)
    with torch.no_grad():
        module.halt.bias.fill_(-20.0)  # nobody halts by itself
        ids = torch.from_numpy(random_bytes(8)[None])
        for steps in (1, 3, 5):
            forced = module(ids, forced_depth=torch.full((1, 8), steps))
            torch.testing.assert_close(forced.hidden, module(ids, max_steps=steps).hidden, rtol=0, atol=1e-12)


def test_what_cannot_be_scored_is_refused() -> None:
    ids = random_bytes(30)
    with pytest.raises(UsageError, match="does not fit the context"):
        byte_scorer(context=24).score([Passage(ids[:-1], ids[1:])])
    short = [Passage(ids[:4], ids[1:5])]
    with pytest.raises(UsageError, match="act"):
        scorer_of(byte_router("blend")).score(short, forced_depth=[np.ones(4, dtype=np.int64)])
    with pytest.raises(UsageError, match="torch backend"):
        scorer_of(byte_router("blend"), dense=False).score(short, Run(routing="teacher-forced"))
    with pytest.raises(UsageError, match="routing"):
        Run(routing="psychic")


def test_bfloat16_is_near_and_says_so_when_it_cannot() -> None:
    module = byte_act(3, context=16).float()
    exact = scorer_of(module)
    near = Scorer(exact.model, module, "bfloat16")
    a, b = (np.concatenate([s.logprob for s in one.score(passages())]) for one in (exact, near))
    assert a.mean() == pytest.approx(b.mean(), rel=0.05)
    assert (a != b).any()
    with pytest.raises(UsageError, match="torch backend"):
        Scorer(exact.model, None, "bfloat16")
    with pytest.raises(UsageError, match="precision must be"):
        Scorer(exact.model, module, "int4")
