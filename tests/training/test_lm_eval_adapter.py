"""The lm-evaluation-harness adapter: its numbers, and its interface under a stand-in for the harness."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scoring import END, byte_scorer

from rlm_engine.errors import UsageError
from rlm_engine.sampling import log_softmax
from rlm_training.lm_eval_adapter import generate_until, harness_model, log_likelihoods, rolling_log_likelihoods


class Request:
    """Requests carry their arguments in ``args``, as `lm_eval.api.instance.Instance` does."""

    def __init__(self, *args: Any):
        self.args = args


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> type:
    class LM:
        pass

    module = types.ModuleType("lm_eval.api.model")
    module.LM = LM  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    return LM


def test_the_harness_model_answers_the_three_kinds_of_request(harness: type) -> None:
    scorer = byte_scorer(3, context=32)
    wrapped = harness_model(scorer)
    assert isinstance(wrapped, harness)
    pairs = [("The sky is", " blue"), ("", "Hello"), ("one two ", "three")]
    assert wrapped.loglikelihood([Request(*pair) for pair in pairs]) == log_likelihoods(scorer, pairs)
    texts = ["short", "a text that is longer than the window of this model"]
    assert wrapped.loglikelihood_rolling([Request(text) for text in texts]) == rolling_log_likelihoods(scorer, texts)
    options = {"until": ["\n"], "max_gen_toks": 5}
    assert wrapped.generate_until([Request("Hi", options)]) == [generate_until(scorer.model, "Hi", options)]


def test_likelihoods_equal_plain_forwards() -> None:
    scorer = byte_scorer(4, context=32)
    ids = [END, *b"The sky is blue"]
    with torch.no_grad():
        logits = scorer.module.head(scorer.module(torch.tensor([ids])).hidden)[0].numpy()
    each = log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    (value, greedy), *_ = log_likelihoods(scorer, [("The sky is", " blue")])
    assert value == pytest.approx(each[-5:].sum(), abs=1e-9)
    assert greedy == all(logits[t].argmax() == ids[t + 1] for t in range(10, 15))
    assert rolling_log_likelihoods(scorer, ["The sky is blue"])[0] == pytest.approx(each.sum(), abs=1e-9)


def test_greedy_continuations_are_greedy_and_stop() -> None:
    scorer = byte_scorer(4, context=32)
    text = generate_until(scorer.model, "ab", {"until": [], "max_gen_toks": 4})
    tokens = [token.id for token in scorer.model.generate([END, *b"ab"], _greedy(4))]
    assert text.encode() == bytes(tokens) or text == scorer.model.tokenizer.decode(tokens)  # type: ignore[union-attr]
    stop = text[1]
    assert generate_until(scorer.model, "ab", {"until": stop, "max_gen_toks": 4}) == text[: text.index(stop)]
    long_context = "x" * 100  # loses its beginning instead of being refused
    generate_until(scorer.model, long_context, {"until": [], "max_gen_toks": 2})
    with pytest.raises(UsageError, match="num_beams"):
        generate_until(scorer.model, "ab", {"num_beams": 4})


def _greedy(count: int) -> Any:
    from rlm_engine.sampling import Sampling

    return Sampling(greedy=True, max_tokens=count)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"rlm-chat\[lm-eval\]"):
        harness_model(byte_scorer())
