"""The dense models: sizes, initialisation, batches, routing, gradients."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import REFERENCE, make_model
from tiny_routers import DESIGNS, PAD, VOCABULARY, config_of, tiny_model

from rlm_engine.config import BlendConfig, RoutedConfig
from rlm_engine.models.blend import BlendModel
from rlm_engine.models.encoder import PreNormBlock, masked_attention
from rlm_engine.models.routed import RoutedModel

FULL: dict[str, Any] = {
    "48m": BlendConfig(vocab_size=50257, d_model=512, n_heads=8, eos_token_id=50256, context_length=256),
    "90m": RoutedConfig(vocab_size=50259, d_model=560, n_heads=8, eos_token_id=50256, context_length=512),
    "198m": RoutedConfig(
        vocab_size=50260,
        d_model=768,
        n_heads=12,
        eos_token_id=50256,
        pad_token_id=50257,
        context_length=512,
        n_layers=16,
        ffn=3072,
        biases=False,
        rolling_window=True,
    ),
}
each_design = pytest.mark.parametrize("design", DESIGNS)


def some_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY - 1, (batch, tokens))
    return torch.from_numpy(ids + (ids >= PAD))  # no padding


def fresh(design: str) -> BlendModel | RoutedModel:
    return make_model(config_of(design)).initialise(torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "parameters"), [("48m", 47_931_907), ("90m", 90_697_603), ("198m", 198_464_259)])
def test_parameter_counts_at_full_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = make_model(FULL[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    published = json.loads((REFERENCE / "full_state_dicts.json").read_text())[name]
    assert published["parameters"] == parameters


@each_design
def test_initialisation_is_the_published_one(design: str) -> None:
    config = config_of(design)
    wide = type(config)(**{**config.__dict__, "d_model": 96, "vocab_size": 500})
    model = make_model(wide).initialise(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif design == "blend" and "qkv" in name:
            bound = (6 / (4 * 96)) ** 0.5
            assert 0.97 * bound < parameter.abs().max() <= bound, name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    again = make_model(wide).initialise(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if isinstance(model, RoutedModel):
        assert not model.tokens.weight[PAD].any()


@each_design
@pytest.mark.parametrize("routing", ["sequence", "prefix"])
def test_rows_of_a_batch_are_independent(design: str, routing: str) -> None:
    model = tiny_model(design, 1)
    ids = some_ids(12, 9)
    with torch.no_grad():
        batch = model(ids, routing=routing)
        rows = torch.cat([model(row[None], routing=routing).logits for row in ids])
    torch.testing.assert_close(batch.logits, rows, rtol=0, atol=1e-10)
    if isinstance(model, RoutedModel):
        assert len(batch.steps.unique()) > 1, "the rows should differ in depth"


@each_design
def test_prefix_routing_is_causal_and_sequence_routing_is_not(design: str) -> None:
    leaks = []
    for seed in range(4):
        model = tiny_model(design, seed)
        ids, other = some_ids(8, 10, seed), some_ids(8, 10, seed)
        other[:, 5:] = some_ids(8, 10, seed + 100)[:, 5:]
        with torch.no_grad():
            before, after = (model(x, routing="prefix").logits[:, :5] for x in (ids, other))
            torch.testing.assert_close(before, after, rtol=0, atol=1e-10)
            before, after = (model(x).logits[:, :5] for x in (ids, other))
            leaks.append((before - after).abs().max().item())
    assert max(leaks) > 1e-3


@each_design
def test_unknown_routing_is_refused(design: str) -> None:
    with pytest.raises(ValueError, match="'sequence' or 'prefix'"):
        tiny_model(design)(some_ids(1, 3), routing="causal")


@each_design
@pytest.mark.parametrize("routing", ["sequence", "prefix"])
def test_every_parameter_learns(design: str, routing: str) -> None:
    model = fresh(design).train()
    ids = some_ids(4, 8)
    torch.manual_seed(0)
    out = model(ids, labels=ids, routing=routing)
    assert out.loss is not None
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@each_design
def test_dropout_acts_in_training_only(design: str) -> None:
    model = fresh(design)
    ids = some_ids(2, 8)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("design", "rates"), [("blend", [0.1] * 3), ("rlm-90m", [0.0, 0.1, 0.1])])
def test_dropout_after_the_attention_projection_is_the_48m_only(
    design: str, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = fresh(design).recursion.train()
    x = torch.randn(1, 4, 12)
    seen: list[tuple[float, bool]] = []

    def dropout(value: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        seen.append((p, training))
        return value

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    block(x, masked_attention(None, 0.0))
    assert seen == [(rate, True) for rate in rates]


@each_design
def test_dropout_on_attention_weights(design: str) -> None:
    q = torch.randn(1, 6, 2, 4)
    torch.manual_seed(0)
    assert not torch.equal(masked_attention(None, 0.5)(q, q, q), masked_attention(None, 0.0)(q, q, q))
    model = fresh(design)
    for module in model.modules():
        if isinstance(module, PreNormBlock):
            module.dropout = module.attention_out_dropout = 0.0
    states = [model.train()(some_ids(1, 8), return_states=True).states[0] for _ in range(2)]
    assert not torch.equal(*states)


@each_design
def test_a_batch_without_a_single_target_has_no_language_loss(design: str) -> None:
    ids = some_ids(2, 6)
    out = tiny_model(design)(ids, labels=torch.full_like(ids, -100))
    assert out.lm_loss is not None and out.lm_loss.item() == 0.0
    if isinstance(tiny_model(design), RoutedModel):
        assert out.sample_ppl.tolist() == [1.0, 1.0] and out.pseudo_labels.tolist() == [0, 0]


def test_router_loss_reaches_the_base_layers_but_its_label_carries_no_gradient() -> None:
    model = fresh("rlm-90m")
    ids = some_ids(2, 6)
    out = model(ids, labels=ids)
    assert out.router_loss is not None and out.sample_ppl is not None and not out.sample_ppl.requires_grad
    out.router_loss.backward()
    assert model.layers[0].up.weight.grad.any() and model.tokens.weight.grad.any()  # type: ignore[union-attr]
    assert model.unembedding.weight.grad is None  # type: ignore[union-attr]


def test_prefix_router_loss_is_the_mean_over_real_positions() -> None:
    model = tiny_model("rlm-198m", 1)
    ids = some_ids(2, 6)
    labels = ids.clone()
    ids[1, 4:] = PAD
    labels[1, 4:] = -100
    with torch.no_grad():
        out = model(ids, labels=labels, routing="prefix")
        log_p = torch.log_softmax(out.router_logits, -1)
    each = [-log_p[b, t, out.pseudo_labels[b]] for b in range(2) for t in range(6) if ids[b, t] != PAD]
    assert out.router_loss.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-12)


def test_padding_row_of_the_token_table_gets_no_gradient() -> None:
    model = fresh("rlm-198m")
    ids = some_ids(2, 6)
    ids[:, 3] = PAD
    model(ids, labels=ids).loss.backward()
    assert not model.tokens.weight.grad[PAD].any()  # type: ignore[union-attr]


def test_blend_refuses_more_tokens_than_positions() -> None:
    with pytest.raises(IndexError, match="13 tokens"):
        tiny_model("blend")(some_ids(1, 13))


@pytest.mark.parametrize("design", ["rlm-90m", "rlm-198m"])
def test_routed_has_no_longest_text(design: str) -> None:
    assert tiny_model(design)(some_ids(1, 50)).logits.shape == (1, 50, VOCABULARY)


@each_design
def test_attention_mask_is_accepted_and_ignored(design: str) -> None:
    ids = some_ids(2, 6)
    model = tiny_model(design)
    assert torch.equal(model(ids, attention_mask=torch.zeros_like(ids)).logits, model(ids).logits)
