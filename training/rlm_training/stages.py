"""What differs between pretraining and supervised fine-tuning: the data, and where the weights start."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlm_engine.checkpoint import read_model_directory, write_model_directory
from rlm_engine.config import ActConfig
from rlm_engine.errors import UsageError
from rlm_engine.models.act import ActModel
from rlm_training.loop import Trainer
from rlm_training.recipe import Recipe
from rlm_training.shards import CHAT_FORMAT, Source, load_sources
from rlm_training.stream import MixedStream, PackedConversations

VALIDATION_ROWS = 8


def train(recipe: Recipe, folder: Path, resume: bool, report: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Run a recipe in a folder and write the trained model directory `folder/model`; returns its path.

    Raises UsageError when the folder already holds a run and ``resume`` is off, or for impossible recipes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and (folder / "checkpoint.pt").exists():
        raise UsageError(f"{folder} already holds a run; continue it with --resume or choose another folder")
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
    torch.manual_seed(recipe.train.seed)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    sources = load_sources(Path(recipe.data.prepared))
    model = _model(recipe)
    if recipe.stage == "pretrain":
        trainer = _pretrain(recipe, model, sources, folder, report)
    else:
        trainer = _sft(recipe, model, sources, folder, report)
    last = trainer.run(resume)
    target = folder / "model"
    write_model_directory(target, _final_config(recipe, last), model.state_dict())
    return target


def _model(recipe: Recipe) -> ActModel:
    if not recipe.train.init:
        generator = torch.Generator().manual_seed(recipe.train.seed)
        return ActModel(recipe.model).initialise(generator)
    config, tensors = read_model_directory(Path(recipe.train.init))
    if not isinstance(config, ActConfig):
        raise UsageError(f"{recipe.train.init}: only 'act' models can be trained further, not {config.architecture!r}")
    model = ActModel(config)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    return model


def _pretrain(recipe: Recipe, model: ActModel, sources: dict[str, Source], folder: Path, report: Any) -> Trainer:
    train = recipe.train
    steps = max(1, train.tokens // (train.rows * train.sequence))
    needed = max(recipe.data.stream_tokens, train.tokens) + train.rows * (train.sequence + 1)
    stream = MixedStream(sources, recipe.data.mix, needed, train.rows, train.seed)
    facts = {"steps": steps, "epochs": stream.epochs(), "stream_tokens": stream.row_tokens * train.rows}
    (folder / "data.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    counts = _token_counts([sources[name] for name in recipe.data.mix], recipe.model.vocab_size)
    heldout = _heldout_rows(recipe)
    return Trainer(recipe, model, stream, steps, folder, token_counts=counts, heldout=heldout, report=report)


def _sft(recipe: Recipe, model: ActModel, sources: dict[str, Source], folder: Path, report: Any) -> Trainer:
    train = recipe.train
    replay = None
    if recipe.data.replay:
        rows = max(1, round(recipe.data.replay * train.rows))
        tokens = recipe.data.stream_tokens or train.tokens
        replay = MixedStream(sources, recipe.data.mix, tokens + rows * (train.sequence + 1), rows, train.seed)
    packed = PackedConversations(sources, recipe.data.conversations, train.sequence, train.rows, train.seed, replay)
    if not packed.steps:
        raise UsageError("the conversations do not fill a single batch; lower train.rows or train.sequence")
    return Trainer(recipe, model, packed, packed.steps, folder, heldout=_heldout_rows(recipe), report=report)


def _token_counts(sources: list[Source], vocabulary: int) -> torch.Tensor:
    counts = np.zeros(vocabulary, dtype=np.int64)
    for source in sources:
        counts += np.bincount(source.tokens, minlength=vocabulary)
    return torch.from_numpy(counts)


def _heldout_rows(recipe: Recipe) -> dict[str, np.ndarray]:
    """The first rows of every held-out source, int64 [rows, sequence + 1]."""
    if not recipe.data.heldout:
        return {}
    size = recipe.train.sequence + 1
    rows = {}
    for name, source in load_sources(Path(recipe.data.heldout)).items():
        count = min(VALIDATION_ROWS, len(source.tokens) // size)
        if count:
            rows[name] = np.asarray(source.tokens[: count * size], dtype=np.int64).reshape(count, size)
    return rows


def _final_config(recipe: Recipe, last: dict[str, Any]) -> ActConfig:
    values = recipe.model.to_dict()
    values.pop("architecture")
    values["added_tokens"] = tuple(values["added_tokens"])
    values["chat_format"] = CHAT_FORMAT
    values["provenance"] = {
        "trained_with": "rlm-train",
        "recipe": recipe.name,
        "stage": recipe.stage,
        "date": datetime.date.today().isoformat(),
        "last": {key: last[key] for key in ("step", "loss", "depth") if key in last},
    }
    return ActConfig(**values)
