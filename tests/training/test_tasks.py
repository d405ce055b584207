"""Zero-shot tasks: formats, the scorer against an independent computation, known answers, standard errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scoring import END, ByteTokenizer, byte_act, byte_scorer, scorer_of, uniform_scorer

from rlm_engine.errors import InputError
from rlm_engine.sampling import log_softmax
from rlm_training.scoring import Scorer
from rlm_training.tasks import (
    Item,
    Task,
    continuation,
    evaluate_task,
    macro_accuracy,
    read_task,
    strictly_best,
    task_kind,
)

EVAL = Path(__file__).parent.parent / "data" / "eval"
KINDS = {
    "arc_easy": "choice", "blimp_50": "pair", "cloze": "cloze", "commonsense_qa": "choice", "copa": "choice",
    "hellaswag_1000": "choice", "lambada": "cloze", "openbook_qa": "choice", "piqa": "choice",
    "wikitext2_valid": "text", "winogrande": "partial", "zorro_50": "pair",
}  # fmt: skip


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return byte_scorer(11, context=320)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_format_is_told_by_its_keys_and_evaluated(name: str, scorer: Scorer) -> None:
    task = read_task(EVAL / f"{name}.jsonl")
    assert task.kind == KINDS[name]
    result = evaluate_task(task, scorer)
    if task.kind == "text":
        assert result["word_perplexity"] > result["perplexity"] > 1.0
    else:
        assert 0.0 <= result["acc"] <= 1.0
        expected = {"cloze": 0.0, "pair": 0.5, "partial": 0.5}.get(task.kind)
        assert result["chance"] == (pytest.approx(1 / len(task.items[0].candidates)) if expected is None else expected)
        assert ("acc_norm" in result) == (task.kind == "choice")


def plain_logprob(module: Any, ids: list[int], scored: int) -> float:
    """The last ``scored`` ids given those before, one plain forward per prefix, softmax in float64 numpy."""
    total = 0.0
    for t in range(len(ids) - scored, len(ids)):
        with torch.no_grad():
            logits = module.head(module(torch.tensor([ids[:t]])).hidden)[0, -1]
        total += float(log_softmax(logits.numpy())[ids[t]])
    return total


def test_scores_of_real_items_equal_an_independent_computation(scorer: Scorer) -> None:
    for name in ("copa", "openbook_qa"):
        task = read_task(EVAL / f"{name}.jsonl")
        for item in task.items[:1]:
            expected, normalised = [], []
            for context, ending in item.candidates:
                ids = [END, *context.encode(), *ending.encode()]
                value = plain_logprob(scorer.module, ids, len(ending.encode()))
                expected.append(value)
                normalised.append(value / len(ending.strip()))
            got = [
                float(s.logprob.sum()) for s in scorer.score([continuation(scorer.model, *c) for c in item.candidates])
            ]
            assert got == pytest.approx(expected, abs=1e-8)
            result = evaluate_task(Task(name, "choice", [item], []), scorer)
            assert result["acc"] == (int(np.argmax(expected)) == item.gold)
            assert result["acc_norm"] == (int(np.argmax(normalised)) == item.gold)


def test_minimal_pairs_score_whole_sentences_and_ties_are_wrong(scorer: Scorer) -> None:
    task = read_task(EVAL / "blimp_50.jsonl")
    del task.items[2:]
    right = []
    for item in task.items:
        values = [
            plain_logprob(scorer.module, [END, *text.encode()], len(text.encode())) for _, text in item.candidates
        ]
        right.append(values[item.gold] > values[1 - item.gold])
    result = evaluate_task(task, scorer)
    assert result["acc"] == pytest.approx(np.mean(right))
    assert result["by_paradigm"].keys() == {item.groups["paradigm"] for item in task.items}
    same = Item((("", "one and the same"), ("", "one and the same")), 0, {})
    assert evaluate_task(Task("tie", "pair", [same], []), scorer)["acc"] == 0.0
    assert not strictly_best([1.0, 1.0], 0) and strictly_best([1.0, 0.5], 0)


def table_scorer(likely: str) -> Scorer:
    """A real model whose output strongly prefers the letters of ``likely``: their table rows share one direction."""
    module = byte_act(0, context=64)
    with torch.no_grad():
        module.embedding.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        module.halt.bias.fill_(9.0)
        for byte in set(likely.encode()):
            module.embedding.weight[byte, 0] += 3.0
        # whatever was read, the state the head sees points that way
        module.gain_final.copy_(torch.zeros(16, dtype=torch.float64))
        module.gain_final[0] = 1.0
        module.embedding.weight[:, 0].abs_()
        module.block.gain_attn_out.zero_()
        module.block.gain_mlp_out.zero_()
        module.block.inject.fill_(1.0)
        module.gain_in.zero_()
        module.gain_in[0] = 1.0
    return scorer_of(module, ByteTokenizer())


def test_known_answers() -> None:
    scorer = table_scorer("ab")
    choice = Item((("a", "aaa"), ("a", "xyz")), 0, {})
    wrong = Item((("a", "aaa"), ("a", "xyz")), 1, {})
    result = evaluate_task(Task("known", "choice", [choice, choice, choice, wrong], []), scorer)
    assert result["acc"] == 0.75
    assert result["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    # the longer choice has more log-probability to lose, the normalised accuracy forgives it
    longer = Item((("a", "ab" * 20), ("a", "x")), 0, {})
    result = evaluate_task(Task("known", "choice", [longer], []), scorer)
    assert (result["acc"], result["acc_norm"]) == (0.0, 1.0)
    assert math.isnan(result["acc_stderr"])
    partial = Item((("bb", "x"), ("xx", "x")), 0, {})
    assert evaluate_task(Task("same", "partial", [partial], []), scorer)["items"] == 1


def test_cloze_needs_every_token_of_the_word_and_has_a_perplexity() -> None:
    uniform = uniform_scorer(context=128)
    result = evaluate_task(read_task(EVAL / "cloze.jsonl"), uniform)
    assert result["acc"] == 0.0
    assert result["perplexity"] == pytest.approx(259.0 ** len(" cold"))
    item = read_task(EVAL / "lambada.jsonl").items[1]
    assert item.candidates == (("She put the kettle on and took two cups, because she wanted to drink some", " tea"),)


def test_context_and_continuation() -> None:
    model = byte_scorer(context=8).model
    passage = continuation(model, "abc", " de")
    assert passage.inputs.tolist() == [END, *b"abc d"] and passage.targets.tolist() == [*b"abc de"]
    assert passage.first == 3 and len(passage) == 3
    moved = continuation(model, "abc ", "de")  # a space at the end belongs to the continuation
    assert moved.first == 3
    cut = continuation(model, "a long context", " ab")
    assert len(cut.inputs) == 8 and cut.targets[cut.first :].tolist() == [*b" ab"]
    endless = continuation(model, "", "0123456789")
    assert endless.first == 0 and endless.targets.tolist() == [*b"23456789"]
    with pytest.raises(InputError, match="adds no token"):
        continuation(model, "abc", "")


def test_limit_is_a_fixed_choice_and_the_macro_mean_has_an_error(scorer: Scorer) -> None:
    task = read_task(EVAL / "copa.jsonl")
    assert evaluate_task(task, scorer, limit=3) == evaluate_task(task, scorer, limit=3)
    assert evaluate_task(task, scorer, limit=3)["items"] == 3
    macro = macro_accuracy({
        "a": {"acc": 0.4, "acc_stderr": 0.03, "acc_norm": 0.6, "acc_norm_stderr": 0.03, "chance": 0.25},
        "b": {"acc": 0.8, "acc_stderr": 0.04, "chance": 0.5},
        "c": {"perplexity": 3.0},
    })  # fmt: skip
    assert macro == {
        "tasks": 2, "acc": pytest.approx(0.7), "acc_stderr": pytest.approx(0.025), "chance": pytest.approx(0.375)
    }  # fmt: skip
    assert macro_accuracy({}) is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, "fits no task format"),
        ({"context": "a", "choices": ["b"], "gold": 0}, "two candidates"),
        ({"context": "a", "choices": ["b", "c"], "gold": 2}, "damaged"),
        ({"context": "a", "choices": ["b", 3], "gold": 0}, "damaged"),
        ({"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "damaged"),
    ],
)
def test_damaged_items_name_file_and_line(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"bad.jsonl, line 2.*{message}"):
        read_task(path)


def test_task_files_may_have_a_byte_order_mark_and_unicode_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert read_task(path).texts == ["a\u2028b", "c"]
    path.write_text('{"text": "a"}\n' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: not JSON"):
        read_task(path)


def test_a_file_is_of_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a"}\n{"context": "a", "target": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="'cloze', the lines before of kind 'text'"):
        read_task(path)
    assert task_kind(["no object"]) == ""
