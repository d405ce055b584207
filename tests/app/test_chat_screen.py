"""The real application, driven by keys, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from scripted_engine import DEPTHS, STORY
from textual import events
from textual.geometry import Offset
from textual.pilot import Pilot
from textual.selection import Selection
from textual.widgets import Static

from rlm_chat import clipboard
from rlm_chat.session import Mode, Session, State
from rlm_chat.settings import Settings
from rlm_chat.tui.app import ChatApp
from rlm_chat.tui.screens.chat import ChatScreen
from rlm_chat.tui.widgets.bars import DepthLegend, StatusLine, TopBar


class Driver:
    """A running application and what a test asks of it."""

    def __init__(self, app: ChatApp, pilot: Pilot[int], engine: FakeEngine):
        self.app, self.pilot, self.engine = app, pilot, engine

    @property
    def screen(self) -> ChatScreen:
        assert isinstance(self.app.screen, ChatScreen)
        return self.app.screen

    @property
    def session(self) -> Session:
        return self.app.session

    @property
    def text(self) -> str:
        return self.screen.transcript.text

    @property
    def status(self) -> str:
        return str(self.screen.query_one(StatusLine).content)

    async def settle(self) -> None:
        """Wait until the engine rests (or holds) and all is painted."""
        for _ in range(3000):
            await self.pilot.pause(0.01)
            if self.engine.holding.is_set() or self.session.state in (State.READY, State.FAILED):
                break
        await self.pilot.pause(0.12)  # two repaints

    async def send(self, text: str) -> None:
        self.screen.prompt.insert(text)
        await self.pilot.press("enter")
        await self.settle()


@asynccontextmanager
async def running(
    engine: FakeEngine, size: tuple[int, int] = (80, 24), settings: Settings | None = None, model: str = "chat"
) -> AsyncIterator[Driver]:
    session = Session(engine, {Mode.CHAT: model, Mode.CONTINUE: "base"})
    app = ChatApp(session, settings or Settings())
    async with app.run_test(size=size) as pilot:
        driver = Driver(app, pilot, engine)
        await driver.settle()
        yield driver


# -- sending and streaming


async def test_a_message_is_sent_and_its_reply_shown_with_its_depth() -> None:
    async with running(FakeEngine()) as driver:
        await driver.send("Tell me a story")
        assert driver.engine.prompts == [[{"role": "user", "content": "Tell me a story"}]]
        assert f"You\nTell me a story\n\nact-23m-chat\n{STORY}\n" in driver.text
        assert "depth" in driver.text.splitlines()[-1]
        assert driver.screen.prompt.text == ""
        assert driver.status.strip().startswith("● ready")


async def test_tokens_appear_while_the_model_is_writing() -> None:
    async with running(FakeEngine(hold_after=6)) as driver:
        await driver.send("Hi")
        assert driver.text.rstrip().endswith("Once there was a lighthouse")
        assert "writing · 6 tokens · depth" in driver.status
        strip = driver.screen.strip.render_line(0).text.rstrip()
        assert len(strip) == 6
        await driver.pilot.press("escape")


async def test_every_token_has_the_colour_of_its_depth() -> None:
    from rlm_chat.tui import palette

    async with running(FakeEngine("alpha beta gamma")) as driver:
        await driver.send("Hi")
        line = next(
            strip
            for strip in (driver.screen.transcript.render_line(y) for y in range(10))
            if strip.text.strip().startswith("alpha")
        )
        colours = {s.text: s.style.color.triplet.hex for s in line if s.text.strip() and s.style and s.style.color}
        for i, word in enumerate(["alpha", "beta", "gamma"]):
            expected = palette.colour(float(DEPTHS[(i * 7) % len(DEPTHS)]), 8)
            assert colours[word if word in colours else f" {word}"] == expected


async def test_the_first_frame_does_not_wait_for_the_model() -> None:
    engine = FakeEngine()
    engine.loading.clear()
    session = Session(engine, {Mode.CHAT: "chat", Mode.CONTINUE: "base"})
    app = ChatApp(session, Settings())
    async with app.run_test(size=(80, 24)) as pilot:
        driver = Driver(app, pilot, engine)
        await pilot.pause(0.1)
        assert "loading chat …" in driver.status
        await pilot.press(*"Hi", "enter")
        assert driver.screen.prompt.text == "Hi"  # kept until it can be sent
        assert "still loading" in driver.status
        engine.loading.set()
        await driver.settle()
        await pilot.press("enter")
        await driver.settle()
        assert STORY in driver.text


async def test_model_text_is_never_markup() -> None:
    text = "[red]no[/red] [/INST] [@click=app.quit]x[/] **bold**"
    async with running(FakeEngine(text)) as driver:
        await driver.send("[bold]Hi[/bold] [/nope]")
        assert text in driver.text
        assert "[bold]Hi[/bold] [/nope]" in driver.text


# -- stopping and quitting


async def test_escape_stops_and_keeps_the_partial_reply() -> None:
    async with running(FakeEngine(hold_after=4)) as driver:
        await driver.send("Hi")
        await driver.pilot.press("escape")
        await driver.settle()
        assert driver.engine.cancelled
        assert "Once there was a\n■ stopped · 4 tokens" in driver.text
        await driver.send("Again")  # and the next message works
        assert driver.text.count("You\n") == 2


async def test_ctrl_c_stops_first_and_quits_the_second_time() -> None:
    async with running(FakeEngine(hold_after=4)) as driver:
        await driver.send("Hi")
        await driver.pilot.press("ctrl+c")
        await driver.settle()
        assert driver.engine.cancelled
        assert driver.app.is_running
        assert "Ctrl+C again quits" in driver.status
        await driver.pilot.press("ctrl+c")
        await driver.pilot.pause()
        assert not driver.app.is_running or driver.app._exit


async def test_two_slow_ctrl_c_do_not_quit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_chat.tui.screens.chat.QUIT_WITHIN_S", 0.1)
    async with running(FakeEngine()) as driver:
        await driver.pilot.press("ctrl+c")
        await driver.pilot.pause(0.25)
        assert "again" not in driver.status
        await driver.pilot.press("ctrl+c")
        await driver.pilot.pause(0.05)
        assert not driver.app._exit


async def test_ctrl_c_copies_a_selection_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    monkeypatch.setattr(clipboard, "copy", lambda text: copied.append(text) or "testclip")
    async with running(FakeEngine()) as driver:
        await driver.send("Hi")
        transcript = driver.screen.transcript
        driver.screen.selections = {transcript: Selection(Offset(2, 4), Offset(16, 5))}
        await driver.pilot.press("ctrl+c")
        await driver.pilot.pause()
        # two lines on the screen, one in the text: the wrap is not copied, nor is the gutter
        assert copied == [STORY[: STORY.index("climbed the hu") + len("climbed the hu")]]
        assert not driver.app._exit


# -- typing


async def test_ctrl_j_makes_a_new_line_and_enter_sends() -> None:
    async with running(FakeEngine("Ok.")) as driver:
        await driver.pilot.press("a", "ctrl+j", "b")
        assert driver.screen.prompt.text == "a\nb"
        await driver.pilot.press("enter")
        await driver.settle()
        assert driver.engine.prompts == [[{"role": "user", "content": "a\nb"}]]


async def test_the_send_key_can_be_swapped() -> None:
    async with running(FakeEngine("Ok."), settings=Settings(send_key="ctrl+j")) as driver:
        await driver.pilot.press("a", "enter", "b", "ctrl+j")
        await driver.settle()
        assert driver.engine.prompts == [[{"role": "user", "content": "a\nb"}]]


async def test_pasted_lines_stay_one_message_and_lose_their_escapes() -> None:
    async with running(FakeEngine("Ok.")) as driver:
        driver.app.post_message(events.Paste("one\r\ntwo\r\x1b[31mthree\x1b[0m"))
        await driver.pilot.pause()
        assert driver.screen.prompt.text == "one\ntwo\nthree"
        assert driver.engine.prompts == []


async def test_up_recalls_what_was_sent_and_down_returns_to_the_draft() -> None:
    async with running(FakeEngine("Ok.")) as driver:
        await driver.send("first")
        await driver.send("second")
        await driver.pilot.press(*"draft", "up")
        assert driver.screen.prompt.text == "second"
        await driver.pilot.press("up", "up")
        assert driver.screen.prompt.text == "first"
        await driver.pilot.press("down", "down")
        assert driver.screen.prompt.text == "draft"


async def test_an_empty_message_is_not_sent() -> None:
    async with running(FakeEngine()) as driver:
        await driver.pilot.press("space", "enter")
        assert driver.engine.prompts == []


async def test_typing_finds_the_prompt_from_the_transcript() -> None:
    async with running(FakeEngine("Ok.")) as driver:
        await driver.send("Hi")
        driver.screen.transcript.focus()
        await driver.pilot.press("x")
        assert driver.screen.focused is driver.screen.prompt
        assert driver.screen.prompt.text == "x"


# -- modes, depth, views


async def test_continue_writes_one_document() -> None:
    async with running(FakeEngine(" and it rained.")) as driver:
        await driver.pilot.press("ctrl+t")
        await driver.settle()
        assert driver.engine.loads == ["chat", "base"]
        assert "[Continue]" in str(driver.screen.query_one(TopBar).content)
        await driver.send("It was dark")
        await driver.send("")
        assert driver.text.startswith("It was dark and it rained. and it rained.\n")
        assert "You" not in driver.text


async def test_the_mode_can_be_clicked() -> None:
    async with running(FakeEngine()) as driver:
        await driver.pilot.click(TopBar, offset=(20, 0))
        await driver.settle()
        assert driver.session.mode is Mode.CONTINUE


async def test_a_model_without_chat_format_offers_only_continue() -> None:
    async with running(FakeEngine(can_chat=False)) as driver:
        bar = str(driver.screen.query_one(TopBar).content)
        assert "Chat" not in bar.replace("rlm-chat", "")
        assert "[Continue]" in bar
        assert "no chat format" in driver.status


async def test_the_depth_limit_changes_while_writing() -> None:
    async with running(FakeEngine(hold_after=4)) as driver:
        await driver.send("Hi")
        await driver.pilot.press("f3", "ctrl+down", "f4")
        await driver.pilot.pause()
        assert driver.session.max_steps == 7
        assert "limit 7" in str(driver.screen.query_one(DepthLegend).content)
        driver.screen.transcript.focus()
        await driver.pilot.press("[", "[", "[", "[", "[", "]")
        assert driver.engine.depths[-1] == {"max_steps": 3}
        driver.engine.go.set()
        await driver.settle()
        assert max(t.depth for t in driver.session.turns[Mode.CHAT][-1].tokens[4:]) == 3.0


async def test_f2_changes_how_depth_is_shown() -> None:
    async with running(FakeEngine("alpha")) as driver:
        await driver.send("Hi")

        def style() -> tuple[str | None, str | None]:
            for y in range(10):
                for segment in driver.screen.transcript.render_line(y):
                    if segment.text == "alpha" and segment.style:
                        colour, ground = segment.style.color, segment.style.bgcolor
                        return colour and colour.name, ground and ground.name
            raise AssertionError("the reply is not on the screen")

        ink = style()
        await driver.pilot.press("f2")
        heat = style()
        await driver.pilot.press("f2")
        plain = style()
        assert len({ink, heat, plain}) == 3
        assert ink[1] == plain[1] != heat[1]
        await driver.pilot.press("f2")
        assert style() == ink


async def test_ctrl_n_begins_anew() -> None:
    async with running(FakeEngine("Ok.")) as driver:
        await driver.send("Hi")
        await driver.pilot.press("ctrl+n")
        await driver.pilot.pause(0.1)
        assert driver.text == ""
        await driver.send("Hello")
        assert driver.engine.prompts[-1] == [{"role": "user", "content": "Hello"}]


# -- scrolling and sizes


async def test_new_text_is_followed_only_at_the_bottom() -> None:
    engine = FakeEngine(" ".join([STORY] * 6), hold_after=300)
    async with running(engine) as driver:
        await driver.send("Hi")
        transcript = driver.screen.transcript
        assert transcript.scroll_y == transcript.max_scroll_y > 10
        await driver.pilot.press("pageup")
        await driver.pilot.pause()
        where = transcript.scroll_y
        assert "more text below" in str(driver.screen.query_one("#depth").border_title)
        engine.go.set()
        await driver.settle()
        assert transcript.scroll_y == where < transcript.max_scroll_y
        await driver.pilot.press("ctrl+end")
        await driver.pilot.pause()
        assert transcript.scroll_y == transcript.max_scroll_y
        assert "below" not in str(driver.screen.query_one("#depth").border_title)


async def test_following_starts_again_at_the_bottom() -> None:
    """Textual's own anchor does not (Textualize/textual#6677)."""
    engine = FakeEngine(" ".join([STORY] * 6), hold_after=300)
    async with running(engine) as driver:
        await driver.send("Hi")
        await driver.pilot.press("pageup", "pageup", "pagedown", "pagedown")
        await driver.pilot.pause()
        engine.go.set()
        await driver.settle()
        transcript = driver.screen.transcript
        assert transcript.scroll_y == transcript.max_scroll_y


