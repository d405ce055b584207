"""What widgets tell the screen."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message


@dataclass
class PromptSent(Message):
    """The person pressed the send key."""

    text: str


@dataclass
class ModeChosen(Message):
    """The person clicked a mode in the top bar."""

    mode: str


class SessionChanged(Message, bubble=False):
    """The session's state is another one; several in the queue are one."""

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, SessionChanged)
