"""Schedules are functions of the step alone, and the published ones are torch's."""

from __future__ import annotations

import pytest
import torch

from rlm_engine.errors import UsageError
from rlm_training.schedule import PonderConfig, ScheduleConfig


@pytest.mark.parametrize("warmup", [0.05, 0.1, 0.3])
def test_onecycle_is_torchs(warmup: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=60, pct_start=warmup)
    ours = ScheduleConfig(name="onecycle", warmup=warmup, cycle_momentum=True)
    for step in range(60):
        assert ours.scale(step, 60) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        assert ours.beta1(step, 60) == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=1e-9)
        optimizer.step()
        if step < 59:
            theirs.step()


def test_wsd_warms_up_stays_and_decays() -> None:
    wsd = ScheduleConfig(warmup=0.1, decay=0.4, final=0.05)
    scales = [wsd.scale(step, 100) for step in range(100)]
    assert scales[0] == pytest.approx(1 / 11) and scales[:11] == sorted(scales[:11])
    assert set(scales[10:61]) == {1.0}
    assert scales[60:] == sorted(scales[60:], reverse=True)
    assert wsd.scale(100, 100) == pytest.approx(0.05)


def test_cosine_halves_in_the_middle_and_constant_stays() -> None:
    assert ScheduleConfig(name="cosine", warmup=0, final=0).scale(50, 100) == pytest.approx(0.5)
    assert ScheduleConfig(name="constant", warmup=0.1).scale(99, 100) == 1.0


def test_price_rises_linearly_and_depth_and_memory_by_stages() -> None:
    ponder = PonderConfig(
        growth=((0.0, 2), (0.3, 4), (0.6, 8)),
        memory=((0.0, 0), (0.85, 512), (0.95, 1024)),
        price=0.01,
        price_from=0.5,
        price_full=0.7,
        gate_from=0.97,
    )
    assert [ponder.max_steps(s, 100) for s in (0, 29, 30, 60, 99)] == [2, 2, 4, 8, 8]
    assert [ponder.memory_tokens(s, 100) for s in (84, 85, 99)] == [0, 512, 1024]
    assert [ponder.price_at(s, 100) for s in (50, 60, 70, 99)] == pytest.approx([0, 0.005, 0.01, 0.01])
    assert ponder.gate_step(100) == 97 and PonderConfig().gate_step(100) == 100


@pytest.mark.parametrize(
    "values",
    [{"growth": ((0.1, 2),)}, {"memory": ((0.5, 8), (0.0, 0))}, {"gate_from": 0.0}, {"memory_documents": True}],
)
def test_impossible_ponder_schedules_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PonderConfig(**values)  # type: ignore[arg-type]