async def test_resizing_keeps_the_text_and_the_end_in_view() -> None:
    engine = FakeEngine(" ".join([STORY] * 3), hold_after=200)
    async with running(engine, (120, 40)) as driver:
        await driver.send("Hi")
        for size in [(60, 20), (200, 60), (41, 11), (80, 24)]:
            await driver.pilot.resize_terminal(*size)
            await driver.pilot.pause(0.1)
            transcript = driver.screen.transcript
            assert transcript.scroll_y == transcript.max_scroll_y
            shown = [transcript.render_line(y).text for y in range(transcript.size.height)]
            assert any(line.strip() for line in shown)
            assert all(len(line) == transcript.size.width for line in shown)
        engine.go.set()
        await driver.settle()
        assert " ".join([STORY] * 3) in driver.text


@pytest.mark.parametrize("size", [(39, 24), (80, 9), (10, 3), (1, 1)])
async def test_too_small_is_said_and_nothing_breaks(size: tuple[int, int]) -> None:
    async with running(FakeEngine(hold_after=5)) as driver:
        await driver.send("Hi")
        await driver.pilot.resize_terminal(*size)
        await driver.pilot.pause(0.1)
        notice = driver.screen.query_one("#too-small", Static)
        assert notice.display
        assert f"too small: {size[0]}x{size[1]}" in str(notice.content)
        assert not driver.screen.prompt.display
        driver.engine.go.set()
        await driver.settle()
        await driver.pilot.resize_terminal(80, 24)
        await driver.pilot.pause(0.1)
        assert not notice.display
        assert STORY in driver.text


