"""The Textual application around the chat screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.theme import Theme

from rlm_chat import clipboard
from rlm_chat.session import Session
from rlm_chat.settings import Settings
from rlm_chat.tui.screens.chat import ChatScreen

THEMES = (
    Theme(
        name="rlm-dark",
        primary="#6ea8c9",
        secondary="#8f9bb3",
        accent="#e0b34d",
        foreground="#d7dce5",
        background="#10141b",
        surface="#161b24",
        panel="#1b222d",
        success="#7fb68a",
        warning="#e0b34d",
        error="#e06c6c",
        dark=True,
    ),
    Theme(
        name="rlm-light",
        primary="#2f6690",
        secondary="#5b6475",
        accent="#9a5b00",
        foreground="#1d2330",
        background="#fbfaf7",
        surface="#f2f0ea",
        panel="#e8e5dc",
        success="#2f7d4a",
        warning="#9a5b00",
        error="#b3261e",
        dark=False,
    ),
)


class ChatApp(App[int]):
    """rlm-chat without arguments."""

    TITLE = "rlm-chat"
    CSS_PATH = "screens/chat.tcss"  # Textual 8.2.8 does not read the CSS_PATH of the default screen
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", "Stop / quit", show=False, priority=True, system=True),
        Binding("ctrl+q", "quit", "Quit", priority=True, id="app.quit"),
    ]

    def __init__(self, session: Session, settings: Settings, notice: str | None = None):
        super().__init__()
        self.session = session
        self.settings = settings
        self._notice = notice
        for theme in THEMES:
            self.register_theme(theme)
        if settings.theme in self.available_themes:
            self.theme = settings.theme
        else:
            self.theme = "rlm-dark"
            self._notice = f"There is no theme {settings.theme!r}; the command palette (Ctrl+P) lists them."

    def get_default_screen(self) -> ChatScreen:
        """The chat."""
        return ChatScreen(self.session, self.settings, self._notice)

    async def action_interrupt(self) -> None:
        """Ctrl+C, also while a dialogue is open."""
        if isinstance(self.screen, ChatScreen):
            await self.screen.interrupt()
        else:
            self.screen.dismiss()

    def copy_to_clipboard(self, text: str) -> None:
        """Copy with the system's own tool where there is one (many terminals ignore OSC 52), and say how."""
        self._clipboard = text
        tool = clipboard.copy(text)
        if tool is None:
            super().copy_to_clipboard(text)
            self.notify("Sent to the terminal (OSC 52); some terminals ignore it.", title="Copied", timeout=4)
        else:
            self.notify(f"With {tool}.", title="Copied", timeout=3, markup=False)
