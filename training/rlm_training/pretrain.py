"""Pretraining: next-token loss on a mix of sources, one contiguous stream per batch row."""

from __future__ import annotations

from pathlib import Path

import torch

from rlm_engine.config import ActConfig
from rlm_engine.errors import UsageError
from rlm_training.distributed import Objective, World
from rlm_training.micro import TokenSteps
from rlm_training.recipe import Recipe
from rlm_training.shards import Source
from rlm_training.stages import StageData, check_ids, prepared_sources
from rlm_training.stream import UNIT_TOKENS, MixedStream
from rlm_training.unigram import expected_counts


def pretrain(recipe: Recipe, objective: Objective, folder: Path, world: World) -> StageData:
    """The mixed stream of a recipe."""
    sources = prepared_sources(recipe, Path(recipe.data.prepared))
    mix = shares(recipe, sources)
    needed = max(recipe.data.stream_tokens, recipe.train.tokens)
    stream = mixed_stream(recipe, sources, mix, needed, recipe.train.rows)
    counts = {name: check_ids([sources[name]], recipe) for name in mix}
    facts = {"epochs": stream.epochs(), "stream_tokens": stream.row_tokens * stream.rows}
    steps, data = step_count(recipe), TokenSteps(stream, recipe.train.sequence)
    seen = expected_counts(counts, mix, steps * recipe.train.rows * recipe.train.sequence)
    return StageData(data, steps, facts, torch.stack(list(counts.values())).sum(0), seen)


def step_count(recipe: Recipe) -> int:
    """Steps of a pretraining run."""
    return at_most(recipe, max(1, recipe.train.tokens // (recipe.train.rows * recipe.train.sequence)))


def at_most(recipe: Recipe, steps: int) -> int:
    """The data's steps, or train.most_steps if that is less."""
    return min(steps, recipe.train.most_steps or steps)


def shares(recipe: Recipe, sources: dict[str, Source]) -> dict[str, float]:
    """data.mix, or every source by its size."""
    if not sources:
        raise UsageError(f"{recipe.data.prepared}: no text or conversations here")
    return recipe.data.mix or {name: float(len(source.tokens)) for name, source in sources.items()}


def mixed_stream(
    recipe: Recipe, sources: dict[str, Source], mix: dict[str, float], tokens: int, rows: int
) -> MixedStream:
    """A stream long enough for `tokens` over `rows` rows; with segment memory long documents stay in longer pieces."""
    memory = recipe.ponder.most_memory() if isinstance(recipe.model, ActConfig) else 0
    enough = tokens + rows * (recipe.train.sequence + 1)
    return MixedStream(sources, mix, enough, rows, recipe.train.seed, max(UNIT_TOKENS, 4 * memory))
