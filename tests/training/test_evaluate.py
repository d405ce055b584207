"""Held-out perplexity: known answers, windows, intervals, settings, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_scoring import (
    CHAT,
    END,
    VOCABULARY,
    ByteTokenizer,
    byte_act,
    byte_router,
    byte_scorer,
    scorer_of,
    uniform_scorer,
)

from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import ActConfig
from rlm_engine.errors import InputError, UsageError
from rlm_engine.sampling import log_softmax
from rlm_training.cli import main
from rlm_training.evaluate import Plan, evaluate
from rlm_training.evaluation_tables import format_evaluation
from rlm_training.heldout import Domain, HeldoutDocument, read_heldout, windows_of
from rlm_training.perplexity import DocumentSums, bootstrap_losses, domain_result, macro_result, paired_difference

TEXTS = ["The cat sat on the mat.", "Rain fell all day long, and nobody went out.", "é", "One two three four.", "Go!"]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def heldout_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 2), encoding="utf-8")
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    return folder


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(tmp_path: Path) -> None:
    result = evaluate(uniform_scorer(), Plan(heldout=(heldout_folder(tmp_path),)))
    for setting in result["heldout"]:
        for domain in setting["domains"].values():
            assert domain["perplexity"] == pytest.approx(VOCABULARY)
        assert setting["macro"]["mean_perplexity"] == pytest.approx(VOCABULARY)
        assert setting["macro"]["perplexity_of_mean_loss"] == pytest.approx(VOCABULARY)
    prose = result["heldout"][0]["domains"]["prose"]
    assert prose["tokens"] == prose["bytes"] == 2 * sum(len(t.encode()) for t in TEXTS)  # a byte is a token
    assert prose["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY))
    talk = result["heldout"][0]["domains"]["talk"]
    ids, mask = encode_chat_with_mask(TALK, ByteTokenizer(), CHAT)
    assert (talk["tokens"], talk["reply_tokens"], talk["bytes"]) == (len(ids), sum(mask), len("HiHello!"))


def test_perplexity_equals_scoring_every_prefix_alone(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n", encoding="utf-8")
    scorer = byte_scorer(7, context=16)
    result = evaluate(scorer, Plan(heldout=(tmp_path / "one.jsonl",), random_depth_seeds=()))
    assert scorer.module is not None
    ids, nats = list(TEXTS[1].encode()), 0.0
    for start in range(0, len(ids), 16):
        window = [END, *ids[start : start + 16]]
        for t in range(1, len(window)):
            with torch.no_grad():
                logits = scorer.module.head(scorer.module(torch.tensor([window[:t]])).hidden)
            nats -= float(log_softmax(logits[0, -1].numpy())[window[t]])
    domain = result["heldout"][0]["domains"]["one"]
    assert domain["nats"] == pytest.approx(nats, abs=1e-8)
    assert domain["perplexity"] == pytest.approx(math.exp(nats / len(ids)))
    assert domain["perplexity_ci95"] is None  # one document says nothing about the spread


def test_both_macro_definitions() -> None:
    sums = {
        name: DocumentSums(np.array([nats]), np.array([10.0]), np.array([30.0]), np.array([40.0]))
        for name, nats in (("a", 10 * math.log(4)), ("b", 10 * math.log(16)))
    }
    domains = {name: domain_result(one) for name, one in sums.items()}
    macro = macro_result(domains, sums)
    assert macro["perplexity_of_mean_loss"] == pytest.approx(8.0)  # the geometric mean of 4 and 16
    assert macro["mean_perplexity"] == pytest.approx(10.0)
    assert macro["perplexity_all_tokens"] == pytest.approx(8.0)
    assert domains["a"]["bits_per_byte"] == pytest.approx(2 * 10 / 40)
    assert domains["a"]["mean_depth"] == 3.0


def test_bootstrap_interval_covers_the_standard_error_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.5, 400)
    ones = np.ones(400)
    sums = DocumentSums(losses, ones, ones, ones)
    drawn = bootstrap_losses(sums)
    assert drawn is not None
    assert drawn.std() == pytest.approx(losses.std() / 20, rel=0.1)
    low, high = domain_result(sums)["perplexity_ci95"]
    assert low < math.exp(losses.mean()) < high
    shifted = DocumentSums(losses + 0.1, ones, ones, ones)
    difference = paired_difference(sums, shifted)
    assert difference["nats"] == pytest.approx(0.1)
    assert difference["ci95"] == pytest.approx([0.1, 0.1])  # paired: the documents' own spread cancels


def test_windows_predict_every_token_once_and_are_chosen_by_seed() -> None:
    model = byte_scorer(context=8).model
    documents = [HeldoutDocument(np.arange(1, n + 1), n) for n in (3, 8, 21)]
    domain = Domain("d", documents)
    windows = windows_of(domain, model)
    for number, document in enumerate(documents):
        own = [w for w in windows if w.document == number]
        np.testing.assert_array_equal(np.concatenate([w.passage.targets for w in own]), document.ids)
        assert all(w.passage.inputs[0] == END for w in own)
        assert sum(w.size_bytes for w in own) == pytest.approx(document.size_bytes)
    some = windows_of(domain, model, max_tokens=16, seed=4)
    assert 0 < sum(len(w.passage) for w in some) <= 16
    assert [w.passage.targets[0] for w in some] == [
        w.passage.targets[0] for w in windows_of(domain, model, max_tokens=16, seed=4)
    ]


def test_routers_are_reported_causal_and_teacher_forced(tmp_path: Path) -> None:
    for design in ("blend", "routed", "mixture"):
        scorer = scorer_of(byte_router(design), ByteTokenizer())
        result = evaluate(scorer, Plan(heldout=(heldout_folder(tmp_path),), depths=(1,)))
        settings = {one["label"]: one for one in result["heldout"]}
        assert list(settings) == ["full depth", "teacher-forced", "depth 1"]
        assert settings["full depth"]["routing"] == "causal"
        assert settings["teacher-forced"]["macro"]["loss"] != settings["full depth"]["macro"]["loss"]
        assert result["skipped"] == {"talk": "conversations, and the model has no chat format"}
        assert "random" not in result["depth"]


def test_depth_budgets_and_thresholds_of_act(tmp_path: Path) -> None:
    scorer = byte_scorer(2)
    result = evaluate(scorer, Plan(heldout=(heldout_folder(tmp_path),), thresholds=(0.5,), random_depth_seeds=(1,)))
    settings = {one["label"]: one for one in result["heldout"]}
    assert list(settings) == ["full depth", "threshold 0.5", *(f"depth {n}" for n in range(1, 6))]
    depths = [settings[f"depth {n}"]["macro"]["mean_depth"] for n in range(1, 6)]
    assert depths[0] == 1.0 and depths == sorted(depths)
    assert depths[-1] >= settings["full depth"]["macro"]["mean_depth"]  # no threshold but that of a full weight
    assert settings["threshold 0.5"]["macro"]["mean_depth"] < settings["full depth"]["macro"]["mean_depth"]
    text = format_evaluation(result)
    for expected in (
        "held-out text",
        "macro: exp(mean loss)",
        "threshold 0.5",
        "correlation with surprisal",
        "shuffled",
    ):
        assert expected in text
    with pytest.raises(UsageError, match="depth budget 9"):
        evaluate(scorer, Plan(heldout=(tmp_path,), depths=(9,)))
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(scorer, Plan())


def test_prepared_shards_give_the_same_numbers_as_their_text(tmp_path: Path) -> None:
    """The shards' own tokenizer is GPT-2's; here its index is written by hand around byte tokens."""
    ids = np.concatenate([np.array([*t.encode(), END]) for t in TEXTS]).astype(np.uint16)
    ends = np.cumsum([0, *(len(t.encode()) + 1 for t in TEXTS)])
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    ids.tofile(prepared / "prose.bin")
    np.save(prepared / "prose.docs.npy", ends.astype(np.int64))
    facts = {"documents": len(TEXTS), "tokens": len(ids), "sha256": "", "chat": False}
    index = {"tokenizer": "none", "added_tokens": [], "sources": {"prose": facts}}
    (prepared / "index.json").write_text(json.dumps(index), encoding="utf-8")
    raw = tmp_path / "prose.jsonl"
    raw.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    model = byte_scorer().model
    (one,), (two,) = read_heldout([prepared], model).domains, read_heldout([raw], model).domains
    assert one.name == two.name
    for a, b in zip(one.documents, two.documents, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert a.size_bytes == b.size_bytes
    (prepared / "index.json").write_text(json.dumps(index | {"tokenizer": "gpt2"}), encoding="utf-8")
    with pytest.raises(InputError, match="prepared with tokenizer 'gpt2'"):
        read_heldout([prepared], model)


def test_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = byte_act(1, context=32).float()
    values = small.config.to_dict() | {"vocab_size": 50257, "eos_token_id": 50256, "tokenizer": "gpt2"}
    values.pop("architecture")
    config = ActConfig(**(values | {"added_tokens": (), "chat_format": None}))
    tensors = small.state_dict() | {"embedding.weight": torch.randn(50257, 16)}
    write_model_directory(tmp_path / "m", config, tensors)
    folder = heldout_folder(tmp_path / "texts")
    out = tmp_path / "out" / "evaluation.json"
    command = ["evaluate", str(tmp_path / "m"), "--heldout", str(folder), "--depths", "1-2", "--thresholds", "0.9"]
    assert (
        main([*command, "--json", str(out), "--tasks", str(Path(__file__).parent.parent / "data/eval/copa.jsonl")]) == 0
    )
    printed = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [one["label"] for one in result["heldout"]] == ["full depth", "threshold 0.9", "depth 1", "depth 2"]
    assert result["tasks"]["copa"]["items"] == 5
    assert "prose" in printed and "copa" in printed and "left out: talk" in printed
    assert main([*command, "--json", str(tmp_path)]) == 2  # before anything is computed
    assert "is a folder" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "-5"]) == 2
    assert "must not be negative" in capsys.readouterr().err
    assert main([*command, "--depths", "one"]) == 2
    assert "--depths: 'one'" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "m"), "--heldout", str(tmp_path / "missing")]) == 4
