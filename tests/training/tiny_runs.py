"""Tiny prepared data and recipes: real training runs that take a second."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.config import ModelConfig, config_from_dict
from rlm_training.display import Display, Silent
from rlm_training.recipe import Recipe, load_recipe
from rlm_training.stages import train

VOCABULARY, END = 64, 0
USER, ASSISTANT = 62, 63
MODELS = {
    "act": 'architecture = "act"\nffn = 48\nmax_steps = 4\nd_model = 32\nn_heads = 2\n',
    "blend": 'architecture = "blend"\nn_layers = 2\nmax_steps = 2\nd_model = 32\nn_heads = 2\n',
    "routed": 'architecture = "routed"\nn_layers = 2\nffn = 48\nd_model = 32\nn_heads = 2\npad_token_id = 0\n',
    "mixture": 'architecture = "mixture"\nn_layers = 2\nffn = 48\nmax_steps = 2\nd_model = 32\nn_heads = 2\n',
}
SIZES = f'vocab_size = {VOCABULARY}\neos_token_id = {END}\ncontext_length = 64\ntokenizer = "none"\n'
STAGES = {
    "pretrain": "[train]\ntokens = 4096\nsequence = 16\nrows = 8\n",
    "sft": "[train]\nsequence = 24\nrows = 4\n",
    "dpo": "[train]\nsequence = 24\nrows = 4\n",
}
COMMON = 'precision = "float32"\nvalidate_every = 0\ndevice = "cpu"\n'


def text_ids(tokens: int, seed: int) -> np.ndarray:
    """A text with structure to learn: each id is one of two successors of the one before; documents of 20 to 60."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(99).integers(1, 60, (60, 2))
    ids, current = [], 1
    until = int(rng.integers(20, 60))
    while len(ids) < tokens:
        until -= 1
        current = int(successors[current, rng.integers(2)])
        ids.append(END if until == 0 else current)
        until = until or int(rng.integers(20, 60))
    return np.asarray(ids, dtype=np.uint16)


def unigram_entropy(ids: np.ndarray) -> float:
    """Nats per token of the best model that ignores context."""
    p = np.bincount(ids) / len(ids)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def write_prepared(folder: Path, tokens: int = 20_000) -> Path:
    """A prepared folder with a text, conversations and preference pairs, written as `rlm-train prepare` would."""
    folder.mkdir(parents=True)
    sources: dict[str, Any] = {}

    def add(name: str, kind: str, documents: list[tuple[list[int], list[int]]]) -> None:
        ids = np.asarray([i for d, _ in documents for i in d], dtype=np.uint16)
        ids.tofile(folder / f"{name}.bin")
        np.save(folder / f"{name}.docs.npy", np.cumsum([0, *(len(d) for d, _ in documents)]))
        if kind != "text":
            np.asarray([m for _, mask in documents for m in mask], dtype=np.uint8).tofile(folder / f"{name}.mask.bin")
        facts = {"documents": len(documents), "tokens": len(ids), "kind": kind, "chat": kind != "text"}
        sources[name] = facts | {"sha256": hashlib.sha256(ids.tobytes()).hexdigest()}

    ids = text_ids(tokens, 0).tolist()
    ends = [0, *(i + 1 for i, token in enumerate(ids) if token == END)]
    add("text", "text", [(ids[a:b], []) for a, b in itertools.pairwise(ends)])
    rng = np.random.default_rng(1)
    chats, pairs = [], []
    for _ in range(200):
        word = int(rng.integers(1, 60))
        prompt = [USER, word, word, ASSISTANT]
        good, bad = [word, word + 1, word + 2, END], [60, 61, 60, END]
        chats.append((prompt + good, [0] * 4 + [1] * 4))
        pairs += [(prompt + good, [0] * 4 + [1] * 4), (prompt + bad, [0] * 4 + [1] * 4)]
    add("chat", "chat", chats)
    add("pairs", "preference", pairs)
    index = {"tokenizer": "none", "added_tokens": [], "vocab_size": VOCABULARY, "sources": sources}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def tiny_recipe(data: Path, architecture: str = "act", stage: str = "pretrain", *overrides: str) -> Recipe:
    """A recipe over `write_prepared` data; ``overrides`` as with --set."""
    path = data / f"{architecture}-{stage}-{os.getpid()}.toml"  # the processes of a distributed test each write theirs
    init = "" if stage == "pretrain" else 'init = "missing"\n'
    path.write_text(
        f'name = "tiny"\nstage = "{stage}"\n[model]\n{MODELS[architecture]}{SIZES}\n'
        f"[data]\nprepared = {json.dumps(str(data))}\n"
        + STAGES[stage]
        + init
        + COMMON
        + ("[data.mix]\ntext = 1.0\n" if stage == "pretrain" else "")
    )
    defaults = ["ponder.growth=[[0.0, 4]]", "optim.lr=0.02"] if architecture == "act" else ["optim.lr=0.01"]
    return load_recipe(str(path), [*defaults, *overrides])


def losses(folder: Path) -> list[float]:
    """The losses of a run, unrounded."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def tiny_config(architecture: str, **changes: Any) -> ModelConfig:
    """A model configuration of `tiny_recipe`."""
    return config_from_dict(tomllib.loads(MODELS[architecture] + SIZES) | changes)


def run(recipe: Recipe, folder: Path, resume: bool = False, display: Display | None = None) -> list[float]:
    """Train; returns the losses of all steps so far."""
    train(recipe, folder, resume, display or Silent())
    return losses(folder)
