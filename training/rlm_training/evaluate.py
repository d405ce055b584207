"""`rlm-train evaluate`: everything measured about a model, as one JSON object.

Held-out perplexity and bits per byte (`heldout` says how texts are cut, `perplexity` how numbers are made), the same at
exit thresholds and depth budgets, zero-shot tasks, depth statistics, chat statistics. `evaluation_tables` prints it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.config import ActConfig
from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import InputError, UsageError
from rlm_engine.version import __version__
from rlm_training.chat_statistics import MAX_TOKENS, chat_statistics
from rlm_training.depth_statistics import compare_with_random, depth_statistics
from rlm_training.heldout import Window, read_heldout, windows_of
from rlm_training.perplexity import DocumentSums, document_sums, domain_result, macro_result
from rlm_training.scoring import Run, Scorer, Scores
from rlm_training.tasks import evaluate_task, macro_accuracy, read_task

PROTOCOL = (
    "Non-overlapping windows of the model's context with the start token (<bos>, else end of text) in front, not "
    "predicted; every other token of a document is predicted once; losses summed in float64; conversations in the "
    "model's chat format with all their tokens; bits per byte over the UTF-8 bytes of the texts; intervals: 95 %, "
    "1000 bootstrap resamples of documents. Routers see each token's prefix unless marked teacher-forced."
)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    ``heldout``: files or folders. ``max_tokens``: per domain at most, a seeded choice of windows (0: all).
    ``thresholds``: halting thresholds (act only). ``depths``: budgets of recurrences or passes (None: 1..max_depth).
    ``tasks``: task files; ``task_limit`` items of each at most (0: all).
    ``chat_prompts``: prompts for chat statistics (none: left out); ``chat_seeds``: one sampled reply each per prompt.
    ``random_depth_seeds``: shuffles of the learned depths to compare with (act on torch).
    """

    heldout: tuple[Path, ...] = ()
    max_tokens: int = 20_000
    thresholds: tuple[float, ...] = (0.5, 0.9, 0.99)
    depths: tuple[int, ...] | None = None
    tasks: tuple[Path, ...] = ()
    task_limit: int = 0
    chat_prompts: tuple[str, ...] = ()
    chat_seeds: tuple[int, ...] = (1,)
    chat_max_tokens: int = MAX_TOKENS
    random_depth_seeds: tuple[int, ...] = (1, 2, 3)
    seed: int = 0


