"""The shipped recipes hold what the cards say, and what cannot work is refused with one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import MODELS, tiny_config, tiny_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlm_engine.errors import UsageError
from rlm_engine.models import build_model
from rlm_training.compute import describe, duration, forward_flops, measure_matmul_rate, run_flops
from rlm_training.recipe import load_recipe, shipped_recipes

# SPEC of the published checkpoints; the others are our own family.
PARAMETERS = {
    "rlm-48m": 47_931_907,
    "rlm-90m": 90_697_603,
    "rlm-90m-sft": 90_697_603,
    "mor": 41_389_854,
    "act-110m": 110_227_201,
    "act-55m": 55_126_273,
    "act-23m": 23_434_369,
    "act-23m-sft": 23_434_369,
    "act-15m": 14_705_409,
}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_have_the_cards_parameters(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    with torch.device("meta"):
        model = build_model(recipe.model)
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    recipe.train.slices(1)


def test_published_hyper_parameters() -> None:
    blend, chat, mor = (load_recipe(name) for name in ("rlm-48m", "rlm-90m-sft", "mor"))
    assert (blend.train.rows, blend.optim.lr, blend.optim.weight_decay) == (128, 5e-4, 0.1)
    assert (chat.train.rows, chat.train.sequence, chat.optim.lr, chat.schedule.warmup) == (64, 512, 3e-4, 0.1)
    assert (mor.train.rows, mor.optim.lr, mor.optim.beta2, mor.optim.eps) == (16, 5e-4, 0.99, 1e-6)
    assert [r.schedule.name for r in (blend, chat, mor)] == ["onecycle", "onecycle", "cosine"]
    assert mor.router.computation_weight == 1e-4 and chat.model.to_dict()["router_loss_weight"] == 0.1


@pytest.mark.parametrize(
    ("architecture", "stage", "override", "words"),
    [
        ("act", "pretrain", "train.rows=0", "rows"),
        ("act", "pretrain", "train.micro_rows=3", "must divide"),
        ("act", "pretrain", "train.precision='int8'", "precision"),
        ("act", "pretrain", "train.sequence=65", "do not fit"),
        ("act", "pretrain", "ponder.memory=[[0.0, 64]]", "do not fit"),
        ("act", "pretrain", "ponder.growth=[[0.0, 5]]", "the model has 4"),
        ("act", "pretrain", "ponder.nonsense=1", "unknown key"),
        ("act", "pretrain", "router.routing='prefix'", "'act' has none"),
        ("blend", "pretrain", "ponder.price=0.1", "is for architecture 'act'"),
        ("blend", "pretrain", "train.sequence=65", "do not fit"),
        ("mixture", "pretrain", "train.compile=true", "not for mixture"),
        ("mixture", "pretrain", "train.fsdp=true", "FSDP2"),
        ("mixture", "pretrain", "router.gradient='sideways'", "straight-through"),
        ("act", "pretrain", "data.replay=0.5", "stage 'sft'"),
        ("act", "pretrain", "dpo.beta=0.1", "stage 'dpo'"),
        ("act", "sft", "train.init=''", "--init"),
        ("act", "sft", "ponder.memory=[[0.0, 8]]", "contiguous"),
        ("act", "dpo", "train.sampled_vocabulary=8", "log-probabilities"),
        ("act", "pretrain", "train.sampled_vocabulary=64", "below the vocabulary"),
        ("act", "pretrain", "optim.lr=1000.0", "out of range"),
        ("act", "pretrain", "schedule.decay=0.99", "fit together"),
        ("act", "pretrain", "train.tokens='many'", "of type int"),
        ("act", "pretrain", "model.n_heads=3", "multiple"),
        ("act", "pretrain", "train.threads=-1", "must not be negative"),
        ("act", "pretrain", "train.checkpoint_minutes=-1", "must not be negative"),
        ("act", "pretrain", "name.x=1", "name is no section"),
    ],
)
def test_impossible_combinations_are_refused(
    tmp_path: Path, architecture: str, stage: str, override: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tiny_recipe(tmp_path, architecture, stage, override)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("growth", "good"),
    [("[[0.0, 3]]", True), ("[[0.0, 2], [0.5, 3]]", True), ("[[0.0, 2]]", False), ("[[0.0, 2], [0.6, 4]]", False)],
)
def test_the_gate_phase_needs_two_recurrences_to_compare(tmp_path: Path, growth: str, good: bool) -> None:
    overrides = [f"ponder.growth={growth}", "ponder.gate_from=0.5"]
    if good:
        assert tiny_recipe(tmp_path, "act", "pretrain", *overrides).ponder.gate_from == 0.5
        return
    with pytest.raises(UsageError, match="allow 3 recurrences"):
        tiny_recipe(tmp_path, "act", "pretrain", *overrides)


def test_rows_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "act", "pretrain", "train.micro_rows=2")
    assert recipe.train.slices(1) == recipe.train.slices(2) == 4
    with pytest.raises(UsageError, match="3 processes"):
        recipe.train.slices(3)


@pytest.mark.parametrize("architecture", MODELS)
def test_flops_are_those_torch_counts(architecture: str) -> None:
    config = tiny_config(architecture)
    model = build_model(config).initialise(torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    ids = torch.randint(1, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(ids)
        if architecture == "act":
            model.head(out.hidden)
    depth = {"act": 4.0, "blend": 2.0}.get(architecture)
    if depth is None:
        depth = float(out.steps.float().mean())
    assert forward_flops(config, 16, depth) * 16 == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_flops_with_memory_and_a_smaller_head() -> None:
    config = tiny_config("act")
    base = forward_flops(config, 16, 4)
    assert forward_flops(config, 16, 4, memory=8) - base == 4 * 4 * 8 * 32
    assert base - forward_flops(config, 16, 4, vocabulary=10) == 2 * 54 * 32


def test_growth_makes_a_run_cheaper(tmp_path: Path) -> None:
    full = tiny_recipe(tmp_path, "act", "pretrain", "ponder.growth=[[0.0, 4]]")
    grown = tiny_recipe(tmp_path, "act", "pretrain", "ponder.growth=[[0.0, 2], [0.5, 4]]")
    assert 0.5 < run_flops(grown, 100) / run_flops(full, 100) < 1.0


def test_dry_run_says_size_cost_and_time(tmp_path: Path) -> None:
    rate = measure_matmul_rate("float32", torch.device("cpu"), seconds=0.05)
    assert 1e8 < rate < 1e16
    text = describe(load_recipe("act-55m"), 55_126_273, 1000, 1e11)
    assert "55,126,273" in text and "100 GFLOP/s" in text and "1,000 of 131,072 tokens" in text
    assert [duration(s) for s in (45, 600, 12_000, 200_000)] == ["45 s", "10 min", "3 h 20 min", "2 d 7 h"]


def test_dropout_belongs_to_the_stage_not_to_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    config = tiny_config("routed", hidden_dropout=0.0, attention_dropout=0.0)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    init = f"train.init={json.dumps(str(folder))}"
    recipe = tiny_recipe(tmp_path, "routed", "sft", init, "model.hidden_dropout=0.2")
    assert recipe.model.hidden_dropout == 0.2  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="n_layers"):
        tiny_recipe(tmp_path, "routed", "sft", init, "model.n_layers=7")
