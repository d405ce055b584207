"""Zero-shot tasks by log-likelihood: reads JSON Lines files, tells their format by their keys, scores them.

Formats (one JSON object a line):

    choice    {"context", "choices", "gold"}: which choice is likeliest after the context
    pair      the same with an empty context: which whole sentence is likelier (BLiMP, Zorro)
    cloze     {"context", "target"}, or {"text"} in a file called lambada*: the target (the last word)
    partial   {"contexts", "target", "gold"}, or Winogrande's {"sentence" with _, "option1", "option2", "answer"}:
              after which context the same ending is likeliest
    text      {"text"}: perplexity of whole documents

The start token (see `scoring`) stands in front of everything. Context and continuation are tokenized together and cut
where the context's own tokens end, as lm-evaluation-harness does; contexts too long lose their beginning. An item
counts as right only if the gold candidate is strictly better than all others: ties are wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.errors import InputError
from rlm_engine.generate import Model
from rlm_training.heldout import Domain, HeldoutDocument, windows_of
from rlm_training.perplexity import document_sums, domain_result
from rlm_training.scoring import Passage, Run, Scorer, start_token

GROUPS = ("field", "phenomenon", "paradigm")  # keys whose values get an accuracy of their own


@dataclass(frozen=True)
class Item:
    """One question: candidates as (context, continuation) texts, and which is right."""

    candidates: tuple[tuple[str, str], ...]
    gold: int
    groups: dict[str, str]


@dataclass(frozen=True)
class Task:
    """A file of items of one kind. ``texts`` is filled for kind "text" only."""

    name: str
    kind: str
    items: list[Item]
    texts: list[str]


def read_task(path: Path) -> Task:
    """Read a task file and tell its kind. Raises InputError naming file and line when a record fits no format."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line breaks may stand in a JSON text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    items, texts, kind = [], [], ""
    name = path.name.removesuffix(".jsonl")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: not JSON") from None
        found = task_kind(record, name)
        if not found:
            raise InputError(f"{where}: fits no task format; see the keys in `rlm_training.tasks`")
        if kind and found != kind:
            raise InputError(f"{where}: is of kind {found!r}, the lines before of kind {kind!r}")
        kind = found
        if kind == "text":
            texts.append(record["text"])
        else:
            items.append(_item(record, kind, where))
    if not kind:
        raise InputError(f"{path}: holds no item")
    return Task(name, kind, items, texts)


def task_kind(record: Any, name: str = "") -> str:
    """The format of a record by its keys, "" for none. ``name``: of the file, which marks cloze texts."""
    if not isinstance(record, dict):
        return ""
    if isinstance(record.get("choices"), list) and isinstance(record.get("context"), str):
        return "choice" if record["context"] else "pair"
    if isinstance(record.get("contexts"), list) and isinstance(record.get("target"), str):
        return "partial"
    if {"sentence", "option1", "option2", "answer"} <= set(record):
        return "partial"
    if isinstance(record.get("context"), str) and isinstance(record.get("target"), str):
        return "cloze"
    if isinstance(record.get("text"), str):
        return "cloze" if name.lower().startswith("lambada") else "text"
    return ""


