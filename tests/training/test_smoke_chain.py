"""The smoke recipes from text to chat, with the commands a person types."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ANIMALS = ["cat", "dog", "bird", "horse", "fox", "mouse", "goat", "owl"]
PLACES = ["garden", "house", "forest", "river", "field", "road", "barn", "hill"]
VERBS = ["sleeps", "runs", "sings", "waits", "plays", "hides", "eats", "rests"]
COLOURS = ["red", "green", "blue", "white", "black", "grey", "brown", "yellow"]


def sentence(rng: random.Random) -> str:
    """A sentence of a tiny English: predictable enough to be learned in two hundred steps."""
    return f"The {rng.choice(COLOURS)} {rng.choice(ANIMALS)} {rng.choice(VERBS)} in the {rng.choice(PLACES)}."


def question(rng: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and a worse answer of about the same length."""
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    asked = f"The {animal} is in the {place}. Where is the {animal}?"
    return asked, f"The {animal} is in the {place}.", f"Nobody knows, ask a {rng.choice(ANIMALS)}."


def write_texts(folder: Path) -> None:
    """Texts, conversations and preference pairs; the same every time."""
    rng = random.Random(5)
    folder.mkdir()
    texts = [{"text": " ".join(sentence(rng) for _ in range(rng.randint(8, 20)))} for _ in range(500)]
    chats, pairs = [], []
    for _ in range(600):
        asked, good, _ = question(rng)
        chats.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": good}]})
    for _ in range(80):
        asked, good, bad = question(rng)
        pairs.append({"prompt": asked, "chosen": good, "rejected": bad})
    for name, records in ("texts", texts), ("talk", chats), ("pairs", pairs):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def command(folder: Path, *words: str) -> str:
    """Run one of the program's commands in a folder; what it printed."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def test_from_text_to_chat(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    command(
        tmp_path, "rlm_training", "prepare", "texts", "--out", "runs/smoke-data", "--filter", "none",
        "--keep-duplicates", "--heldout", "0.1", "--workers", "1",
    )  # fmt: skip
    began = time.monotonic()
    for stage, name in ("pretrain", "smoke"), ("sft", "smoke-sft"), ("dpo", "smoke-dpo"):
        more = ("--set", "data.heldout='runs/smoke-data/heldout'") if stage == "pretrain" else ()
        command(tmp_path, "rlm_training", stage, "--recipe", name, "--out", f"runs/{name}", *more)
    print(f"three stages: {time.monotonic() - began:.0f} s")

    runs = tmp_path / "runs"
    pretrain, sft, dpo = (metrics(runs / name) for name in ("smoke", "smoke-sft", "smoke-dpo"))
    assert mean(pretrain[:5], "loss") > 9 and mean(pretrain[-20:], "loss") < 3.5
    unigram = json.loads((runs / "smoke" / "data.json").read_text(encoding="utf-8"))["unigram"]
    heldout = pretrain[-1]["heldout"]
    assert set(heldout) == set(unigram) and all(heldout[name] < unigram[name] - 0.5 for name in heldout)
    assert "gate_loss" in pretrain[-1] and "gate_loss" not in pretrain[100], "the halting head's phase comes last"
    late = [row["depth"] for row in pretrain if row["budget"] == 4]
    assert late and all(2.0 <= depth <= 4.0 for depth in late)
    assert mean(sft[-10:], "loss") < mean(sft[:5], "loss")
    assert abs(dpo[0]["margin"]) < 1e-3, "the policy begins as its reference"
    assert mean(dpo[-5:], "margin") > 1.0 and dpo[-1]["accuracy"] == 1.0

    model = "runs/smoke-dpo/model"
    command(
        tmp_path, "rlm_training", "evaluate", model, "--heldout", "runs/smoke-data/heldout", "--max-tokens", "1500",
        "--depths", "2,4", "--json", "runs/evaluation.json",
    )  # fmt: skip
    evaluation = json.loads((runs / "evaluation.json").read_text(encoding="utf-8"))
    macro = evaluation["heldout"][0]["macro"]
    assert 1.0 < macro["perplexity_of_mean_loss"] < 1000 and 0 < macro["bits_per_byte"] < 4
    assert 2.0 <= macro["mean_depth"] <= 4.0
    for name in ("smoke", "smoke-sft", "smoke-dpo"):
        command(tmp_path, "rlm_training", "report", f"runs/{name}")
        assert "<svg" in (runs / name / "report.html").read_text(encoding="utf-8")

    command(tmp_path, "rlm_chat", "export", "onnx", model, "--precision", "int8")
    manifest = json.loads((tmp_path / model / "onnx" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["precision"] == "int8"
    asked = "The owl is in the barn. Where is the owl?"
    printed = command(
        tmp_path, "rlm_chat", "chat", asked, "--model", model, "--backend", "onnx", "--greedy", "--max-tokens", "12",
        "--json",
    )  # fmt: skip
    *tokens, summary = (json.loads(line) for line in printed.splitlines())
    assert tokens and all(2 <= token["depth"] <= 4 for token in tokens if "depth" in token)
    reply = "".join(token["text"] for token in tokens if token["type"] == "token").strip()
    form = rf"The ({'|'.join(ANIMALS)}) is in the ({'|'.join(PLACES)})\."
    assert re.fullmatch(form, reply), reply  # an answer as it was taught, ended by itself
    assert summary["stop_reason"] == "end_of_turn"
