"""The one screen: top bar, transcript, depth, prompt, status."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import events, getters, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from rlm_chat.session import Mode, Session, State, Turn
from rlm_chat.settings import DEPTH_VIEWS, Settings
from rlm_chat.tui.messages import ModeChosen, PromptSent, SessionChanged
from rlm_chat.tui.widgets.bars import DepthLegend, StatusLine, TopBar
from rlm_chat.tui.widgets.depth_strip import DepthStrip
from rlm_chat.tui.widgets.prompt import PromptBox
from rlm_chat.tui.widgets.transcript import Transcript

REPAINTS_PER_S = 20
QUIT_WITHIN_S = 1.0
MIN_SIZE = (40, 10)


class ChatScreen(Screen[None]):
    """Shows a `Session` and passes on what the person does."""

    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (MIN_SIZE[0], "-wide-enough")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (MIN_SIZE[1], "-short"), (17, "-medium"), (28, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", key_display="Esc", id="chat.stop"),
        Binding("ctrl+t", "switch_mode", "Chat/Continue", id="chat.mode"),
        Binding("f2", "cycle_view", "Colours", key_display="F2", id="chat.view"),
        Binding("f3,ctrl+down", "depth(-1)", "Depth −", key_display="F3", id="chat.shallower"),
        Binding("f4,ctrl+up", "depth(1)", "Depth +", key_display="F4", id="chat.deeper"),
        Binding("ctrl+n", "new", "New", id="chat.new"),
        Binding("pageup", "scroll(-1)", "Scroll up", show=False, priority=True, id="chat.page_up"),
        Binding("pagedown", "scroll(1)", "Scroll down", show=False, priority=True, id="chat.page_down"),
        Binding("ctrl+end", "scroll_to_end", "Newest text", show=False, priority=True, id="chat.end"),
    ]

    transcript = getters.query_one(Transcript)
    prompt = getters.query_one(PromptBox)
    strip = getters.query_one(DepthStrip)
    status = getters.query_one(StatusLine)

    def __init__(self, session: Session, settings: Settings, notice: str | None = None):
        super().__init__()
        self.session = session
        self.settings = settings
        self._notice = notice
        self._painter: Timer | None = None
        self._painted = 0  # tokens of the last reply that are on the screen
        self._settled = True  # nothing of the last reply is left to paint
        self._shown: tuple[Mode, int] | None = None  # what the transcript shows: mode, number of turns
        self._interrupted_at = float("-inf")

    def compose(self) -> ComposeResult:
        yield TopBar()
        with Vertical(id="stage"):
            yield Static(id="welcome")
            yield Transcript()
        with Vertical(id="depth"):
            yield DepthStrip()
            yield DepthLegend()
        yield PromptBox(self.settings.send_key)
        yield StatusLine()
        yield Footer(compact=True, show_command_palette=False)
        yield Static(id="too-small")

    def on_mount(self) -> None:
        self.transcript.view = self.settings.depth_view
        self._painter = self.set_interval(1 / REPAINTS_PER_S, self._paint, pause=True)
        self.session.changed = self._announce
        self.prompt.focus()
        if self._notice:
            self.notify(self._notice, title="Settings", severity="warning", timeout=15, markup=False)
        self._show()
        self._load()

    def _announce(self) -> None:
        self.post_message(SessionChanged())

    @work(group="engine", exit_on_error=True)
    async def _load(self) -> None:
        await self.session.load()

    # -- what the person does

    @on(PromptSent)
    def send(self, message: PromptSent) -> None:
        """Hand the prompt to the session, or say why not; the text stays in the box until it is taken."""
        session = self.session
        if session.busy:
            self._hint("still writing; Esc stops it")
        elif session.state is State.LOADING:
            self._hint("the model is still loading")
        elif session.state is State.FAILED:
            self._hint("there is no model to answer")
        elif message.text.strip() or (session.mode is Mode.CONTINUE and session.turns[session.mode]):
            self.prompt.accept()
            session.notice = ""
            self._hint("")
            self._run_reply(message.text)

    @work(group="engine", exit_on_error=True)
    async def _run_reply(self, text: str) -> None:
        await self.session.send(text)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the keys that would do nothing now."""
        busy = self.session.busy
        possible = {
            "stop": busy,
            "switch_mode": not busy and len(self.session.modes) > 1,
            "new": not busy and bool(self.session.turns[self.session.mode]),
        }
        return True if possible.get(action, True) else None

    async def action_stop(self) -> None:
        """Esc: end the reply, keep what there is."""
        await self.session.stop()

    async def interrupt(self) -> None:
        """Ctrl+C: copy a selection, else stop, else ask for a second Ctrl+C, which quits."""
        selected = self.prompt.selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.clear_selection()
            return
        now = time.monotonic()
        if now - self._interrupted_at <= QUIT_WITHIN_S:
            self.app.exit()
            return
        self._interrupted_at = now
        self._hint("stopping · Ctrl+C again quits" if self.session.busy else "Ctrl+C again quits", QUIT_WITHIN_S)
        await self.session.stop()

    @on(ModeChosen)
    def choose_mode(self, message: ModeChosen) -> None:
        """A mode was clicked."""
        self._switch(Mode(message.mode))

    def action_switch_mode(self) -> None:
        """Change between Chat and Continue."""
        if self.session.busy:
            self._hint("still writing; Esc stops it")
        elif len(self.session.modes) == 1:
            self._hint("this model has no chat format; it continues texts")
        else:
            self._switch(Mode.CONTINUE if self.session.mode is Mode.CHAT else Mode.CHAT)

    @work(group="engine", exit_on_error=True)
    async def _switch(self, mode: Mode) -> None:
        await self.session.switch(mode)

    def action_cycle_view(self) -> None:
        """Letters coloured, background coloured, plain."""
        views = DEPTH_VIEWS
        self.transcript.view = views[(views.index(self.transcript.view) + 1) % len(views)]
        self._show_depth_title()

    async def action_depth(self, by: int) -> None:
        """Raise or lower the depth limit, now."""
        await self.session.change_depth(by)

    def action_new(self) -> None:
        """Begin a new conversation or document."""
        if not self.session.clear():
            self._hint("still writing; Esc stops it")

    def action_scroll(self, pages: int) -> None:
        """Page through the transcript wherever the focus is."""
        if pages < 0:
            self.transcript.scroll_page_up(animate=False)
        else:
            self.transcript.scroll_page_down(animate=False)

    def action_scroll_to_end(self) -> None:
        """Back to the newest text."""
        self.transcript.scroll_end(animate=False)

    def on_key(self, event: events.Key) -> None:
        """Typing goes to the prompt wherever the focus is."""
        if event.is_printable and event.character and self.focused is not self.prompt and event.character not in "[]":
            event.stop()
            self.prompt.focus()
            self.prompt.insert(event.character)

    # -- what the session says

    @on(SessionChanged)
    def session_changed(self) -> None:
        """Follow the session's state."""
        self._show()

    def _show(self) -> None:
        """Bring everything in line with the session."""
        session = self.session
        turns = session.turns[session.mode]
        count = len(turns)
        mode, shown = self._shown or (None, 0)
        if mode is not session.mode or count < shown:
            self._settled = True
            self.transcript.show(session.mode, [t for t in turns if t is not session.reply])
            self._restart_strip(turns)
            shown = count if session.reply is None else count - 1
        for turn in turns[shown:]:
            self._begin(turn)
        self._shown = (session.mode, count)
        if session.busy:
            assert self._painter is not None
            self._painter.resume()
        self._paint()
        self.set_class(not turns, "-empty")
        self._show_welcome()
        self.query_one(TopBar).show(session)
        self.query_one(DepthLegend).show(session)
        self._show_depth_title()
        self.prompt.border_title = "Message" if session.mode is Mode.CHAT else "Text to continue (empty: go on)"
        other = "Ctrl+J new line" if self.settings.send_key == "enter" else "Enter new line"
        send = "Enter sends" if self.settings.send_key == "enter" else "Ctrl+J sends"
        self.prompt.border_subtitle = f"{send} · {other}"
        self.refresh_bindings()

    def _begin(self, turn: Turn) -> None:
        self.transcript.begin(turn)
        if turn.role == "assistant":
            self._painted = 0
            self._settled = False
            self.strip.start(turn.max_depth)

    def _paint(self) -> None:
        """Bring what was written since the last time to the screen; at most REPAINTS_PER_S times a second."""
        session = self.session
        turns = session.turns[session.mode]
        if not self._settled and turns and turns[-1].role == "assistant":
            reply = turns[-1]
            fresh = reply.tokens[self._painted :]
            self._painted += len(fresh)
            self.transcript.extend(fresh)
            if fresh:
                self.strip.extend([t.depth for t in fresh])
            if not session.busy:
                self.transcript.finish(reply)
                self._settled = True
        self.status.show(session)
        if not session.busy and self._painter is not None:
            self._painter.pause()  # an idle program costs nothing

    def _restart_strip(self, turns: list[Turn]) -> None:
        last = next((t for t in reversed(turns) if t.role == "assistant"), None)
        self.strip.start(last.max_depth if last else 1)
        if last:
            self.strip.extend([t.depth for t in last.tokens])

    def _show_depth_title(self) -> None:
        names = {"ink": "letters coloured", "heat": "background coloured", "plain": "plain text"}
        below = "" if self.transcript.following else " · ↓ more text below (Ctrl+End)"
        self.query_one("#depth").border_title = f"depth per token · {names[self.transcript.view]}{below}"

    @on(Transcript.FollowChanged)
    def show_more_below(self) -> None:
        """Say when there is text below the window."""
        self._show_depth_title()

    def _show_welcome(self) -> None:
        session = self.session
        if session.state is State.FAILED:
            problem = str(session.problem)
            text = Content.assemble(
                ("The model could not be loaded\n\n", "bold $error"),
                (f"{problem}\n\n", "$foreground"),
                "Ctrl+Q quits. `rlm-chat --model NAME_OR_DIRECTORY` starts with another one.",
            )
        elif session.mode is Mode.CHAT:
            text = Content.assemble(
                ("Ask something\n\n", "bold $primary"),
                "The model runs on this machine; nothing leaves it. It goes over every token once or several\n"
                "times and decides itself when to stop: the colours and bars show how often.\n\n",
                "Small models make things up. Esc stops a reply, Ctrl+T changes to Continue.",
            )
        else:
            text = Content.assemble(
                ("Begin a text\n\n", "bold $primary"),
                "Type how it starts; the model goes on where you end. Add to it whenever it stops,\n"
                "or send an empty line to let it go on.",
            )
        self.query_one("#welcome", Static).update(text)

    def _hint(self, text: str, seconds: float = 2.0) -> None:
        """Say something on the status line for a moment."""
        self.status.hint = text
        self.status.show(self.session)
        if text:
            self.set_timer(seconds, lambda: self._end_hint(text))

    def _end_hint(self, text: str) -> None:
        if self.status.hint == text:
            self.status.hint = ""
            self.status.show(self.session)

    def on_resize(self, event: events.Resize) -> None:
        """Lay out the one-line widgets anew; below the smallest size say so."""
        width, height = event.size
        self.query_one("#too-small", Static).update(
            Content(f"too small: {width}x{height}\nneeds {MIN_SIZE[0]}x{MIN_SIZE[1]}")
        )
        self.call_after_refresh(self._show)
