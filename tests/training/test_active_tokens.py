"""Leaving out halted tokens changes nothing: same outputs, same gradients as the dense forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlm_engine.config import ActConfig
from rlm_engine.errors import UsageError
from rlm_engine.models.act import ActModel, ActOutput
from rlm_training import active_tokens
from rlm_training.act_design import Act
from rlm_training.active_tokens import ActiveTokens, find_places
from rlm_training.recipe import TrainConfig
from rlm_training.schedule import PonderConfig


def halting_model(bias: float) -> ActModel:
    """A random model in float64 whose tokens halt at different recurrences."""
    config = ActConfig(vocab_size=50, d_model=128, n_heads=2, ffn=96, max_steps=8, eos_token_id=0, context_length=128)
    model = ActModel(config).initialise(torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        model.embedding.weight.mul_(30)
        model.halt.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(4))
        model.halt.bias.fill_(bias)
        model.step_embedding.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return model


def gradients(model: ActModel, out: ActOutput) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, out.hidden.numel(), dtype=torch.float64).view_as(out.hidden)
    ((out.hidden * weights).sum() + out.ponder_cost).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("bias", [-2.5, -1.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_equal_the_dense_forward_pass(
    bias: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_tokens, "ROUNDING", 8)
    model = halting_model(bias)
    ids = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(6))
    mask = None
    if masked:
        documents = torch.tensor([0] * 20 + [1] * 30 + [-1] * 20)
        mask = (documents[:, None] == documents[None, :])[None, None].expand(3, 1, 70, 70)
    calls: list[int] = []
    sparse = ActiveTokens(model, compiled=False)

    def counted(*inputs: object) -> object:
        result = sparse(*inputs)  # type: ignore[arg-type]
        calls.append(result is not None)
        return result

    dense = model(ids, document_mask=mask)
    wanted = gradients(model, dense)
    out = model(ids, document_mask=mask, running_step=counted)
    found = gradients(model, out)
    assert sum(calls) >= 2
    assert len(dense.depth.unique()) > 1
    assert torch.equal(out.depth, dense.depth)
    # float64; the halting head computes in float64 too, sums come in another order
    torch.testing.assert_close(out.hidden, dense.hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.remainder, dense.remainder, rtol=0, atol=1e-12)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_one_object_serves_many_forward_passes() -> None:
    model = halting_model(-1.0)
    sparse = ActiveTokens(model, compiled=False)
    for seed, shape in enumerate([(2, 40), (3, 30), (1, 64)]):
        ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model(ids, running_step=sparse).hidden, model(ids).hidden, rtol=0, atol=1e-12)


def test_what_it_does_not_go_with_is_refused() -> None:
    for other in ({"recompute": True}, {"fsdp": True}):
        with pytest.raises(UsageError, match="skip_halted"):
            TrainConfig(skip_halted=True, **other)  # type: ignore[arg-type]


def test_running_tokens_stand_at_the_right_end_of_their_row() -> None:
    running = torch.zeros(2, 100, dtype=torch.bool)
    running[0, [3, 50, 99]] = True
    running[1, 7] = True
    places = find_places(running)
    assert places.width == 64
    assert places.flat.tolist() == [3, 50, 99, 107]
    assert places.slots.tolist() == [61, 62, 63, 127]
    assert places.positions[0, -3:].tolist() == [3, 50, 99]
    assert places.positions[1, -1].item() == 7


def test_fixed_halting_takes_no_gradient_and_gives_none() -> None:
    model = halting_model(-1.0)
    Act(model, PonderConfig(fixed_halting=True))
    assert not any(p.requires_grad for p in model.halt.parameters())
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(6))
    free, fixed = model(ids), model(ids, detach_halting=True)
    assert torch.equal(free.hidden, fixed.hidden)
    assert free.remainder.requires_grad and not fixed.remainder.requires_grad
