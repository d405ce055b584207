"""What each design minimises: exact accumulation, the designs' own losses, segment memory, the halting head's phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import MODELS, tiny_config, tiny_recipe
from torch import Tensor

from rlm_engine.models import build_model
from rlm_training.act_design import Act
from rlm_training.designs import Plan, RouterConfig, published_design
from rlm_training.micro import Micro, TokenSteps
from rlm_training.objectives import Statistics, TokenObjective
from rlm_training.schedule import PonderConfig
from rlm_training.stages import make_objective
from rlm_training.stream import Batch

CPU = torch.device("cpu")


class OneBatch:
    """The same random batch at every step, with uneven weights."""

    def __init__(self, rows: int = 4, tokens: int = 12, padded: bool = False):
        rng = np.random.default_rng(0)
        ids = rng.integers(1, 60, (rows, tokens + 1))
        weights = rng.integers(0, 2, (rows, tokens)).astype(np.float32)
        documents = None
        if padded:
            documents = np.zeros((rows, tokens), dtype=np.int64)
            documents[:, 8:], weights[:, 8:] = -1, 0.0
        self._batch = Batch(ids[:, :-1], ids[:, 1:], weights, documents)

    def batch(self, step: int, sequence: int) -> Batch:
        return self._batch


def _objective(tmp_path: Path, architecture: str, *overrides: str) -> TokenObjective:
    config = tiny_config(architecture, **({} if architecture == "act" else {"dropout": 0.0}))
    model = build_model(config).initialise(torch.Generator().manual_seed(1))
    objective = make_objective(tiny_recipe(tmp_path, architecture, "pretrain", *overrides), model)
    assert isinstance(objective, TokenObjective)
    return objective


def _gradients(objective: TokenObjective, slices: int, plan: Plan) -> tuple[float, list[Tensor | None]]:
    objective.zero_grad()
    total = 0.0
    for micro in TokenSteps(OneBatch(), 12).micros(0, slices, range(slices), CPU):
        loss, statistics = objective(micro, plan)
        loss.backward()
        total += float(statistics["loss"])
    return total, [None if p.grad is None else p.grad.clone() for p in objective.parameters()]


@pytest.mark.parametrize("architecture", MODELS)
def test_accumulated_slices_equal_one_batch(tmp_path: Path, architecture: str) -> None:
    if architecture == "routed":
        config = tiny_config("routed", hidden_dropout=0.0, attention_dropout=0.0)
        model = build_model(config).initialise(torch.Generator().manual_seed(1))
        model.router.eval()
        objective = TokenObjective(published_design(model, RouterConfig(), False, False))
        for module in model.modules():
            module.training = False  # the router's fixed dropout, too
    else:
        objective = _objective(tmp_path, architecture)
        objective.eval()
    plan = Plan(0, budget=4, price=0.1)
    whole, expected = _gradients(objective, 1, plan)
    for slices in (2, 4):
        loss, found = _gradients(objective, slices, plan)
        assert loss == pytest.approx(whole, rel=1e-6)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def _full_micro(tokens: int = 12) -> tuple[Micro, Tensor]:
    """Two rows that all count, and the ids including the last target."""
    ids = torch.randint(1, 60, (2, tokens + 1), generator=torch.Generator().manual_seed(3))
    ones = torch.ones(2, tokens)
    return Micro(0, 1, ids[:, :-1], ids[:, 1:], ones, ones / ones.sum(), ones / ones.sum()), ids


def _own_loss(architecture: str, **router: object) -> tuple[Tensor, Statistics, torch.nn.Module, Tensor]:
    model = build_model(tiny_config(architecture)).initialise(torch.Generator().manual_seed(1)).eval()
    micro, ids = _full_micro()
    objective = TokenObjective(published_design(model, RouterConfig(**router), False, False))  # type: ignore[arg-type]
    loss, statistics = objective(micro, Plan(0))
    return loss, statistics, model, ids


@pytest.mark.parametrize("routing", ["sequence", "prefix"])
def test_routed_loss_is_the_models_own(routing: str) -> None:
    """LM loss + 0.1 x router loss with perplexity pseudo-labels, as the published model computes it from labels."""
    loss, statistics, model, ids = _own_loss("routed", routing=routing)
    # the model shifts labels itself, and its router sees the last input, too: give it the inputs and their targets
    out = model(ids[:, :-1], routing=routing)
    losses = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    _, labels = model.pseudo_labels(losses.mean(1))
    logits = out.router_logits
    if routing == "prefix":
        router = F.cross_entropy(logits.flatten(0, 1), labels[:, None].expand(2, 12).flatten())
    else:
        router = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, losses.mean() + 0.1 * router)
    assert float(statistics["router_loss"]) == pytest.approx(float(router.detach()), rel=1e-5)


def test_router_labels_change_at_perplexities_20_and_50() -> None:
    model = build_model(tiny_config("routed"))
    _, labels = model.pseudo_labels(torch.tensor([19.9, 20.1, 49.9, 50.1]).log())
    assert labels.tolist() == [0, 1, 1, 2]


def test_mixture_pays_for_passes() -> None:
    loss, statistics, model, ids = _own_loss("mixture", computation_weight=0.5)
    own = model(ids[:, :-1], labels=ids[:, 1:], batch="rows", computation_weight=0.5)
    torch.testing.assert_close(loss, own.loss)
    assert float(statistics["computation_loss"]) == pytest.approx(float(own.computation_loss))


@pytest.mark.parametrize(("gradient", "learns"), [("none", False), ("straight-through", True)])
def test_mixture_routers_learn_with_straight_through_gradients_only(gradient: str, learns: bool) -> None:
    model = build_model(tiny_config("mixture")).initialise(torch.Generator().manual_seed(1)).train()
    objective = TokenObjective(published_design(model, RouterConfig(gradient=gradient), False, False))
    objective(_full_micro()[0], Plan(0))[0].backward()
    grads = [p.grad for name, p in model.named_parameters() if "router_" in name]
    assert any(g is not None and g.abs().max() > 0 for g in grads) == learns


def test_ponder_cost_reaches_the_halting_bias() -> None:
    design = Act(build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(1)), PonderConfig())
    micro, _ = _full_micro()
    free = TokenObjective(design)(micro, Plan(0, 4, price=0.0))[0]
    priced, statistics = TokenObjective(design)(micro, Plan(0, 4, price=0.5))
    out = design.model(micro.inputs)
    assert float(statistics["ponder"]) == pytest.approx(float(out.ponder_cost.detach()), rel=1e-5)
    torch.testing.assert_close(priced - free, 0.5 * out.ponder_cost)
    (grad,) = torch.autograd.grad(priced - free, design.model.halt.bias)
    assert grad.abs() > 1e-3


def test_segments_with_memory_equal_one_long_text() -> None:
    model = build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(1)).train()
    with torch.no_grad():
        model.halt.bias.fill_(-0.5)
        model.halt.weight.normal_(std=2.0)
    micro, ids = _full_micro(12)
    long = model(ids[:, :-1])
    design = Act(model, PonderConfig(memory=((0.0, 16),)))
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        piece = Micro(0, 1, *(t[:, part] for t in (micro.inputs, micro.targets, micro.counts, micro.scale, micro.real)))
        forward = design.run(piece, Plan(0, 4, memory=16))
        torch.testing.assert_close(forward.hidden, long.hidden[:, part], rtol=1e-4, atol=1e-5)
    kept = design.state_dict()
    again = Act(model, PonderConfig(memory=((0.0, 16),)))
    again.load_state_dict(kept, CPU)
    a, b = (d.run(piece, Plan(0, 4, memory=16)).hidden for d in (design, again))
    assert torch.equal(a, b)


def test_memory_ends_with_its_document() -> None:
    """After an end of text nothing earlier is seen, not even through the memory."""
    model = build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(1)).train()
    config = PonderConfig(memory=((0.0, 16),), memory_documents=True)
    micro, _ = _full_micro(8)

    def second_half(changed: bool, ended: bool) -> Tensor:
        inputs = micro.inputs.clone()
        inputs[:, 1] = 7 if changed else 8
        inputs[:, 2] = 0 if ended else 9  # end of text
        design, hidden = Act(model, config), None
        for part in (slice(0, 4), slice(4, 8)):
            scale = micro.scale[:, part]
            piece = Micro(0, 1, inputs[:, part], micro.targets[:, part], scale, scale, scale)
            hidden = design.run(piece, Plan(0, 4, memory=16)).hidden
        assert hidden is not None
        return hidden

    assert torch.equal(second_half(True, True), second_half(False, True))
    assert not torch.equal(second_half(True, False), second_half(False, False))


def test_document_masks_keep_conversations_apart() -> None:
    design = Act(build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(1)), PonderConfig())
    micro, _ = _full_micro(8)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]] * 2)
    packed = Micro(0, 1, micro.inputs, micro.targets, micro.counts, micro.scale, micro.real, documents)
    alone = Micro(0, 1, *(t[:, 4:7] for t in (micro.inputs, micro.targets, micro.counts, micro.scale, micro.real)))
    a, b = design.run(packed, Plan(0, 4)).hidden[:, 4:7], design.run(alone, Plan(0, 4)).hidden
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gate_phase_moves_the_halting_head_alone_towards_what_pays() -> None:
    model = build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(1)).train()
    design = Act(model, PonderConfig(gate_weight=1.0))
    design.freeze_trunk()
    micro, _ = _full_micro()
    for price, sign in ((100.0, -1), (-100.0, 1)):  # nothing is worth that much: stop; every step pays: go on
        model.zero_grad()
        loss, statistics = TokenObjective(design)(micro, Plan(0, 4, price=price, gate=2))
        (loss - price * (design.run(micro, Plan(0, 4)).extra.ponder_cost)).backward()
        assert float(statistics["gate_loss"]) > 0
        assert model.halt.bias.grad is not None and sign * float(model.halt.bias.grad) > 0
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("halt."))


def test_padding_is_charged_no_ponder_cost_and_replaced_for_designs_that_mask_an_id() -> None:
    micro = TokenSteps(OneBatch(padded=True), 12, padding=0, masked=False).micros(0, 1, range(1), CPU)[0]
    assert (micro.inputs[:, 8:] == 0).all() and (micro.inputs[:, :8] > 0).all()
    assert float(micro.real.sum()) == pytest.approx(1.0) and float(micro.real[:, 8:].sum()) == 0.0
    assert float(micro.scale.sum()) == pytest.approx(1.0) and micro.documents is None
