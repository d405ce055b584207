"""Optimizers: Muon for matrices and AdamW for everything else, or AdamW for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import muon as muon_update

from rlm_engine.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """Peak learning rates and decay.

    ``name``: "muon" (Jordan et al. 2024: momentum orthogonalised by Newton-Schulz, for the weights of linear layers;
    AdamW for the rest) or "adamw": every parameter has ``lr`` and ``weight_decay``, and the other rates are unused.
    ``lr``, ``weight_decay``: matrices. ``embedding_lr``: token and position tables; ``head_lr``: an untied output
    head; ``gain_lr``: norm gains, biases, step embedding; ``halt_lr``: halting head and routers. These do not decay.
    ``momentum``: Muon's. ``beta1``, ``beta2``, ``eps``: AdamW's. ``clip``: gradient norm of the AdamW parameters
    (Muon's update has a fixed size); 0 clips nothing.
    """

    name: str = "muon"
    lr: float = 0.012
    embedding_lr: float = 0.02
    head_lr: float = 0.004
    gain_lr: float = 0.01
    halt_lr: float = 0.003
    weight_decay: float = 0.03
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise UsageError(f"name must be 'muon' or 'adamw', got {self.name!r}")
        for key in ("lr", "embedding_lr", "head_lr", "gain_lr", "halt_lr", "clip", "weight_decay"):
            if not 0 <= getattr(self, key) < 100:
                raise UsageError(f"{key} is out of range: {getattr(self, key)}")
        for key in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"{key} must be in [0, 1), got {getattr(self, key)}")
        if self.eps <= 0:
            raise UsageError(f"eps must be above 0, got {self.eps}")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by kind: "matrix", "embedding", "head", "gain", "halt" (halting head and routers)."""
    kinds: dict[int, str] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        decides = parts[-1] == "halt" or any(part.startswith("router") for part in parts)
        for name, parameter in module.named_parameters(recurse=False):
            if decides:
                kind = "halt"
            elif isinstance(module, nn.Embedding):
                kind = "embedding"
            elif isinstance(module, nn.Linear) and parts[-1] in ("head", "unembedding"):
                kind = "head"
            else:
                kind = "matrix" if isinstance(module, nn.Linear) and name == "weight" else "gain"
            kinds.setdefault(id(parameter), kind)
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in ("matrix", "embedding", "head", "gain", "halt")}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[kinds[id(parameter)]].append(parameter)
    return groups


def packed_matrices(model: nn.Module) -> dict[int, int]:
    """How many matrices a parameter (by id) packs: queries, keys and values of the published designs share one."""
    linears = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))
    return {id(m.weight): 3 for path, m in linears if path.split(".")[-1] == "qkv"}