def evaluate_task(
    task: Task, scorer: Scorer, limit: int = 0, run: Run | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Accuracy with its standard error and the chance level; a cloze also has a perplexity; "text" has only that.

    ``limit``: a seeded random choice of so many items at most (0: all). ``acc_norm`` (kind "choice") divides each
    log-probability by the number of characters of the choice.
    """
    if task.kind == "text":
        return _evaluate_texts(task, scorer, limit, run)
    items = task.items
    if limit and len(items) > limit:
        order = np.random.default_rng(0).permutation(len(items))[:limit]
        items = [items[i] for i in sorted(order)]
    passages = [continuation(scorer.model, *candidate) for item in items for candidate in item.candidates]
    if progress:
        progress(f"{task.name}: {len(items)} items")
    scores = scorer.score(passages, run)
    totals = [float(score.logprob.sum()) for score in scores]
    result: dict[str, Any] = {"kind": task.kind, "items": len(items)}
    if task.kind == "cloze":
        right = np.array([bool(score.greedy.all()) for score in scores])
        result |= _accuracy("acc", right)
        result |= {"chance": 0.0, "perplexity": math.exp(-float(np.mean(totals)))}
        return result
    strict: list[bool] = []
    normalised: list[bool] = []
    position = 0
    for item in items:
        count = len(item.candidates)
        logprobs = totals[position : position + count]
        position += count
        lengths = [max(1, len(ending.strip())) for _, ending in item.candidates]
        strict.append(strictly_best(logprobs, item.gold))
        normalised.append(strictly_best([p / n for p, n in zip(logprobs, lengths, strict=True)], item.gold))
    result |= _accuracy("acc", np.array(strict))
    if task.kind == "choice":
        result |= _accuracy("acc_norm", np.array(normalised))
    result["chance"] = float(np.mean([1.0 / len(item.candidates) for item in items]))
    for key in GROUPS:
        named = [item.groups.get(key, "") for item in items]
        if any(named):
            result[f"by_{key}"] = {
                group: float(np.mean([r for r, n in zip(strict, named, strict=True) if n == group]))
                for group in sorted(set(named) - {""})
            }
    return result


def macro_accuracy(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Unweighted mean accuracy over the tasks that have one, with standard error and chance; None without any.

    A task's normalised accuracy is taken where it has one, as is usual for multiple choice.
    """
    found = [result for result in results.values() if "acc" in result]
    if not found:
        return None
    values = [result.get("acc_norm", result["acc"]) for result in found]
    errors = [result.get("acc_norm_stderr", result["acc_stderr"]) for result in found]
    return {
        "tasks": len(found),
        "acc": float(np.mean(values)),
        "acc_stderr": float(np.sqrt(np.sum(np.square(errors))) / len(found)),
        "chance": float(np.mean([result["chance"] for result in found])),
    }


def continuation(model: Model, context: str, ending: str) -> Passage:
    """The passage that scores ``ending`` after ``context``. Raises InputError when the ending has no token.

    Spaces at the context's end are moved to the ending, where GPT-2's tokens have them. An ending longer than the
    model's context is scored from its end as far as fits.
    """
    if model.tokenizer is None:
        raise InputError(f"model {model.name!r} has no tokenizer, so no task can be evaluated")
    kept = context.rstrip(" ")
    whole = model.tokenizer.encode(kept + context[len(kept) :] + ending)
    first = len(model.tokenizer.encode(kept)) if kept else 0
    if first >= len(whole):
        raise InputError(f"the continuation {ending!r} adds no token to its context")
    ids = np.asarray([start_token(model), *whole], dtype=np.int64)
    left_out = max(0, len(ids) - 1 - model.config.context_length)
    return Passage(ids[left_out:-1], ids[left_out + 1 :], max(0, first - left_out))


def strictly_best(values: Sequence[float], gold: int) -> bool:
    """Whether values[gold] is greater than every other."""
    return all(values[gold] > value for i, value in enumerate(values) if i != gold)


def _accuracy(name: str, right: np.ndarray) -> dict[str, float]:
    """Mean, and the standard error of the mean from the sample variance (n - 1)."""
    mean = float(np.mean(right))
    count = len(right)
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else math.nan}


def _evaluate_texts(task: Task, scorer: Scorer, limit: int, run: Run | None) -> dict[str, Any]:
    model = scorer.model
    if model.tokenizer is None:
        raise InputError(f"model {model.name!r} has no tokenizer, so no task can be evaluated")
    texts = task.texts[:limit] if limit else task.texts
    documents = [
        HeldoutDocument(np.asarray(model.tokenizer.encode(text), dtype=np.int64), len(text.encode())) for text in texts
    ]
    windows = windows_of(Domain(task.name, documents), model)
    result = domain_result(document_sums(windows, scorer.score([w.passage for w in windows], run)))
    words = sum(len(text.split()) for text in texts)
    return {"kind": "text", "items": len(texts)} | result | {"word_perplexity": math.exp(result["nats"] / words)}


def _item(record: dict[str, Any], kind: str, where: str) -> Item:
    groups = {key: str(record[key]) for key in GROUPS if key in record}
    try:
        if kind in ("choice", "pair"):
            candidates = [(record["context"], choice) for choice in record["choices"]]
            gold = record["gold"]
        elif kind == "partial" and "contexts" in record:
            candidates = [(context, record["target"]) for context in record["contexts"]]
            gold = record["gold"]
        elif kind == "partial":
            before, after = record["sentence"].split("_", 1)
            candidates = [(before + record[key], after) for key in ("option1", "option2")]
            gold = int(record["answer"]) - 1
        elif "target" in record:
            candidates, gold = [(record["context"], record["target"])], 0
        else:
            before, word = record["text"].rstrip().rsplit(" ", 1)
            candidates, gold = [(before, " " + word)], 0
        good = all(isinstance(text, str) for candidate in candidates for text in candidate)
        if not good or not isinstance(gold, int) or not 0 <= gold < len(candidates):
            raise ValueError
    except (KeyError, ValueError, AttributeError, TypeError):
        raise InputError(f"{where}: damaged item of kind {kind!r}") from None
    if kind != "cloze" and len(candidates) < 2:
        raise InputError(f"{where}: needs at least two candidates")
    return Item(tuple(candidates), gold, groups)
