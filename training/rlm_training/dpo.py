"""Direct preference optimisation (Rafailov et al. 2023) against a frozen reference.

The reference is the model the stage starts from. Its log-probabilities are computed once, before the first step, and
kept in reference.npz beside the run: training then holds one model in memory, and a resumed run reads them back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rlm_engine.config import ActConfig
from rlm_training.designs import Plan
from rlm_training.distributed import Objective, World
from rlm_training.loop import AUTOCAST
from rlm_training.micro import PairSteps, pair_micro
from rlm_training.objectives import PreferenceObjective
from rlm_training.preferences import PreferenceBatches, load_preferences
from rlm_training.pretrain import at_most
from rlm_training.recipe import Recipe
from rlm_training.stages import StageData, check_ids, prepared_sources


def dpo(recipe: Recipe, objective: Objective, folder: Path, world: World) -> StageData:
    """The recipe's pairs for its epochs, with the reference's log-probabilities."""
    assert isinstance(objective, PreferenceObjective)
    prepared, train, design = Path(recipe.data.prepared), recipe.train, objective.design
    prepared_sources(recipe, prepared)
    sources = load_preferences(prepared)
    check_ids(sources, recipe)
    pairs = PreferenceBatches(sources, train.sequence, train.rows, train.seed, recipe.dpo.max_length_ratio)
    reference = reference_log_probabilities(recipe, objective, pairs, folder, world)
    data = PairSteps(pairs, reference, design.padding, design.masked)
    facts = {"pairs": pairs.count, "left_out": pairs.left_out, "epochs": recipe.dpo.epochs}
    return StageData(data, at_most(recipe, recipe.dpo.epochs * pairs.steps), facts)


def reference_log_probabilities(
    recipe: Recipe, objective: PreferenceObjective, pairs: PreferenceBatches, folder: Path, world: World
) -> np.ndarray:
    """log p(reply | prompt) of all pairs under the starting weights, float64 [pairs, 2] (chosen, rejected), in nats.

    Read from reference.npz when that was computed from the same weights, pairs and settings; every process computes a
    part otherwise.
    """
    path, key = folder / "reference.npz", _key(recipe, objective, pairs)
    if path.exists():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return np.asarray(stored["log_probabilities"])
    result = torch.zeros(pairs.count, 2, dtype=torch.float64)
    numbers = np.arange(world.rank, pairs.count, world.size)
    own = recipe.train.micro_rows or max(recipe.train.rows // world.size, 1)
    budget = recipe.model.max_steps if isinstance(recipe.model, ActConfig) else None
    design = objective.design
    objective.model.eval()
    dtype = AUTOCAST.get(recipe.train.precision)
    with torch.autocast(world.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        for part in np.array_split(numbers, max(1, -(-len(numbers) // own))):
            if not len(part):
                continue
            batch = pairs.rows_of(part)
            micro = pair_micro(
                batch, slice(0, len(part)), 1, 0, world.device, None, design.padding, masked=design.masked
            )
            result[part] = objective.log_probabilities(micro, Plan(0, budget)).double().cpu()
    if world.size > 1:
        total = result.to(world.device)
        dist.all_reduce(total)
        result = total.cpu()
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, key=key, log_probabilities=result.numpy())
        temporary.replace(path)
    return result.numpy()


def _key(recipe: Recipe, objective: PreferenceObjective, pairs: PreferenceBatches) -> str:
    digest = hashlib.sha256(f"{recipe.train.precision} {recipe.train.sequence} {pairs.count}".encode())
    digest.update(pairs.reply_tokens.tobytes())
    for name, parameter in objective.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
