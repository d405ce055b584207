"""What the application looks like, pixel for pixel; `pytest --snapshot-update` accepts a new look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_engine import FakeEngine
from textual.pilot import Pilot

from rlm_chat.session import Mode, Session, State
from rlm_chat.settings import Settings
from rlm_chat.tui.app import ChatApp
from rlm_chat.tui.screens.chat import ChatScreen
from rlm_chat.tui.widgets.prompt import PromptBox

SIZES = [(80, 24), (120, 40)]
Compare = Callable[..., bool]


@pytest.fixture(autouse=True)
def steady_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptBox, "cursor_blink", False)


def application(engine: FakeEngine, settings: Settings | None = None) -> ChatApp:
    return ChatApp(Session(engine, {Mode.CHAT: "chat", Mode.CONTINUE: "base"}), settings or Settings())


async def still(pilot: Pilot[int]) -> ChatScreen:
    """Wait for the engine and the paint."""
    app = pilot.app
    assert isinstance(app, ChatApp) and isinstance(app.screen, ChatScreen)
    engine = app.session.engine
    assert isinstance(engine, FakeEngine)
    for _ in range(3000):
        await pilot.pause(0.01)
        if engine.holding.is_set() or app.session.state in (State.READY, State.FAILED):
            break
    await pilot.pause(0.15)
    await pilot.pause()
    return app.screen


async def ask(pilot: Pilot[int], text: str) -> None:
    screen = await still(pilot)
    screen.prompt.insert(text)
    await pilot.press("enter")
    await still(pilot)


@pytest.mark.parametrize("size", SIZES)
def test_empty(snap_compare: Compare, size: tuple[int, int]) -> None:
    """The first thing a person sees."""

    async def run(pilot: Pilot[int]) -> None:
        await still(pilot)

    assert snap_compare(application(FakeEngine()), terminal_size=size, run_before=run)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", ["ink", "heat", "plain"])
def test_reply(snap_compare: Compare, size: tuple[int, int], view: str) -> None:
    """A finished reply in the three views."""

    async def run(pilot: Pilot[int]) -> None:
        await ask(pilot, "Tell me a story about the sea")

    app = application(FakeEngine(), Settings(depth_view=view))
    assert snap_compare(app, terminal_size=size, run_before=run)


def test_reply_in_the_light_theme(snap_compare: Compare) -> None:
    """Light themes have a palette of their own."""

    async def run(pilot: Pilot[int]) -> None:
        await ask(pilot, "Tell me a story about the sea")

    app = application(FakeEngine(), Settings(theme="rlm-light"))
    assert snap_compare(app, terminal_size=SIZES[0], run_before=run)


def test_reply_without_colour(snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR: greys and bars still tell the depth, bold and the bar tell who speaks."""
    monkeypatch.setenv("NO_COLOR", "1")

    async def run(pilot: Pilot[int]) -> None:
        await ask(pilot, "Tell me a story about the sea")

    assert snap_compare(application(FakeEngine()), terminal_size=SIZES[0], run_before=run)


def test_stopped_reply(snap_compare: Compare) -> None:
    """A stopped reply is marked."""

    async def run(pilot: Pilot[int]) -> None:
        await ask(pilot, "Tell me a story about the sea")
        await pilot.press("escape")
        await still(pilot)

    assert snap_compare(application(FakeEngine(hold_after=30)), terminal_size=SIZES[0], run_before=run)


@pytest.mark.parametrize("size", SIZES)
def test_continue(snap_compare: Compare, size: tuple[int, int]) -> None:
    """The document: the person's text is bold, the model's coloured; the depth limit is 5."""

    async def run(pilot: Pilot[int]) -> None:
        await still(pilot)
        await pilot.press("ctrl+t", "f3", "f3", "f3")
        await ask(pilot, "It was a dark and stormy night, and")
        await ask(pilot, "In the end")

    assert snap_compare(application(FakeEngine()), terminal_size=size, run_before=run)


def test_no_model(snap_compare: Compare) -> None:
    """A model that cannot be loaded."""

    async def run(pilot: Pilot[int]) -> None:
        await still(pilot)

    assert snap_compare(application(FakeEngine(broken="chat")), terminal_size=SIZES[0], run_before=run)


@pytest.mark.parametrize("size", [(44, 12), (38, 9)])
def test_small(snap_compare: Compare, size: tuple[int, int]) -> None:
    """A small terminal, and one that is too small."""

    async def run(pilot: Pilot[int]) -> None:
        await ask(pilot, "Tell me a story about the sea")

    assert snap_compare(application(FakeEngine()), terminal_size=size, run_before=run)
