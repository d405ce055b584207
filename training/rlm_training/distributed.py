"""More than one process: joining torchrun's job, DDP or FSDP2 around the objective, sums over all processes.

    torchrun --nproc-per-node 8 -m rlm_training pretrain --recipe act-110m --out runs/act-110m

Every process reads the same batch and works on its own slices of it; losses are shares of the batch's, so the
processes' gradients add up. Two processes give to the bit what one gives with two micro-batches.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlm_engine.errors import UsageError
from rlm_training.objectives import PreferenceObjective, Statistics, TokenObjective

Objective = TokenObjective | PreferenceObjective


@dataclass(frozen=True)
class World:
    """This process among all: its number, how many there are, and the device it works on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """The device "auto", "cpu" or "cuda" means here. UsageError when there is no CUDA."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"train.device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device is 'cuda', but PyTorch finds no CUDA device; set it to 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def joined(device: str, timeout_s: float = 1800.0) -> Iterator[World]:
    """The job torchrun started this process for, or a world of one."""
    own = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=own)
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own)
        dist.barrier()  # leave together: a process whose peer is gone can abort while it takes its group down
    finally:
        dist.destroy_process_group()


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process of the job is gone."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
    return isinstance(error, torch.distributed.DistError) or any(sign in text for sign in signs)


def wrap(objective: Objective, world: World, fsdp: bool) -> nn.Module:
    """The objective as a job runs it. With ``fsdp`` parameters, gradients and optimizer states are sharded.

    Layers that run once per forward become units of their own; everything that recurs stays in the root, because a
    recurring unit would be gathered once per recurrence.
    """
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in getattr(objective.model, "layers", []):
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    if world.size == 1:
        return objective
    return DistributedDataParallel(objective, find_unused_parameters=not objective.design.all_used)


@contextlib.contextmanager
def gradients_stay(wrapped: nn.Module, keep: bool) -> Iterator[None]:
    """While ``keep``, a backward pass adds to this process's own gradients and exchanges nothing."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync() if keep else contextlib.nullcontext():
            yield
    else:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(not keep)
        yield


def add_up(slices: list[Statistics], flags: list[float], world: World) -> tuple[dict[str, Any], list[float]]:
    """Sum the statistics of this process's slices, then of all processes; flags are summed alike.

    The float64 sums do not depend on how two slices are spread over processes. Scalars come back as floats,
    vectors as lists.
    """
    names = sorted(slices[0])
    total = {name: sum((s[name] for s in slices[1:]), start=slices[0][name]) for name in names}
    vector = torch.cat([total[name].flatten().double() for name in names])
    vector = torch.cat((vector, torch.tensor(flags, dtype=torch.float64, device=vector.device)))
    if world.size > 1:
        dist.all_reduce(vector)
    values = vector.tolist()
    result: dict[str, Any] = {}
    for name in names:
        count = total[name].numel()
        part, values = values[:count], values[count:]
        result[name] = part[0] if total[name].dim() == 0 else part
    return result, values


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with sharded tensors gathered; collective when there are any."""
    state: dict[str, Any] = model.state_dict()
    return {name: _whole(tensor) for name, tensor in state.items()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()