# -- when things go wrong


async def test_a_model_that_cannot_be_loaded_is_explained() -> None:
    async with running(FakeEngine(broken="chat")) as driver:
        welcome = str(driver.screen.query_one("#welcome", Static).content)
        assert "chat: neither a bundled model (chat) nor a model directory" in welcome
        assert "Ctrl+Q quits" in welcome
        await driver.send("Hi")
        assert driver.engine.prompts == []
        await driver.pilot.press("ctrl+q")
        assert driver.app._exit


async def test_a_crash_is_said_below_the_partial_reply() -> None:
    engine = FakeEngine()
    engine.crash_after = 4
    async with running(engine) as driver:
        await driver.send("Hi")
        assert "Once there was a\n× the engine stopped unexpectedly (signal SIGSEGV): last line · 4 tokens" in (
            driver.text.replace("\n  ", " ")
        )
        assert "started again" in driver.status
        engine.crash_after = None
        await driver.send("Again")
        assert STORY in driver.text


async def test_dropped_text_is_said() -> None:
    engine = FakeEngine("Ok.")
    engine.dropped = 40
    async with running(engine) as driver:
        await driver.send("Hi")
        assert "the oldest 40 tokens no longer fit" in driver.text


async def test_a_broken_settings_file_is_a_notice(tmp_path: Path) -> None:
    engine = FakeEngine()
    session = Session(engine, {Mode.CHAT: "chat", Mode.CONTINUE: "base"})
    app = ChatApp(session, Settings(), "settings.toml: [bold]theme must be a text[/bold]")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause(0.1)
        assert [n.message for n in app._notifications] == ["settings.toml: [bold]theme must be a text[/bold]"]