class HybridOptimizer:
    """Both optimizers behind one door; a group's learning rate is its peak times the schedule."""

    def __init__(self, model: nn.Module, config: OptimConfig, scaler: torch.amp.GradScaler | None = None):
        groups = parameter_groups(model)
        self._clip, self._scaler = config.clip, scaler
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if config.name == "muon":
            self._muon_parameters = groups["matrix"]
            rates = {
                "embedding": config.embedding_lr,
                "head": config.head_lr,
                "gain": config.gain_lr,
                "halt": config.halt_lr,
            }
            adam: list[dict[str, Any]] = [
                {"params": groups[kind], "lr": rate, "weight_decay": 0.0} for kind, rate in rates.items()
            ]
            if groups["matrix"]:
                self._optimizers["muon"] = WholeMatrixMuon(
                    groups["matrix"],
                    packed_matrices(model),
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                )
        else:
            self._muon_parameters = []
            everything = [p for group in groups.values() for p in group]
            adam = [{"params": everything, "lr": config.lr, "weight_decay": config.weight_decay}]
        adam = [group for group in adam if group["params"]]
        self._adam_parameters = [p for group in adam for p in group["params"]]
        if adam:
            self._optimizers["adamw"] = torch.optim.AdamW(
                adam, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
            )
        if not self._optimizers:
            raise UsageError("no parameter is left to train")
        self._peaks = {name: [g["lr"] for g in optimizer.param_groups] for name, optimizer in self._optimizers.items()}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers, for distributed checkpoints."""
        return list(self._optimizers.values())

    def step(self, scale: float, beta1: float | None = None) -> float | None:
        """Update with learning rates at `scale` of their peaks and clear the gradients.

        Returns the gradient norm of the AdamW parameters before clipping; None when a gradient is not finite, and
        then nothing was updated.
        """
        if self._scaler is not None:
            for optimizer in self._optimizers.values():
                if any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                    self._scaler.unscale_(optimizer)
        norm = gradient_norm(self._adam_parameters)
        finite = math.isfinite(norm) and math.isfinite(gradient_norm(self._muon_parameters))
        if finite:
            if self._clip and norm > self._clip:
                for parameter in self._adam_parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._clip / norm)
            for name, optimizer in self._optimizers.items():
                for group, peak in zip(optimizer.param_groups, self._peaks[name], strict=True):
                    group["lr"] = peak * scale
                    if beta1 is not None and name == "adamw":
                        group["betas"] = (beta1, group["betas"][1])
                optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        self.skip()
        return norm if finite else None

    def skip(self) -> None:
        """Clear gradients without an update."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers and of the loss scaler."""
        state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. UsageError when it belongs to another optimizer or another set of parameters."""
        if set(state) != set(self._optimizers) | ({"scaler"} if self._scaler is not None else set()):
            raise UsageError("the checkpoint was written with another optimizer or precision; resume with its recipe")
        for name, optimizer in self._optimizers.items():
            try:
                optimizer.load_state_dict(state[name])
            except ValueError:
                raise UsageError(
                    "the checkpoint's optimizer trained other parameters; resume with its recipe"
                ) from None
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    """Euclidean norm of all gradients, rows summed up in float64: sharded (by rows) and whole ones agree to the bit.

    Within a row float32 is exact enough, and a copy of the token table's gradient in float64 would take a tenth of a
    step. Collective when parameters are sharded: every process must call it.
    """
    squares: list[Tensor] = []
    sharded = False
    for parameter in parameters:
        if parameter.grad is None:
            continue
        sharded = sharded or _is_sharded(parameter)
        grad = _local(parameter.grad)
        rows = torch.linalg.vector_norm(grad, dim=-1) if grad.dim() > 1 else grad
        squares.append(rows.double().square().sum())
    if not squares:
        return 0.0
    total = torch.stack(squares).sum()
    if sharded:
        torch.distributed.all_reduce(total)
    return float(total.sqrt())


class WholeMatrixMuon(torch.optim.Muon):
    """Muon over what is one matrix mathematically, however it is stored.

    Packed matrices (one parameter for queries, keys and values) are orthogonalised each on its own: together the three
    would share the directions that each of them should have whole. Sharded ones (FSDP2) are gathered, updated by every
    process alike, and dropped down to the own shard again, to the bit what whole ones would be; memory holds one whole
    matrix at a time, parameters and momentum stay sharded.
    """

    def __init__(self, parameters: list[nn.Parameter], packed: dict[int, int], **options: Any):
        """``packed``: how many matrices a parameter holds, by its id, where it is more than one, row after row."""
        super().__init__(parameters, **options)
        self._packed = packed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; collective where parameters are sharded."""
        assert closure is None
        for group in self.param_groups:
            options = {k: group[k] for k in ("lr", "weight_decay", "momentum", "nesterov")}
            options |= {k: group[k] for k in ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                shards = (parameter.detach(), parameter.grad, state["momentum_buffer"])
                sharded = _is_sharded(parameter)
                value, grad, momentum = (shard.full_tensor() for shard in shards) if sharded else shards
                parts = self._packed.get(id(parameter), 1)
                values, grads, momenta = (list(tensor.chunk(parts)) for tensor in (value, grad, momentum))
                muon_update(values, grads, momenta, has_complex=False, **options)  # in place: chunks are views
                if sharded:
                    for shard, whole in ((shards[0], value), (shards[2], momentum)):
                        _local(shard).copy_(_own_part(whole, shard))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _own_part(whole: Tensor, shard: Any) -> Tensor:
    """This process's rows: FSDP2 splits the first axis as torch.chunk does."""
    parts = whole.chunk(shard.device_mesh.size(), dim=0)
    rank = shard.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]
