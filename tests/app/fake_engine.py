"""An engine inside the test's own event loop that writes exactly when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from scripted_engine import DEPTHS, STORY, pieces

from rlm_chat.engine_client import ClientError, CrashError, ModelInfo, ReplyToken, Summary

Prompt = Sequence[Mapping[str, str]] | str


class FakeEngine:
    """`Engine` for tests. ``hold_after``: wait there (``holding`` is set) until ``go`` is set or it is cancelled."""

    def __init__(self, text: str = STORY, *, hold_after: int | None = None, can_chat: bool = True, broken: str = ""):
        self.text = text
        self.hold_after = hold_after
        self.can_chat = can_chat
        self.broken = broken  # a model that cannot be loaded
        self.crash_after: int | None = None
        self.dropped = 0
        self.holding, self.go = asyncio.Event(), asyncio.Event()
        self.loading = asyncio.Event()
        self.loading.set()
        self.loads: list[str] = []
        self.options: dict[str, str] = {}
        self.prompts: list[Prompt] = []
        self.depths: list[dict[str, Any]] = []
        self.cancelled = self.closed = False

    async def load(self, model: str, **options: str) -> ModelInfo:
        await self.loading.wait()
        self.loads.append(model)
        self.options = options
        if model == self.broken:
            raise ClientError(f"{model}: neither a bundled model (chat) nor a model directory", 3)
        chats = self.can_chat and model != "base"
        return ModelInfo(model, f"act-23m-{model}", "act", 23_400_000, 1024, 8, "onnx", chats, 0.1)

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        self.prompts.append(messages)
        return self._write(depth)

    def generate(
        self, text: str, sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        self.prompts.append(text)
        return self._write(depth)

    async def cancel(self) -> None:
        self.cancelled = True
        self.go.set()

    async def set_depth(self, depth: Mapping[str, Any]) -> None:
        self.depths.append(dict(depth))

    async def close(self) -> None:
        self.closed = True

    async def _write(self, depth: Mapping[str, Any]) -> AsyncIterator[list[ReplyToken] | Summary]:
        self.depths.append(dict(depth))
        self.cancelled = False
        self.go.clear()
        written = []
        for i, piece in enumerate(pieces(self.text)):
            if i == self.hold_after:
                self.holding.set()
                await self.go.wait()
                self.holding.clear()
            if i == self.crash_after:
                raise CrashError("the engine stopped unexpectedly (signal SIGSEGV)", 1, "first line\nlast line")
            if self.cancelled:
                break
            limit = self.depths[-1].get("max_steps") or 8
            written.append(ReplyToken(i, piece, -0.5, float(min(limit, DEPTHS[(i * 7) % len(DEPTHS)]))))
            yield [written[-1]]
        mean = sum(t.depth for t in written) / max(1, len(written))
        reason = "cancelled" if self.cancelled else "end_of_turn"
        yield Summary(reason, 12, len(written), self.dropped, 0.04, len(written) / 50, mean, 7)
