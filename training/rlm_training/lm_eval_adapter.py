"""Our models in EleutherAI's lm-evaluation-harness (extra `lm-eval`), without any wrapper of another library.

    python -m rlm_training.lm_eval_adapter MODEL --tasks arc_easy,lambada_openai [--include-path DIR] [--limit N]

or in Python: ``lm_eval.simple_evaluate(model=harness_model(load_scorer(MODEL)), tasks=[...])``. The harness is imported
only when `harness_model` is called. Scoring follows `tasks`: a start token in front of everything, contexts too long
lose their beginning. Rolling likelihoods take non-overlapping windows, each beginning afresh (see `heldout`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlm_engine.errors import UsageError
from rlm_engine.generate import Model
from rlm_engine.sampling import Sampling
from rlm_training.heldout import Domain, HeldoutDocument, windows_of
from rlm_training.scoring import Scorer, load_scorer, start_token
from rlm_training.tasks import continuation

MAX_NEW_TOKENS = 256


def log_likelihoods(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): nats of the continuation (<= 0), and whether greedy decoding would write it."""
    passages = [continuation(scorer.model, context, ending) for context, ending in pairs]
    return [(float(s.logprob.sum()), bool(s.greedy.all())) for s in scorer.score(passages)]


def rolling_log_likelihoods(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """Nats of whole texts (<= 0)."""
    model = scorer.model
    assert model.tokenizer is not None
    documents = [HeldoutDocument(np.asarray(model.tokenizer.encode(text), dtype=np.int64), 0) for text in texts]
    totals = [0.0] * len(texts)
    windows = windows_of(Domain("texts", documents), model)
    for window, score in zip(windows, scorer.score([w.passage for w in windows]), strict=True):
        totals[window.document] += float(score.logprob.sum(dtype=np.float64))
    return totals


def generate_until(model: Model, context: str, options: Mapping[str, Any]) -> str:
    """Continue a context up to a stop text. ``options``: the harness's generation arguments.

    Known are until, max_gen_toks, do_sample, temperature, top_p, top_k and seed; others raise UsageError.
    """
    assert model.tokenizer is not None
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"generation argument {unknown[0]!r} is not supported; known are {', '.join(sorted(known))}")
    until = options.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    limit = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
    sampling = Sampling(
        temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        top_p=float(options.get("top_p", 1.0)),
        top_k=int(options.get("top_k", 0)),
        seed=options.get("seed"),
        max_tokens=limit,
        stop=tuple(text for text in stop if text),
    )
    room = max(model.config.context_length - limit, model.config.context_length // 2, 1)
    ids = [start_token(model), *model.tokenizer.encode(context)][-room:]
    return "".join(token.text for token in model.generate(ids, sampling))


def harness_model(scorer: Scorer) -> Any:
    """An `lm_eval.api.model.LM` that scores and generates with our engine. Raises UsageError without the harness."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UsageError("lm-evaluation-harness is not installed; run: pip install 'rlm-chat[lm-eval]'") from None

    class RlmHarnessModel(LM):  # type: ignore[misc, unused-ignore]
        """The harness's interface: requests carry their arguments in ``args``."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return log_likelihoods(scorer, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return rolling_log_likelihoods(scorer, [request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [generate_until(scorer.model, *request.args) for request in requests]

    return RlmHarnessModel()


def main(arguments: list[str] | None = None) -> int:
    """Run harness tasks and print their results as JSON."""
    parser = argparse.ArgumentParser(prog="python -m rlm_training.lm_eval_adapter", description="lm-evaluation-harness")
    parser.add_argument("model", help="bundled model or model directory")
    parser.add_argument("--tasks", required=True, help="task names, separated by commas")
    parser.add_argument("--include-path", default=None, help="folder with further task files (.yaml)")
    parser.add_argument("--limit", type=int, default=None, help="items per task at most")
    parser.add_argument("--num-fewshot", type=int, default=None)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    wrapped = harness_model(load_scorer(options.model, options.backend, options.device))
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=options.tasks.split(","),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=TaskManager(include_path=options.include_path),
        bootstrap_iters=0,
    )
    json.dump(results["results"], sys.stdout, indent=1, default=str)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
