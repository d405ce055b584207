"""Where the person types."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from rlm_chat.tui.messages import PromptSent
from rlm_engine.sanitize import printable


class PromptBox(TextArea):
    """A text area that sends on the send key and remembers what was sent (Up on the first line)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+j,shift+enter,alt+enter", "newline_or_send", "New line", show=False, id="prompt.newline"),
    ]

    def __init__(self, send_key: str = "enter", id: str | None = None):
        super().__init__(id=id, compact=True, highlight_cursor_line=False, soft_wrap=True)
        self.send_key = send_key
        self.sent: list[str] = []
        self._recalled: int | None = None
        self._draft = ""

    def action_newline_or_send(self) -> None:
        """Ctrl+J: a new line, or send when the settings swapped the two keys."""
        if self.send_key == "ctrl+j":
            self._send()
        else:
            self._replace_via_keyboard("\n", *self.selection)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter" and self.send_key == "enter":
            event.stop()
            event.prevent_default()
            self._send()
            return
        await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        # Bracketed paste: new lines stay new lines and never send. What was pasted may hold escape sequences.
        event.prevent_default()
        event.text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        await super()._on_paste(event)

    def action_cursor_up(self, select: bool = False) -> None:
        if self.cursor_at_first_line and not select and self._recall(-1):
            return
        super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        if self.cursor_at_last_line and not select and self._recall(1):
            return
        super().action_cursor_down(select)

    def _send(self) -> None:
        self.post_message(PromptSent(self.text))

    def accept(self) -> None:
        """The text was taken: remember it and start afresh."""
        if self.text.strip() and self.sent[-1:] != [self.text]:
            self.sent.append(self.text)
        self._recalled, self._draft = None, ""
        self.load_text("")

    def _recall(self, by: int) -> bool:
        """Show an older (-1) or newer (+1) prompt; False when there is none."""
        index = (len(self.sent) if self._recalled is None else self._recalled) + by
        if not 0 <= index <= len(self.sent) or (by > 0 and self._recalled is None):
            return False
        if self._recalled is None:
            self._draft = self.text
        self._recalled = index if index < len(self.sent) else None
        self.load_text(self._draft if self._recalled is None else self.sent[index])
        self.move_cursor(self.document.end)
        return True
