"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from rlm_training.compute import duration

PLAIN_EVERY = 20  # steps


class Display(Protocol):
    """Shows a run."""

    def running(self, start: int, steps: int) -> contextlib.AbstractContextManager[None]:
        """Around the run: it goes from step `start` to `steps`."""
        ...

    def step(self, values: dict[str, Any]) -> None:
        """A step's metrics."""
        ...

    def note(self, text: str) -> None:
        """Something the person should read."""
        ...


class Silent:
    """Shows nothing: the other processes of a distributed run, and tests."""

    def running(self, start: int, steps: int) -> contextlib.AbstractContextManager[None]:
        """See `Display`."""
        return contextlib.nullcontext()

    def step(self, values: dict[str, Any]) -> None:
        """See `Display`."""

    def note(self, text: str) -> None:
        """See `Display`."""


class Pace:
    """How long the rest takes, by a moving average of the steps' times."""

    def __init__(self, steps: int):
        self._steps, self._seconds_per_step = steps, 0.0
        self._last: float | None = None

    def remaining(self, step: int, now: float) -> str:
        """The time left after a step, empty while nothing is known."""
        if self._last is not None:
            took = now - self._last
            self._seconds_per_step = took if not self._seconds_per_step else 0.95 * self._seconds_per_step + 0.05 * took
        self._last = now
        left = (self._steps - step - 1) * self._seconds_per_step
        return duration(left) if self._seconds_per_step else ""


def figures(values: dict[str, Any]) -> dict[str, str]:
    """The numbers of a step as a person reads them; only those it has."""
    shown = {
        "loss": f"{values['loss']:.3f}",
        "depth": f"{values['depth']:.2f}/{values['budget']}",
        "lr": f"x{values['lr_scale']:.2f}",
        "tokens/s": f"{values['tokens_per_s']:,.0f}",
    }
    if "mfu" in values:
        shown["MFU"] = f"{100 * values['mfu']:.0f} %"
    if "accuracy" in values:
        shown["preferred"] = f"{100 * values['accuracy']:.0f} %"
    return shown


class Lines:
    """A line every 20 steps, and at every validation."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._pace = Pace(0)

    @contextlib.contextmanager
    def running(self, start: int, steps: int) -> Iterator[None]:
        """See `Display`."""
        self._pace = Pace(steps)
        yield

    def step(self, values: dict[str, Any]) -> None:
        """See `Display`."""
        remaining = self._pace.remaining(values["step"], time.monotonic())
        if values["step"] % PLAIN_EVERY and "heldout" not in values:
            return
        line = f"step {values['step']:6}  " + "  ".join(f"{name} {text}" for name, text in figures(values).items())
        if remaining:
            line += f"  left {remaining}"
        if "heldout" in values:
            line += "  held out " + " ".join(f"{name} {loss:.2f}" for name, loss in values["heldout"].items())
        print(line, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """See `Display`."""
        print(text, file=self._stream, flush=True)


class Panel:
    """A progress bar with the run's figures, repainted in place (rich, which Textual brings along)."""

    def __init__(self, title: str, console: Any = None):
        from rich.console import Console

        self._title, self._console = title, console or Console()
        self._pace, self._steps, self._heldout = Pace(0), 0, ""
        self._live: Any = None

    @contextlib.contextmanager
    def running(self, start: int, steps: int) -> Iterator[None]:
        """See `Display`."""
        from rich.live import Live

        self._pace, self._steps = Pace(steps), steps
        with Live(console=self._console, refresh_per_second=4, transient=False) as live:
            self._live = live
            yield
            self._live = None

    def step(self, values: dict[str, Any]) -> None:
        """See `Display`."""
        if "heldout" in values:
            losses = values["heldout"]
            mean = sum(losses.values()) / len(losses)
            each = "  ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
            self._heldout = f"{mean:.3f} ({each})"
        if self._live is not None:
            self._live.update(self._render(values))

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(text, markup=False, highlight=False)

    def _render(self, values: dict[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done, steps = values["step"] + 1, self._steps
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        left = self._pace.remaining(values["step"], time.monotonic())
        end = f"{done:,}/{steps:,}" + (f"  {left} left" if left else "")
        bar.add_row(Text(self._title), ProgressBar(total=steps, completed=done), Text(end))
        row = "   ".join(f"{name} {text}" for name, text in figures(values).items())
        lines: list[Any] = [bar, Text(row)]
        if self._heldout:
            lines.append(Text(f"held out {self._heldout}"))
        return Group(*lines)


def display_for(title: str, leads: bool) -> Display:
    """The panel on a terminal, lines elsewhere, silence in the processes that do not lead."""
    if not leads:
        return Silent()
    return Panel(title) if sys.stdout.isatty() else Lines()
