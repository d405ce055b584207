"""The mixture design against vectors of the published model: forward, losses, and decoding through the decoder.

Every `<prefix>_{config,golden}.json` with `<prefix>_{weights,golden}.safetensors` of this design in
tests/data/reference is tried, and in each directory that the environment variable RLM_GOLDEN_DIRS names.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import MixtureConfig
from rlm_engine.decoding.mixture import MixtureDecoder
from rlm_engine.models.mixture import MixtureModel
from rlm_engine.published import mixture as published

DIRECTORIES = [
    Path(__file__).parent / "data" / "reference",
    *map(Path, filter(None, os.environ.get("RLM_GOLDEN_DIRS", "").split(os.pathsep))),
]


def is_mixture(prefix: str) -> bool:
    with safe_open(f"{prefix}_weights.safetensors", "np") as file:
        return published.matches({}, dict.fromkeys(file.keys(), ()))


PREFIXES = [
    prefix
    for directory in DIRECTORIES
    for prefix in sorted(str(p).removesuffix("_golden.json") for p in directory.glob("*_golden.json"))
    if is_mixture(prefix)
]
by_prefix = pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: Path(prefix).name)
TOLERANCE = 1e-3


@dataclass
class Golden:
    model: MixtureModel
    config: MixtureConfig
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


@functools.cache
def load(prefix: str, dtype: torch.dtype = torch.float32) -> Golden:
    weights = load_file(f"{prefix}_weights.safetensors")
    data = json.loads(Path(f"{prefix}_config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    assert published.matches(data, shapes)
    config = published.config(data, shapes, prefix)
    model = MixtureModel(config).to(dtype).eval()
    tensors = published.tensors(config, weights)
    model.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    facts = json.loads(Path(f"{prefix}_golden.json").read_text())
    return Golden(model, config, load_file(f"{prefix}_golden.safetensors"), facts)


def cases_with(golden: Golden, field: str) -> list[str]:
    names = [key.removesuffix(f".{field}") for key in golden.arrays if key.endswith(f".{field}")]
    assert names, f"no case has {field}"
    return names


@pytest.fixture(scope="module", params=PREFIXES, ids=lambda prefix: Path(prefix).name)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


def run(golden: Golden, name: str, batch: str = "published", **options: Any):  # type: ignore[no-untyped-def]
    ids = torch.from_numpy(golden.arrays[f"{name}.input_ids"])
    mask = golden.arrays.get(f"{name}.attention_mask")
    with torch.no_grad():
        return golden.model(
            ids, attention_mask=None if mask is None else torch.from_numpy(mask), batch=batch, **options
        )


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


def test_vectors_are_there() -> None:
    assert PREFIXES


def test_logits_steps_and_router_of_every_case(golden: Golden) -> None:
    for case in golden.facts["cases"]:
        name = case["name"]
        if f"{name}.logits" not in golden.arrays:
            continue
        out = run(golden, name)
        np.testing.assert_array_equal(out.steps.numpy(), golden.arrays[f"{name}.steps"], err_msg=name)
        close(out.logits, golden.arrays[f"{name}.logits"])
        close(out.router_probabilities, golden.arrays[f"{name}.router_probs"], 1e-4)
        close(out.computation_loss, golden.arrays[f"{name}.computation_loss"][0], 1e-5)


def test_intermediate_states(golden: Golden) -> None:
    for name in cases_with(golden, "hidden_final"):
        states = run(golden, name, keep_states=True).states
        expected = ["hidden_embed", *(f"hidden_layer{n}" for n in range(golden.config.n_layers)), "hidden_final"]
        for state, key in zip(states, expected, strict=True):
            close(state, golden.arrays[f"{name}.{key}"])


def test_rows_alone_differ_from_the_batch_and_match_the_vectors(golden: Golden) -> None:
    for name in cases_with(golden, "logits_each_row_alone"):
        alone, batched = run(golden, name, batch="rows"), run(golden, name)
        np.testing.assert_array_equal(alone.steps.numpy(), golden.arrays[f"{name}.steps_each_row_alone"])
        close(alone.logits, golden.arrays[f"{name}.logits_each_row_alone"])
        effect = (alone.logits - batched.logits).abs().amax(dim=(1, 2))
        close(effect, np.array(golden.facts["notes"][f"batch_effect_{name}_max_abs"]), 2 * TOLERANCE)


@by_prefix
def test_float64_logits(prefix: str) -> None:
    golden = load(prefix, torch.float64)
    for name in cases_with(golden, "logits_f64"):
        close(run(golden, name).logits, golden.arrays[f"{name}.logits_f64"], 1e-9)


def test_left_padding_gives_numbers_and_leaves_full_rows_alone(golden: Golden) -> None:
    for name in cases_with(golden, "logits_nan_as_zero"):
        assert torch.isfinite(run(golden, name).logits).all()
        # Each row alone: the original's batch-mates stop where they turn into NaN, ours go on and would be felt.
        out = run(golden, name, batch="rows")
        (case,) = [c for c in golden.facts["cases"] if c["name"] == name]
        whole = [row for row, broken in enumerate(case["nan_rows"]) if not broken]
        close(out.logits[whole], golden.arrays[f"{name}.logits_nan_as_zero"][whole])


def test_training_loss(golden: Golden) -> None:
    for name in cases_with(golden, "total_loss"):
        targets = torch.from_numpy(golden.arrays[f"{name}.targets"])
        counted = torch.from_numpy(golden.arrays[f"{name}.attention_mask"]).bool()
        out = run(golden, name, labels=targets.masked_fill(~counted, -100))
        close(out.lm_loss, golden.arrays[f"{name}.lm_loss"][0], 1e-5)
        close(out.loss, golden.arrays[f"{name}.total_loss"][0], 1e-5)


def test_parameter_count(golden: Golden) -> None:
    assert sum(p.numel() for p in golden.model.parameters()) == golden.facts["parameter_count"]


def test_greedy_continuations_and_their_steps_through_the_decoder(golden: Golden) -> None:
    for entry in golden.facts["greedy"]:
        decoder = MixtureDecoder(TorchBackend(golden.model.pieces(), torch.float32), golden.config)
        tokens, fed = list(entry["prompt"]), list(entry["prompt"])
        for steps in entry["per_step_choice"]:
            result = decoder.feed([fed])
            assert list(result.traces[0].steps) == steps
            assert result.traces[0].depth == pytest.approx(np.mean(steps))
            fed = [int(result.logits[0].argmax())]
            tokens += fed
        assert tokens == entry["output"]
        assert decoder.dropped(0) == max(0, len(tokens) - 1 - golden.config.context_length)


@pytest.mark.parametrize(("vocabulary", "positions", "count"), [(32_000, 128, 41_401_758), (31_985, 127, 41_389_854)])
def test_full_size_parameter_counts(vocabulary: int, positions: int, count: int) -> None:
    config = MixtureConfig(
        vocab_size=vocabulary, d_model=384, n_heads=6, eos_token_id=7, context_length=positions, tokenizer="technical"
    )
    with torch.device("meta"):
        model = MixtureModel(config)
    assert sum(p.numel() for p in model.parameters()) == count