async def test_an_unknown_theme_is_a_notice() -> None:
    async with running(FakeEngine(), settings=Settings(theme="puce")) as driver:
        assert driver.app.theme == "rlm-dark"
        assert "no theme 'puce'" in next(iter(driver.app._notifications)).message


# -- cost


async def test_a_long_reply_is_painted_at_most_twenty_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("word " * 600)
    paints = 0

    async with running(engine) as driver:
        extend = driver.screen.transcript.extend

        def counted(tokens: list[object]) -> None:
            nonlocal paints
            paints += bool(tokens)
            extend(tokens)  # type: ignore[arg-type]

        monkeypatch.setattr(driver.screen.transcript, "extend", counted)
        original = engine._write

        async def paced(depth: dict[str, object]) -> AsyncIterator[object]:
            async for event in original(depth):
                await asyncio.sleep(0.001)
                yield event

        monkeypatch.setattr(engine, "_write", paced)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await driver.send("Hi")
        while driver.session.busy:
            await asyncio.sleep(0.01)
        await driver.pilot.pause(0.1)
        assert paints <= (loop.time() - started) * 20 + 3
        assert driver.text.count("word") == 600


async def test_an_idle_screen_has_no_running_timer() -> None:
    async with running(FakeEngine()) as driver:
        await driver.send("Hi")
        painter = driver.screen._painter
        assert painter is not None and not painter._active.is_set()
