"""The attention of CPU training computes what PyTorch's does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_engine.models import layers
from rlm_engine.models.layers import causal_mask
from rlm_training import attention


def run(function: object, inputs: list[Tensor], weights: Tensor, **options: object) -> list[Tensor]:
    """Output and gradients of q, k, v, in float32."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*leaves, **options)  # type: ignore[operator]
    (out.float() * weights).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]  # type: ignore[union-attr]


def inputs(tokens: int, keys: int, width: int = 16) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, 3, tokens, width), (2, 3, keys, width), (2, 3, keys, width), (2, 3, tokens, width)]
    q, k, v, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    return [q, k, v], weights


def exact(given: list[Tensor], weights: Tensor, mask: Tensor) -> list[Tensor]:
    """The same in float64, PyTorch's kernel."""
    leaves = [t.to(torch.bfloat16).double().requires_grad_() for t in given]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    (out * weights).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]  # type: ignore[union-attr]


def assert_near(ours: list[Tensor], theirs: list[Tensor], true: list[Tensor]) -> None:
    """Not much further from the truth than PyTorch's kernel in bfloat16 is."""
    for a, b, c in zip(ours, theirs, true, strict=True):
        scale = c.square().mean().sqrt()
        error = ((a - c).square().mean().sqrt() / scale).item()
        usual = ((b - c).square().mean().sqrt() / scale).item()
        assert error < max(2 * usual, 0.006), (error, usual)


@pytest.mark.parametrize("tokens", [5, 128, 300, 530])  # one block, exactly one, a last short one, the larger blocks
def test_causal_attention_and_its_gradients(tokens: int) -> None:
    given, weights = inputs(tokens, tokens)
    ours = run(attention.attend, given, weights, is_causal=True)
    theirs = run(F.scaled_dot_product_attention, given, weights, is_causal=True)
    assert ours[0].shape == (2, 3, tokens, 16)
    assert_near(ours, theirs, exact(given, weights, causal_mask(tokens, tokens)))


@pytest.mark.parametrize("shared", [True, False])
def test_masks_and_remembered_keys(shared: bool) -> None:
    tokens, keys = 200, 250
    given, weights = inputs(tokens, keys)
    mask = causal_mask(tokens, keys)
    if not shared:
        documents = torch.arange(keys) // torch.tensor([40, 70])[:, None]  # [rows, keys]
        mask = mask & (documents[:, None, -tokens:, None] == documents[:, None, None, :])
    ours = run(attention.attend, given, weights, attn_mask=mask)
    theirs = run(F.scaled_dot_product_attention, given, weights, attn_mask=mask)
    assert_near(ours, theirs, exact(given, weights, mask))


def test_compiled_code_computes_the_same() -> None:
    given, weights = inputs(140, 140)
    eager = run(attention.attend, given, weights, is_causal=True)
    compiled = run(torch.compile(attention.attend, dynamic=False, fullgraph=True), given, weights, is_causal=True)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


def test_it_is_used_only_inside_and_only_for_bfloat16_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = attention._attention
    monkeypatch.setattr(attention, "_attention", lambda *a: calls.append(1) or own(*a))  # type: ignore[func-returns-value]
    q, k, v = (t.transpose(1, 2) for t in inputs(8, 8)[0])
    with attention.fast_attention():
        layers.dense_attention(q, k, v)  # float32
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                layers.dense_attention(q, k, v)
            assert not calls
            layers.dense_attention(q, k, v)
            assert calls == [1]
    with torch.autocast("cpu", torch.bfloat16):
        layers.dense_attention(q, k, v)
    assert calls == [1]
