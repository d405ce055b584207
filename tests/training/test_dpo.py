"""DPO: the published loss, a frozen reference that is computed once, and that it prefers what it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import run, tiny_config, tiny_recipe, write_prepared

from rlm_engine.checkpoint import write_model_directory
from rlm_engine.models import build_model
from rlm_training.designs import Plan
from rlm_training.distributed import World
from rlm_training.dpo import reference_log_probabilities
from rlm_training.micro import PairSteps
from rlm_training.objectives import PreferenceObjective
from rlm_training.preferences import PreferenceBatches, load_preferences
from rlm_training.recipe import Recipe
from rlm_training.stages import make_objective

CPU = torch.device("cpu")


def _start(folder: Path, seed: int = 1) -> Path:
    config = tiny_config("act")
    model = build_model(config).initialise(torch.Generator().manual_seed(seed))
    write_model_directory(folder, config, model.state_dict())
    return folder


def _objective(recipe: Recipe, seed: int) -> PreferenceObjective:
    model = build_model(tiny_config("act")).initialise(torch.Generator().manual_seed(seed))
    objective = make_objective(recipe, model)
    assert isinstance(objective, PreferenceObjective)
    return objective


@pytest.mark.parametrize("normalised", ["true", "false"])
def test_loss_and_gradient_are_rafailovs(tmp_path: Path, normalised: str) -> None:
    data = write_prepared(tmp_path / "data", 300)
    overrides = [f"dpo.length_normalised={normalised}", "dpo.beta=0.3", "dpo.sft_weight=0.2", "ponder.price=0.0"]
    recipe = tiny_recipe(data, "act", "dpo", *overrides)
    policy, frozen = _objective(recipe, 2), _objective(recipe, 1)
    pairs = PreferenceBatches(load_preferences(data), 24, 4, 1)
    reference = reference_log_probabilities(recipe, frozen, pairs, tmp_path, World())
    micro = PairSteps(pairs, reference).micros(0, 1, range(1), CPU)[0]
    loss, statistics = policy(micro, Plan(0, 4))

    batch, sums, means = pairs.batch(0), {}, []
    for name, half in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        for who, objective in (("policy", policy), ("frozen", frozen)):
            model = objective.model
            logits = model.head(model(torch.from_numpy(half.inputs)).hidden)
            logp = -F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(half.targets).flatten(), reduction="none")
            weights = torch.from_numpy(half.weights)
            total = (logp.view(weights.shape) * weights).sum(1)
            if (name, who) == ("chosen", "policy"):
                means.append(-total.sum() / weights.sum())
            sums[name, who] = total / weights.sum(1) if normalised == "true" else total
    margin = (sums["chosen", "policy"] - sums["chosen", "frozen"]) - (
        sums["rejected", "policy"] - sums["rejected", "frozen"]
    )
    expected = -F.logsigmoid(0.3 * margin).mean() + 0.2 * means[0]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    ours, plain = (torch.autograd.grad(x, policy.model.embedding.weight)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    assert float(statistics["accuracy"]) == pytest.approx(float((margin > 0).float().mean()))


def test_it_starts_at_log_2_learns_the_preference_and_reads_the_reference_back(tmp_path: Path) -> None:
    data, out = write_prepared(tmp_path / "data", 300), tmp_path / "run"
    init = f"train.init={json.dumps(str(_start(tmp_path / 'start')))}"
    recipe = tiny_recipe(data, "act", "dpo", init, "dpo.sft_weight=0.0", "train.most_steps=20", "train.micro_rows=2")
    losses = run(recipe, out)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < 0.5
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] > 0.8 and last["margin"] > 0

    with np.load(out / "reference.npz") as stored:
        key, values = str(stored["key"]), stored["log_probabilities"]
    assert values.shape == (200, 2)
    np.savez(out / "reference.npz", key=key, log_probabilities=values + 1.0)
    pairs = PreferenceBatches(load_preferences(data), 24, 4, 1, recipe.dpo.max_length_ratio)
    again = reference_log_probabilities(recipe, _objective(recipe, 1), pairs, out, World())
    np.testing.assert_array_equal(again, values + 1.0)  # same weights and pairs: read back, not computed
    other = reference_log_probabilities(recipe, _objective(recipe, 2), pairs, out, World())
    assert np.abs(other - values).max() > 1e-3
