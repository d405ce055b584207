"""Supervised fine-tuning: loss on reply tokens and ends of turn, conversations packed where the design allows it."""

from __future__ import annotations

from pathlib import Path

from rlm_engine.errors import UsageError
from rlm_training.distributed import Objective, World
from rlm_training.micro import TokenSteps
from rlm_training.pretrain import at_most, mixed_stream, shares
from rlm_training.recipe import Recipe
from rlm_training.shards import Source
from rlm_training.stages import StageData, check_ids, prepared_sources
from rlm_training.stream import MixedStream, PackedConversations


def sft(recipe: Recipe, objective: Objective, folder: Path, world: World) -> StageData:
    """The recipe's conversations once, with replay of pretraining text.

    ACT sees only its own conversation in a packed row (document mask; rotary positions count distances, so nothing
    needs to restart). Routers decide for whole rows: for the other designs a row holds one conversation, padded.
    """
    train, design = recipe.train, objective.design
    sources = prepared_sources(recipe, Path(recipe.data.prepared))
    chosen = recipe.data.conversations or {n: recipe.data.epochs for n, s in sources.items() if s.mask is not None}
    if not chosen:
        raise UsageError(f"{recipe.data.prepared}: no conversations here; SFT needs replies to learn from")
    packed = PackedConversations(
        sources, chosen, train.sequence, train.rows, train.seed, _replay(recipe, sources), alone=not design.masked
    )
    notes = tuple(
        f"{count:,} of the {len(sources[name].documents) - 1:,} conversations of {name!r} are longer than "
        f"train.sequence = {train.sequence} tokens and are left out"
        for name, count in packed.left_out.items()
        if count
    )
    if not packed.steps:
        raise UsageError("; ".join(["the conversations do not fill a single batch; lower train.rows", *notes]))
    check_ids([sources[name] for name in (*chosen, *recipe.data.mix)], recipe)
    data = TokenSteps(packed, train.sequence, design.padding, design.masked)
    facts = {"conversations": chosen, "left_out": packed.left_out}
    return StageData(data, at_most(recipe, packed.steps), facts, notes=notes)


def _replay(recipe: Recipe, sources: dict[str, Source]) -> MixedStream | None:
    if not recipe.data.replay:
        return None
    texts = {name: source for name, source in sources.items() if source.mask is None}
    rows = max(1, round(recipe.data.replay * recipe.train.rows))
    tokens = recipe.data.stream_tokens or recipe.train.tokens
    mix = recipe.data.mix or shares(recipe, texts)
    return mixed_stream(recipe, sources, mix, tokens, rows)
