"""Checkpoints of sharded runs (FSDP2) with torch.distributed.checkpoint: every process writes its own part.

checkpoint-STEP is a folder; it appears under its name only when all processes have written theirs. It can be read
back by another number of processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from rlm_engine.errors import InputError, UsageError
from rlm_training.distributed import Objective, World
from rlm_training.optim import HybridOptimizer
from rlm_training.runs import checkpoints, placed, reason, remove, step_of


def save(
    folder: Path,
    step: int,
    progress: dict[str, Any],
    objective: Objective,
    optimizer: HybridOptimizer,
    average: dict[str, Any] | None,
    world: World,
) -> None:
    """Write checkpoint-STEP; collective. InputError on every process when one of them cannot write."""
    target = folder / f"checkpoint-{step:08}"
    temporary = target.with_name(target.name + ".parts")
    if world.leads:
        remove(temporary)
    dist.barrier()
    updates = average["updates"] if average is not None else 0
    try:
        save_shards(_tensors(objective, optimizer, average), checkpoint_id=temporary)
    except Exception as error:  # whatever the storage writer raised, on this process or another
        raise InputError(
            f"{target}: the checkpoint could not be written ({reason(error)}); the previous one is kept"
        ) from None
    if world.leads:
        facts = {"step": step, "processes": world.size, "updates": updates, **progress}
        (temporary / "progress.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        remove(target)
        with placed(target) as place:
            temporary.replace(place)
    dist.barrier()


def load(
    folder: Path, objective: Objective, optimizer: HybridOptimizer, average: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Restore the newest checkpoint in place and return its progress, None when there is none; collective."""
    found = checkpoints(folder)
    if not found:
        return None
    newest = max(found, key=step_of)
    if not newest.is_dir():
        raise UsageError(f"{newest} was written without FSDP2; resume it without --fsdp")
    progress: dict[str, Any] = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
    state = _tensors(objective, optimizer, average)
    load_shards(state, checkpoint_id=newest)
    set_state_dict(
        objective, optimizer.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    if average is not None:
        progress["average"] = {"updates": progress["updates"], "mean": state["average"]}
    return progress


def _tensors(objective: Objective, optimizer: HybridOptimizer, average: dict[str, Any] | None) -> dict[str, Any]:
    model, states = get_state_dict(objective, optimizer.optimizers)
    state: dict[str, Any] = {"model": model, "optimizer": states}
    if average is not None:
        state["average"] = average["mean"]
    return state