def evaluate(scorer: Scorer, plan: Plan, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure what the plan asks for. Raises UsageError for a plan without content, InputError for unusable files."""
    if plan.max_tokens < 0 or plan.task_limit < 0:
        raise UsageError("the numbers of tokens and items must not be negative; 0 means all")
    if not (plan.heldout or plan.tasks or plan.chat_prompts):
        raise UsageError("nothing to evaluate: give --heldout, --tasks or --chat-prompts")
    model = scorer.model
    for depth in plan.depths or ():
        if not 1 <= depth <= model.max_depth:
            raise UsageError(f"depth budget {depth} is not between 1 and the model's {model.max_depth}")
    result: dict[str, Any] = {
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "model": {
            "name": model.name,
            "architecture": model.config.architecture,
            "parameters": model.parameters,
            "context_length": model.config.context_length,
            "max_depth": model.max_depth,
            "backend": model.backend_name,
            "precision": scorer.precision,
        },
    }
    tasks = [read_task(path) for path in task_files(plan.tasks)]  # before the long part, so that errors come first
    if plan.heldout:
        result |= _heldout(scorer, plan, progress)
    if tasks:
        result["tasks"] = {task.name: evaluate_task(task, scorer, plan.task_limit, progress=progress) for task in tasks}
        result["tasks_macro"] = macro_accuracy(result["tasks"])
    if plan.chat_prompts:
        result["chat"] = chat_statistics(model, plan.chat_prompts, plan.chat_seeds, plan.chat_max_tokens, progress)
    return result


def task_files(paths: Sequence[Path]) -> list[Path]:
    """Task files; a folder stands for its .jsonl files. Raises InputError when one is missing or named twice."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise InputError(f"{path}: no task file (.jsonl) here")
        files += found
    names = [path.name for path in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two task files are called {twice}; rename one")
    return files


def _heldout(scorer: Scorer, plan: Plan, progress: Callable[[str], None] | None) -> dict[str, Any]:
    model = scorer.model
    found = read_heldout(plan.heldout, model)
    windows = {domain.name: windows_of(domain, model, plan.max_tokens, plan.seed) for domain in found.domains}
    settings: list[dict[str, Any]] = []
    full, scores = _setting(scorer, windows, "full depth", Run(), plan.seed, progress, entropy=True)
    settings.append(full)
    for label, run in _runs(scorer, plan):
        if run == Run(Depth(max_steps=model.max_depth)):  # no budget at all: measured above
            settings.append(full | {"label": label, "max_steps": model.max_depth})
        else:
            settings.append(_setting(scorer, windows, label, run, plan.seed, progress)[0])
    result: dict[str, Any] = {
        "protocol": PROTOCOL,
        "max_tokens_per_domain": plan.max_tokens,
        "skipped": found.skipped,
        "heldout": settings,
        "depth": depth_statistics(scores),
    }
    if scorer.module is not None and isinstance(model.config, ActConfig) and plan.random_depth_seeds:
        random = compare_with_random(scorer, windows, scores, plan.random_depth_seeds, progress)
        result["depth"]["random"] = random
    return result


def _runs(scorer: Scorer, plan: Plan) -> list[tuple[str, Run]]:
    """Every way to run the model besides the usual one, with its label."""
    model = scorer.model
    runs = []
    act = isinstance(model.config, ActConfig)
    if not act and scorer.module is not None:
        runs.append(("teacher-forced", Run(routing="teacher-forced")))
    if act:
        runs += [(f"threshold {value:g}", Run(Depth(halt_threshold=value))) for value in plan.thresholds]
    depths = range(1, model.max_depth + 1) if plan.depths is None else plan.depths
    # ACT: no halting but where the probabilities reach 1, after which more recurrences would have no weight
    threshold = 1.0 if act else None
    runs += [(f"depth {value}", Run(Depth(max_steps=value, halt_threshold=threshold))) for value in depths]
    return runs


def _setting(
    scorer: Scorer,
    windows: dict[str, list[Window]],
    label: str,
    run: Run,
    seed: int,
    progress: Callable[[str], None] | None,
    entropy: bool = False,
) -> tuple[dict[str, Any], dict[str, list[Scores]]]:
    """One way of running the model over all domains."""
    scores: dict[str, list[Scores]] = {}
    domains: dict[str, dict[str, Any]] = {}
    sums: dict[str, DocumentSums] = {}
    for name, several in windows.items():
        if progress:
            progress(f"{label}: {name}")
        scores[name] = scorer.score([w.passage for w in several], run, entropy=entropy)
        sums[name] = document_sums(several, scores[name])
        domains[name] = domain_result(sums[name], seed) | _replies(several, scores[name])
    result = {
        "label": label,
        "max_steps": run.depth.max_steps,
        "threshold": run.depth.halt_threshold,
        "routing": run.routing,
        "domains": domains,
        "macro": macro_result(domains, sums, seed),
    }
    return result, scores


def _replies(windows: Sequence[Window], scores: Sequence[Scores]) -> dict[str, Any]:
    """What the assistant wrote, on its own: the loss fine-tuning minimises. Empty for texts."""
    pairs = [(w.reply, s.logprob) for w, s in zip(windows, scores, strict=True) if w.reply is not None]
    tokens = sum(int(reply.sum()) for reply, _ in pairs)
    if not tokens:
        return {}
    nats = -sum(float(logprob[reply].sum()) for reply, logprob in pairs)
    return {"reply_tokens": tokens, "reply_perplexity": float(np.exp(nats / tokens))}
