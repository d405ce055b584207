"""Calibrating a halting head: what is chosen, what is written, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_act
from tiny_runs import write_prepared

from rlm_engine.checkpoint import read_model_directory, write_model_directory
from rlm_training.calibrate import FACTORS, TOLERANCE, Outcome, calibrate_halting, read_passages
from rlm_training.cli import main
from rlm_training.shards import load_sources


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny = tiny_act(3, torch.float32, vocab_size=64, context_length=40)
    write_model_directory(tmp_path / "model", replace(tiny.config, eos_token_id=0), tiny.state_dict())
    return tmp_path / "model"


def test_the_largest_factor_that_costs_next_to_nothing_is_written(model: Path, tmp_path: Path) -> None:
    prepared, heard = write_prepared(tmp_path / "data", tokens=3000), list[Outcome]()
    best = calibrate_halting(model, tmp_path / "out", prepared, ("text",), 800, heard.append)
    assert [one.factor for one in heard] == list(FACTORS)
    assert best == [one for one in heard if one.loss <= heard[0].loss + TOLERANCE][-1]
    assert len({one.depth for one in heard}) > 1
    config, before = read_model_directory(model)
    written, after = read_model_directory(tmp_path / "out")
    assert written.provenance["halting_factor"] == best.factor
    assert replace(written, provenance={}) == replace(config, provenance={})
    for name, tensor in before.items():
        factor = best.factor if name.startswith("halt.") else 1.0
        np.testing.assert_allclose(after[name], tensor * factor, rtol=1e-6)


def test_what_it_may_cost_is_the_callers_choice(model: Path, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "data", tokens=2000)
    assert calibrate_halting(model, tmp_path / "out", prepared, ("text",), 400, tolerance=99.0).factor == FACTORS[-1]


def test_a_fitted_head_stops_where_going_on_saves_less_than_its_price(model: Path, tmp_path: Path) -> None:
    prepared, depths = write_prepared(tmp_path / "data", tokens=2000), []
    for price in (-5.0, 5.0):  # no saving is below the first, none above the second
        outcome = calibrate_halting(model, tmp_path / f"{price}", prepared, ("text",), 400, price=price, factor=20.0)
        depths.append(outcome.depth)
        config, written = read_model_directory(tmp_path / f"{price}")
        assert config.provenance["halting_price"] == price and config.provenance["halting_factor"] == 20.0
        before = read_model_directory(model)[1]
        changed = {name for name in before if not np.array_equal(before[name], written[name])}
        assert changed == {"halt.weight", "halt.bias"}
    config = read_model_directory(model)[0]
    assert depths == [config.max_steps, config.min_steps]  # type: ignore[attr-defined]


def test_only_replies_count_in_conversations(model: Path, tmp_path: Path) -> None:
    sources, config = load_sources(write_prepared(tmp_path / "data", tokens=3000)), read_model_directory(model)[0]
    chat = next(one for one in sources.values() if one.kind == "chat")
    for passage in read_passages(chat, config, 500):
        assert len(passage.ids) == len(passage.counts) + 1 <= config.context_length + 1
        assert passage.ids[0] == config.eos_token_id and 0 < passage.counts.mean() < 1
    text = next(one for one in sources.values() if one.kind == "text")
    assert all(passage.counts.all() for passage in read_passages(text, config, 500))


def test_refusals_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = write_prepared(tmp_path / "data", tokens=1000)
    out = str(tmp_path / "out")
    options = ["calibrate", str(model), "--prepared", str(prepared), "--out", out]
    assert main([*options, "--sources", "nobody"]) == 4
    assert "no source 'nobody'" in capsys.readouterr().err
    assert main(["calibrate", "/does/not/exist", "--prepared", str(prepared), "--out", out]) == 3
    assert not (tmp_path / "out").exists()
