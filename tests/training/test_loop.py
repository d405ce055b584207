"""Whole tiny runs: every design learns, what is frozen stays, what is averaged is written, bad losses stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import END, MODELS, run, text_ids, tiny_recipe, unigram_entropy, write_prepared

from rlm_engine.checkpoint import read_model_directory
from rlm_engine.errors import UsageError
from rlm_training import loop
from rlm_training.objectives import TokenObjective


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("architecture", MODELS)
def test_every_design_learns_more_than_word_frequencies(data: Path, tmp_path: Path, architecture: str) -> None:
    heldout = f"data.heldout={json.dumps(str(data))}"
    losses = run(tiny_recipe(data, architecture, "pretrain", heldout, "train.validate_every=16"), tmp_path)
    entropy = unigram_entropy(text_ids(20_000, 0))
    assert losses[0] > entropy
    assert np.mean(losses[-5:]) < 0.7 * entropy
    lines = _metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(32))
    assert all(sum(line["depth_histogram"]) == 128 for line in lines)
    validated = [line["heldout"] for line in lines if "heldout" in line]
    assert len(validated) == 2 and validated[-1]["text"] < 0.8 * entropy
    config, tensors = read_model_directory(tmp_path / "model")
    assert config.architecture == architecture and config.provenance["stage"] == "pretrain"
    best = read_model_directory(tmp_path / "best")[1]
    first, last = (sum(losses.values()) for losses in validated)
    same = all(np.array_equal(tensors[name], best[name]) for name in tensors)
    assert same == (last < first)  # `best` is the end of the run only if that validated best


@pytest.mark.parametrize("architecture", MODELS)
def test_sft_learns_replies(data: Path, tmp_path: Path, architecture: str) -> None:
    run(tiny_recipe(data, architecture, "pretrain", "train.most_steps=1"), tmp_path / "base")
    init = f"train.init={json.dumps(str(tmp_path / 'base' / 'model'))}"
    replay = ["data.replay=0.25", "data.mix={text = 1.0}", "train.tokens=2000"]
    losses = run(tiny_recipe(data, architecture, "sft", init, "train.most_steps=14", *replay), tmp_path / "sft")
    assert losses[-1] < losses[0] - 0.3


def test_frozen_embedding_stays(data: Path, tmp_path: Path) -> None:
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=1"), tmp_path / "a")
    init = f"train.init={json.dumps(str(tmp_path / 'a' / 'model'))}"
    run(tiny_recipe(data, "act", "sft", init, "train.most_steps=3", "train.freeze_embedding=true"), tmp_path / "b")
    before, after = (read_model_directory(tmp_path / n / "model")[1] for n in "ab")
    assert np.array_equal(before["embedding.weight"], after["embedding.weight"])
    assert not np.array_equal(before["block.wq.weight"], after["block.wq.weight"])


def test_only_the_halting_head_moves_in_its_phase(data: Path, tmp_path: Path) -> None:
    saved = ["train.checkpoint_minutes=0", "train.keep=9", "train.most_steps=6"]
    run(tiny_recipe(data, "act", "pretrain", "ponder.gate_from=0.5", *saved), tmp_path)
    states = [torch.load(tmp_path / f"checkpoint-{n:08}.pt")["model"] for n in (3, 6)]
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved == {"halt.weight", "halt.bias"}
    assert all(("gate_loss" in line) == (line["step"] >= 3) for line in _metrics(tmp_path))


def test_averaged_weights_are_written(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        data, "act", "pretrain", "train.average=0.9", "train.most_steps=4", "train.checkpoint_minutes=0", "train.keep=9"
    )
    run(recipe, tmp_path)
    mean: torch.Tensor | None = None
    for n in range(1, 5):
        weights = torch.load(tmp_path / f"checkpoint-{n:08}.pt")["model"]["block.wq.weight"]
        decay = min(0.9, n / (n + 9))
        if mean is None:
            first = torch.load(tmp_path / "checkpoint-00000001.pt")["average"]["mean"]["block.wq.weight"]
            mean = first
        else:
            mean = decay * mean + (1 - decay) * weights
    written = read_model_directory(tmp_path / "model")[1]["block.wq.weight"]
    assert mean is not None
    torch.testing.assert_close(torch.from_numpy(written), mean)
    assert not torch.equal(torch.from_numpy(written), weights)


@pytest.mark.parametrize(
    "option",
    [
        "precision='bfloat16'",
        pytest.param("precision='float16'", marks=pytest.mark.slow),  # CPUs are slow at it
        "recompute=true",
        "sampled_vocabulary=40",
    ],
)
def test_precisions_and_savings_train_nearly_the_same(data: Path, tmp_path: Path, option: str) -> None:
    plain = run(tiny_recipe(data, "act", "pretrain", "train.most_steps=3"), tmp_path / "plain")
    other = run(tiny_recipe(data, "act", "pretrain", "train.most_steps=3", f"train.{option}"), tmp_path / "other")
    assert other == pytest.approx(plain, rel=0.1)
    if option == "recompute=true":
        assert other == plain
    else:
        assert other != plain


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_bad_losses_are_skipped_and_then_stop_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    forward = TokenObjective.forward
    steps: list[int] = []

    def spoiled(self: TokenObjective, micro: Any, plan: Any) -> Any:
        loss, statistics = forward(self, micro, plan)
        if plan.step == 2 or plan.step >= 5:
            steps.append(plan.step)
            loss, statistics = loss * bad, {n: v * bad if n in ("loss", "total") else v for n, v in statistics.items()}
        return loss, statistics

    monkeypatch.setattr(TokenObjective, "forward", spoiled)
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 3)
    with pytest.raises(UsageError, match="lower learning rate"):
        run(tiny_recipe(data, "act", "pretrain", "train.checkpoint_minutes=0"), tmp_path)
    assert [line["step"] for line in _metrics(tmp_path)] == [0, 1, 3, 4]
    assert steps == [2, 5, 6, 7, 8]
    before, after = (torch.load(p)["model"] for p in sorted(tmp_path.glob("checkpoint-*.pt")))
    assert all(torch.equal(before[name], after[name]) for name in before)  # steps 6 and 7 changed nothing


def test_data_of_another_tokenizer_or_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prepared with tokenizer 'none'"):
        run(tiny_recipe(data, "act", "pretrain", "model.tokenizer='gpt2'"), tmp_path)
    with pytest.raises(UsageError, match="beyond the model's vocabulary of 40"):
        run(tiny_recipe(data, "act", "pretrain", "model.vocab_size=40"), tmp_path)
    assert END == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["act", "blend", "routed"])
def test_compiled_blocks_train_the_same(data: Path, tmp_path: Path, architecture: str) -> None:
    options = ["train.most_steps=4"]
    if architecture == "act":
        options.append("ponder.memory=[[0.0, 0], [0.5, 16]]")
    plain = run(tiny_recipe(data, architecture, "pretrain", *options), tmp_path / "plain")
    compiled = run(tiny_recipe(data, architecture, "pretrain", *options, "train.compile=true"), tmp_path / "compiled")
    if architecture == "act":
        assert compiled == pytest.approx(plain, rel=1e-3)
    else:  # dropout draws its numbers in another order
        assert compiled == pytest.approx(plain, rel=0.2)


def test_heldout_text_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    data, other = write_prepared(tmp_path / "data"), write_prepared(tmp_path / "other")
    for folder, digest in (data, "1"), (other, "2"):
        index = json.loads((folder / "index.json").read_text())
        (folder / "tokenizer.json").write_text(digest)
        (folder / "index.json").write_text(json.dumps(index | {"tokenizer_files": {"tokenizer.json": digest}}))
    heldout = f"data.heldout={json.dumps(str(other))}"
    with pytest.raises(UsageError, match=r"another tokenizer\.json"):
        run(tiny_recipe(data, "act", "pretrain", heldout), tmp_path / "run")


def test_the_models_chat_format_is_that_of_the_data(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    form = {"prefix": {"user": "Q: ", "assistant": "A: "}, "suffix": {"user": "\n"}, "stop": ["\n"]}
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=1"), tmp_path / "none")
    assert read_model_directory(tmp_path / "none" / "model")[0].chat_format is None
    (data / "index.json").write_text(json.dumps(index | {"chat_format": form}))
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=1"), tmp_path / "own")
    found = read_model_directory(tmp_path / "own" / "model")[0].chat_format
    assert found is not None and found.to_dict() == form
