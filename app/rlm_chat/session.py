"""One person, one engine: the conversation, the document, and the reply being written. Knows nothing of the screen.

The session owns every text; a user interface reads `Turn.tokens` as often as it likes to paint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlm_chat.engine_client import ClientError, CrashError, Engine, ModelInfo, ReplyToken, Summary


class Mode(StrEnum):
    """Chat takes turns; Continue goes on with a text where it ends."""

    CHAT = "chat"
    CONTINUE = "continue"


class State(StrEnum):
    """What the engine is doing."""

    LOADING = "loading"
    READY = "ready"
    PREFILL = "prefill"  # reading the prompt
    DECODE = "decode"  # writing
    FAILED = "failed"  # there is no model


@dataclass
class Turn:
    """A piece of text by one author. ``stopped`` says that the person ended the reply, ``problem`` what else did."""

    role: str  # "user" or "assistant"
    text: str = ""
    tokens: list[ReplyToken] = field(default_factory=list)
    summary: Summary | None = None
    stopped: bool = False
    problem: str | None = None
    model: str = ""
    max_depth: int = 1

    def add(self, tokens: list[ReplyToken]) -> None:
        """Append what the model wrote."""
        self.tokens.extend(tokens)
        self.text += "".join(t.text for t in tokens)

    @property
    def mean_depth(self) -> float:
        """Passes per token, 0 for no tokens."""
        return sum(t.depth for t in self.tokens) / len(self.tokens) if self.tokens else 0.0


class Session:
    """Sends, stops, switches models; every change is reported through ``changed`` (called without arguments)."""

    def __init__(
        self,
        engine: Engine,
        models: Mapping[Mode, str],
        *,
        sampling: Mapping[str, Any] | None = None,
        depth: Mapping[str, Any] | None = None,
        engine_options: Mapping[str, str] | None = None,
    ):
        self.engine = engine
        self.models = dict(models)
        self.sampling = dict(sampling or {})
        self.depth = dict(depth or {})
        self.engine_options = dict(engine_options or {})
        self.mode = Mode.CHAT
        self.state = State.LOADING
        self.turns: dict[Mode, list[Turn]] = {Mode.CHAT: [], Mode.CONTINUE: []}
        self.reply: Turn | None = None  # the one being written
        self.model: ModelInfo | None = None
        self.problem: ClientError | None = None  # why there is no model
        self.notice = ""  # what the person should know once
        self.changed: Callable[[], None] = lambda: None
        self.first_token_at = 0.0  # time.monotonic()
        self._stopping = False

    @property
    def busy(self) -> bool:
        """Whether a reply is being written."""
        return self.reply is not None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes the models offer: a model that has no chat format only continues."""
        model = self.model
        if model is not None and not model.can_chat and model.model == self.models[Mode.CHAT]:
            return (Mode.CONTINUE,)
        return (Mode.CHAT, Mode.CONTINUE)

    @property
    def max_steps(self) -> int:
        """The depth limit in force."""
        limit = self.model.max_depth if self.model else 1
        wanted = self.depth.get("max_steps")
        return limit if wanted is None else max(1, min(int(wanted), limit))

    async def load(self) -> bool:
        """Have the mode's model loaded; False (and `problem`) when it cannot be."""
        wanted = self.models[self.mode]
        if self.model is not None and self.model.model == wanted and self.state is not State.FAILED:
            return True
        self._now(State.LOADING)
        try:
            self.model = await self.engine.load(wanted, **self.engine_options)
        except ClientError as problem:
            self.model, self.problem = None, problem
            self._now(State.FAILED)
            return False
        self.problem = None
        if self.mode not in self.modes:
            self.mode = Mode.CONTINUE
            self.notice = f"{self.model.name} has no chat format, so it continues texts."
        self._now(State.READY)
        return True

    async def switch(self, mode: Mode) -> bool:
        """Change the mode and its model. When that model cannot be loaded the old mode comes back, with a notice."""
        if self.busy or mode is self.mode or mode not in self.modes or self.state is State.LOADING:
            return False
        before, self.mode = self.mode, mode
        if await self.load():
            return True
        problem = self.problem
        self.mode = before
        if await self.load():
            self.notice = f"{mode.capitalize()} is not available: {problem}"
            self.changed()
        return False

    async def send(self, text: str) -> Turn | None:
        """Give the person's text to the model and wait for the end of the reply; None when there is no model.

        In Continue an empty text goes on where the document ends. A reply never raises: problems are in the turn.
        """
        if self.busy or self.state is not State.READY or self.model is None:
            return None
        turns = self.turns[self.mode]
        if self.mode is Mode.CONTINUE:
            text = _joined(turns[-1].text if turns else "", text)
        if text:
            turns.append(Turn("user", text))
        elif not turns:
            return None
        reply = Turn("assistant", model=self.model.name, max_depth=self.model.max_depth)
        stream = self._ask(turns)
        turns.append(reply)
        self.reply, self._stopping = reply, False
        self._now(State.PREFILL)
        crashed = False
        try:
            async for event in stream:
                if isinstance(event, Summary):
                    reply.summary = event
                    reply.stopped = event.stop_reason == "cancelled"
                else:
                    if self.state is State.PREFILL:
                        self.first_token_at = time.monotonic()
                        self._now(State.DECODE)
                    reply.add(event)
        except CrashError as problem:
            crashed = True
            last = problem.details.splitlines()[-1:]
            reply.problem = ": ".join([str(problem), *last])
        except ClientError as problem:
            reply.problem = str(problem)
        self.reply = None
        if crashed:
            self.model = None
            self.notice = "The engine was started again."
            if not await self.load():
                self.notice = ""
        else:
            self._now(State.READY)
        return reply

    async def stop(self) -> None:
        """End the reply being written; what there is stays."""
        if self.busy and not self._stopping:
            self._stopping = True
            await self.engine.cancel()

    async def change_depth(self, by: int) -> None:
        """Raise or lower the depth limit, for the running reply too. At the model's own limit there is none."""
        if self.model is None:
            return
        limit = max(1, min(self.max_steps + by, self.model.max_depth))
        self.depth["max_steps"] = None if limit == self.model.max_depth else limit
        if self.busy:
            await self.engine.set_depth(self.depth)
        self.changed()

    def clear(self) -> bool:
        """Begin a new conversation or document; refused while a reply is being written."""
        if self.busy:
            return False
        self.turns[self.mode] = []
        self.changed()
        return True

    @property
    def tokens_per_second(self) -> float:
        """Of the running reply so far; 0 before its second token."""
        if self.reply is None or len(self.reply.tokens) < 2:
            return 0.0
        return (len(self.reply.tokens) - 1) / max(1e-9, time.monotonic() - self.first_token_at)

    def _ask(self, turns: list[Turn]) -> Any:
        if self.mode is Mode.CONTINUE:
            return self.engine.generate("".join(t.text for t in turns), self.sampling, self.depth)
        messages = [{"role": t.role, "content": t.text} for t in turns if t.text]
        return self.engine.chat(messages, self.sampling, self.depth)

    def _now(self, state: State) -> None:
        self.state = state
        self.changed()


def _joined(before: str, text: str) -> str:
    """What to append to the document: models of this kind begin words with their space, so none is left dangling."""
    text = text.rstrip(" ")
    if text and before and not before[-1].isspace() and text[0].isalnum():
        return " " + text
    return text
