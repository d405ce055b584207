"""Cross-entropy in chunks, its gradients, and the sampled softmax."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_training.losses import SampledVocabulary, head_cross_entropy, token_cross_entropy


def _inputs(tokens: int = 37, vocabulary: int = 23, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets, torch.rand(tokens, generator=generator)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    logits = hidden @ weight.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("counted", [37, 5, 0])
def test_chunked_loss_and_gradients_equal_the_plain_ones(cap: float, counted: int) -> None:
    hidden, weight, targets, scale = _inputs()
    scale[torch.randperm(37, generator=torch.Generator().manual_seed(1))[counted:]] = 0.0
    plain = _plain(hidden, weight, targets, cap)
    expected = torch.autograd.grad(2.0 * (plain * scale).sum(), (hidden, weight))
    total, losses = head_cross_entropy(hidden, weight, targets, scale, cap=cap, chunk=4)
    found = torch.autograd.grad(2.0 * total, (hidden, weight))
    torch.testing.assert_close(total, (plain * scale).sum())
    torch.testing.assert_close(losses * (scale > 0), (plain * (scale > 0)).detach())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_token_losses_are_differentiable_one_by_one() -> None:
    hidden, weight, targets, scale = _inputs()
    expected = torch.autograd.grad(_plain(hidden, weight, targets, 3.0).dot(scale).square(), (hidden, weight))
    found = torch.autograd.grad(
        token_cross_entropy(hidden, weight, targets, cap=3.0, chunk=5).dot(scale).square(), (hidden, weight)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tiny_shares_survive_float16() -> None:
    """A token's share of 1e-7 would be 0 in float16, were the gradient formed with it."""
    hidden, weight, targets, _ = _inputs()
    share = torch.full((37,), 1e-7)
    with torch.autocast("cpu", torch.float16):
        total, _ = head_cross_entropy(hidden, weight, targets, share)
    found = torch.autograd.grad(1e7 * total, hidden)[0]
    expected = torch.autograd.grad(_plain(hidden, weight, targets, 0.0).sum(), hidden)[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_sample_of_everything_is_the_full_softmax() -> None:
    hidden, weight, targets, scale = _inputs()
    sampled = SampledVocabulary(torch.arange(23), frequent=5, sampled=18)
    ids, places, offset = sampled.draw(targets, torch.Generator().manual_seed(0))
    assert offset.abs().max() == 0
    some, _ = head_cross_entropy(hidden, weight[ids], places[targets], scale, offset=offset)
    full, _ = head_cross_entropy(hidden, weight, targets, scale)
    torch.testing.assert_close(some, full)


def test_sampled_ids_stand_for_all_rare_ones() -> None:
    """The importance-weighted normaliser has the full one's expectation (here: equal weights, so exactly it)."""
    hidden, weight = torch.zeros(1, 4), torch.zeros(40, 4)
    sampled = SampledVocabulary(torch.arange(40), frequent=6, sampled=9)
    ids, places, offset = sampled.draw(torch.tensor([3]), torch.Generator().manual_seed(0))
    assert len(ids) == 15 and len(set(ids.tolist())) == 15
    total, _ = head_cross_entropy(hidden, weight[ids], places[torch.tensor([3])], torch.ones(1), offset=offset)
    assert float(total) == pytest.approx(math.log(40), abs=1e-5)
