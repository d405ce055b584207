"""TensorBoard's events hold what metrics.jsonl holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import run, tiny_recipe, write_prepared

pytest.importorskip("tensorboard")


def test_events_have_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = write_prepared(tmp_path / "data")
    heldout = f"data.heldout={json.dumps(str(data))}"
    recipe = tiny_recipe(
        data, "act", "pretrain", heldout, "train.tensorboard=true", "train.most_steps=6", "train.validate_every=3"
    )
    losses = run(recipe, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = events.Scalars("loss")
    assert [event.step for event in written] == list(range(6))
    assert [event.value for event in written] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("heldout/text")] == [2, 5]
    assert {"depth", "lr_scale", "grad_norm"} <= set(events.Tags()["scalars"])
