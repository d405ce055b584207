"""What a person sees of a run."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from rlm_training.display import Lines, Pace, Panel, Silent, display_for


def _values(step: int, **more: Any) -> dict[str, Any]:
    values = {"step": step, "loss": 3.14159, "depth": 5.25, "budget": 8, "lr_scale": 0.5, "tokens_per_s": 12345.6}
    return values | {"mfu": 0.515} | more


def test_lines_come_every_20_steps_and_at_validations() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    with lines.running(0, 100):
        for step in range(45):
            more = {"heldout": {"books": 4.0, "chat": 3.5}} if step == 30 else {}
            lines.step(_values(step, **more))
        lines.note("something happened")
    text = stream.getvalue().splitlines()
    assert [line.split()[1] for line in text[:-1]] == ["0", "20", "30", "40"]
    assert "loss 3.142" in text[0] and "depth 5.25/8" in text[0] and "12,346" in text[0] and "MFU 52 %" in text[0]
    assert "left" not in text[0] and "left" in text[1]
    assert "held out books 4.00 chat 3.50" in text[2]
    assert text[-1] == "something happened"


def test_panel_shows_the_figures_and_the_last_validation() -> None:
    stream = io.StringIO()
    panel = Panel("act-15m", Console(file=stream, force_terminal=True, width=120, color_system=None))
    with panel.running(0, 50):
        panel.step(_values(9, heldout={"books": 4.0, "chat": 3.0}))
        panel.step(_values(10, accuracy=0.75))
        panel.note("a [note] kept as it is")
    text = stream.getvalue()
    assert "act-15m" in text and "11/50" in text and "loss 3.142" in text and "MFU 52 %" in text
    assert "held out 3.500 (books 4.00  chat 3.00)" in text and "preferred 75 %" in text
    assert "a [note] kept as it is" in text


def test_the_time_left_follows_the_pace() -> None:
    pace = Pace(100)
    assert pace.remaining(0, 10.0) == ""
    assert pace.remaining(1, 12.0) == "3 min"  # 98 steps of 2 s
    assert pace.remaining(98, 14.0) == "2 s"


def test_only_the_leading_process_speaks() -> None:
    assert isinstance(display_for("x", leads=False), Silent)
    assert isinstance(display_for("x", leads=True), Lines)  # no terminal here
