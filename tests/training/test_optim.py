"""Which optimizer each parameter gets, clipping, gradients that are not finite, loss scaling."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import MODELS, tiny_config

from rlm_engine.errors import UsageError
from rlm_engine.models import build_model
from rlm_training.optim import HybridOptimizer, OptimConfig, gradient_norm, packed_matrices, parameter_groups


@pytest.mark.parametrize("architecture", MODELS)
def test_every_parameter_has_one_group(architecture: str) -> None:
    model = build_model(tiny_config(architecture))
    groups = parameter_groups(model)
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)]: kind for kind, group in groups.items() for p in group}
    assert {n for n, k in kinds.items() if k == "halt"} == {n for n in kinds if "router" in n or n.startswith("halt")}
    assert all(p.ndim == 2 for p in groups["matrix"])
    tables = {"act": {"embedding.weight"}, "routed": {"tokens.weight"}}.get(architecture)
    if tables is not None:
        assert {n for n, k in kinds.items() if k == "embedding"} == tables
    heads = {"routed": {"unembedding.weight"}, "mixture": {"head.weight"}}.get(architecture, set())
    assert {n for n, k in kinds.items() if k == "head"} == heads
    if architecture == "act":
        assert kinds["step_embedding"] == "gain" and kinds["block.wq.weight"] == "matrix"


def _small(name: str, **values: float) -> tuple[torch.nn.Sequential, HybridOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 5))
    return model, HybridOptimizer(model, OptimConfig(name=name, **values))  # type: ignore[arg-type]


def test_adamw_is_torchs_with_one_rate_for_all() -> None:
    model, optimizer = _small("adamw", lr=0.1, weight_decay=0.2, clip=0.0)
    torch.manual_seed(0)
    twin = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 5))
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.2)
    ids = torch.tensor([1, 2, 3])
    for _ in range(3):
        model(ids).square().sum().backward()
        optimizer.step(0.5)
        twin(ids).square().sum().backward()
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_scales_adamw_gradients_and_leaves_muon_alone() -> None:
    model, optimizer = _small("muon", clip=0.5, embedding_lr=0.0, gain_lr=0.0)
    (100.0 * model(torch.tensor([1, 2]))).square().sum().backward()
    table, bias = model[0].weight.grad, model[1].bias.grad
    assert table is not None and bias is not None
    expected = float(torch.cat((table.flatten(), bias)).norm())
    held = [table, bias]
    norm = optimizer.step(1.0)
    assert norm == pytest.approx(expected, rel=1e-5) and norm > 0.5
    assert float(torch.cat([g.flatten() for g in held]).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gradient_that_is_not_finite_changes_nothing(layer: int) -> None:
    model, optimizer = _small("muon")
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([1, 2])).sum().backward()
    grad = model[layer].weight.grad
    assert isinstance(grad, torch.Tensor)
    grad[0, 0] = float("nan")
    assert optimizer.step(1.0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert gradient_norm(list(model.parameters())) == 0.0  # cleared


def test_loss_scaling_falls_on_overflow_and_does_not_change_the_update() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5)
    optimizer = HybridOptimizer(model, OptimConfig(clip=0.0), scaler)
    twin, plain = torch.nn.Linear(4, 5), None
    twin.load_state_dict(model.state_dict())
    plain = HybridOptimizer(twin, OptimConfig(clip=0.0))
    x = torch.ones(3, 4)
    scaler.scale(model(x).square().sum()).backward()
    twin(x).square().sum().backward()
    assert optimizer.step(1.0) == pytest.approx(plain.step(1.0))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    (model(x).sum() * float("inf")).backward()
    assert optimizer.step(1.0) is None
    assert scaler.get_scale() == 512.0


def test_state_of_another_optimizer_is_refused() -> None:
    _, muon = _small("muon")
    _, adamw = _small("adamw")
    with pytest.raises(UsageError, match="another optimizer"):
        adamw.load_state_dict(muon.state_dict())


@pytest.mark.parametrize(("architecture", "packed"), [("act", 0), ("blend", 3), ("routed", 3), ("mixture", 0)])
def test_packed_matrices_are_found(architecture: str, packed: int) -> None:
    model = build_model(tiny_config(architecture))
    found = packed_matrices(model)
    shapes = [p.shape for p in model.parameters() if id(p) in found]
    assert len(shapes) == packed and all(rows == 3 * columns for rows, columns in shapes)


class _Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(6, 18, bias=False)


class _Apart(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(6, 6, bias=False) for _ in range(3))


def test_muon_treats_packed_matrices_as_separate_ones() -> None:
    torch.manual_seed(0)
    packed, apart = _Packed(), _Apart()
    start = packed.qkv.weight.detach().clone()
    for part, rows in zip(apart.parts, start.chunk(3), strict=True):
        assert isinstance(part, torch.nn.Linear)
        part.weight.data.copy_(rows)
    optimizers = [HybridOptimizer(model, OptimConfig()) for model in (packed, apart)]
    x = torch.randn(5, 6)
    for _ in range(3):
        (packed.qkv(x) * torch.arange(1.0, 19.0)).square().sum().backward()
        outs = torch.cat([part(x) for part in apart.parts], dim=1)
        (outs * torch.arange(1.0, 19.0)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step(1.0)
    together = torch.cat([part.weight for part in apart.parts])  # type: ignore[misc]
    torch.testing.assert_close(packed.qkv.weight, together)
    assert not torch.allclose(packed.qkv.weight, start, atol=1e-3)
