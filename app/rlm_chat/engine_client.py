"""Talks to the engine worker process (`rlm_engine.worker` describes the messages).

The engine lives in a child process so that stopping is certain, native libraries cannot write on the screen, and a
crash costs one reply at most. Model text passes `PrintableFilter` here: nothing behind this file ever holds text that
a terminal would obey.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from rlm_chat.cli import WORKER_ARGUMENT
from rlm_engine.sanitize import PrintableFilter, printable

STDERR_LINES = 20
_LINE_LIMIT = 1 << 24  # asyncio's own limit of 64 KiB is below what a slow reader may find on one line
_GRACE_S = 1.0

_log = logging.getLogger("rlm_chat.engine")
_log.addHandler(logging.NullHandler())  # never on the screen


class ClientError(Exception):
    """What keeps the engine from answering; the text is for the person. The worker may go on after it."""

    def __init__(self, message: str, exit_code: int = 1, details: str = ""):
        super().__init__(message)
        self.exit_code = exit_code
        self.details = details


class CrashError(ClientError):
    """The worker process is gone. ``details`` holds the last lines it wrote on standard error."""


@dataclass(frozen=True)
class ModelInfo:
    """What the worker says about the model it has loaded."""

    model: str  # the name or directory that was asked for
    name: str
    architecture: str
    parameters: int
    context_length: int
    max_depth: int
    backend: str
    can_chat: bool
    load_s: float


@dataclass(frozen=True)
class Alternative:
    """A token the model might have chosen instead; ``logprob`` in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class ReplyToken:
    """One token of a reply; ``text`` is printable, ``logprob`` in nats, ``depth`` in passes."""

    id: int
    text: str
    logprob: float
    depth: float
    halting: tuple[float, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Summary:
    """How a reply ended. ``stop_reason``: end_of_turn, max_tokens, stop_string, context or cancelled."""

    stop_reason: str
    prompt_tokens: int | None
    new_tokens: int
    dropped_tokens: int | None
    prefill_s: float
    decode_s: float
    mean_depth: float
    seed: int | None


class Engine(Protocol):
    """What the application needs of an engine; `EngineClient` is the real one, tests script their own."""

    async def load(self, model: str, **options: str) -> ModelInfo:
        """Load a model, starting the worker when there is none; ClientError when that fails.

        ``options``: backend, device and dtype of `rlm_engine.load_model`.
        """

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        """Write the next turn: batches of tokens, then one Summary; ClientError when that fails."""

    def generate(
        self, text: str, sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        """Continue a text; otherwise as `chat`."""

    async def cancel(self) -> None:
        """End the running generation after its current token; its Summary still comes."""

    async def set_depth(self, depth: Mapping[str, Any]) -> None:
        """A new depth budget for the running generation, from its next token on."""

    async def close(self) -> None:
        """End the worker; returns when it is gone."""


def worker_command() -> list[str]:
    """The command line of the worker process."""
    if getattr(sys, "frozen", False):
        return [sys.executable, WORKER_ARGUMENT]
    # -P: a file named like a module in the current directory (say, a downloaded model's) must never be imported.
    return [sys.executable, "-P", "-m", "rlm_engine.worker"]


class EngineClient:
    """The engine behind three explicit pipes; use it as an async context manager.

    Spawning with inherited streams fails inside a running Textual app (Textualize/textual#3593), explicit pipes work.
    """

    def __init__(self, command: Sequence[str] | None = None):
        self._command = list(command) if command is not None else worker_command()
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._generation = 0
        self._loading = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def running(self) -> bool:
        """Whether the worker process is there."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the worker if there is none; ClientError when the system refuses."""
        if self.running or self._closed:
            return
        await self._reap()
        self._stderr.clear()
        self._events = asyncio.Queue()
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE_LIMIT
            )
        except OSError as problem:
            raise ClientError(f"the engine could not be started: {problem.strerror or problem}") from None
        self._tasks = [
            asyncio.create_task(self._read_events(self._process, self._events)),
            asyncio.create_task(self._read_stderr(self._process)),
        ]

    async def load(self, model: str, **options: str) -> ModelInfo:
        """See `Engine.load`."""
        async with self._loading:
            await self.start()
            await self._send({"type": "load", "model": model, **options})
            while True:
                event = await self._next_event()
                if event["type"] == "ready":
                    fields: dict[str, Any] = {k: v for k, v in event.items() if k != "type"}
                    for name in ("name", "architecture", "backend"):
                        fields[name] = printable(fields[name])
                    return ModelInfo(**fields)

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        """See `Engine.chat`."""
        request = {"type": "chat", "messages": [dict(m) for m in messages]}
        return self._reply(request | {"sampling": dict(sampling), "depth": dict(depth)})

    def generate(
        self, text: str, sampling: Mapping[str, Any], depth: Mapping[str, Any]
    ) -> AsyncIterator[list[ReplyToken] | Summary]:
        """See `Engine.generate`."""
        return self._reply({"type": "generate", "text": text, "sampling": dict(sampling), "depth": dict(depth)})

    async def cancel(self) -> None:
        """See `Engine.cancel`. A worker that is gone needs no cancelling."""
        with contextlib.suppress(CrashError):
            await self._send({"type": "cancel", "id": self._generation})

    async def set_depth(self, depth: Mapping[str, Any]) -> None:
        """See `Engine.set_depth`."""
        with contextlib.suppress(CrashError):
            await self._send({"type": "set_depth", "depth": dict(depth)})

    async def close(self) -> None:
        """See `Engine.close`. Asks first, then insists."""
        self._closed = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(OSError, CrashError):
                await self._send({"type": "shutdown"})
            for insist in (process.terminate, process.kill):
                try:
                    await asyncio.wait_for(process.wait(), _GRACE_S)
                    break
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        insist()
        await self._reap()

    async def _reply(self, request: dict[str, Any]) -> AsyncIterator[list[ReplyToken] | Summary]:
        self._generation += 1
        generation = self._generation
        await self._send(request | {"id": generation})
        clean = PrintableFilter()
        while True:
            event = await self._next_event(generation)
            if event["type"] == "tokens":
                yield [_token(t, clean) for t in event["tokens"]]
            elif event["type"] == "done":
                yield Summary(**{k: v for k, v in event.items() if k not in ("type", "id")})
                return

    async def _next_event(self, generation: int | None = None) -> dict[str, Any]:
        """The next event that concerns this request; errors are raised."""
        while True:
            event = await self._events.get()
            if event is None:
                self._events.put_nowait(None)  # for whoever asks next
                raise await self._crash()
            if event["type"] == "error" and event["id"] == generation:
                if event["traceback"]:
                    _log.error("%s", event["traceback"])
                message = printable(event["message"])
                raise ClientError(message, event["exit_code"], printable(event["traceback"] or ""))
            # What an abandoned reply still had in the pipe carries an older id and is passed over.
            if event.get("id") == generation:
                return event

    async def _send(self, request: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise CrashError("the engine is not running")
        try:
            process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            await process.stdin.drain()
        except (ConnectionError, RuntimeError):
            raise await self._crash() from None

    async def _read_events(
        self, process: asyncio.subprocess.Process, events: asyncio.Queue[dict[str, Any] | None]
    ) -> None:
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                events.put_nowait(json.loads(line))
        except ValueError as problem:  # half a line, or one beyond every limit: the worker is not to be trusted
            _log.error("unreadable event: %s", problem)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        events.put_nowait(None)

    async def _read_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        rest = b""
        while chunk := await process.stderr.read(65536):
            *lines, rest = (rest + chunk[-65536:]).split(b"\n")
            for line in lines:
                self._note(line)
            rest = rest[-4096:]
        self._note(rest)

    def _note(self, line: bytes) -> None:
        text = printable(line.decode("utf-8", "replace")).rstrip()
        if text:
            self._stderr.append(text)
            _log.warning("%s", text)

    async def _crash(self) -> CrashError:
        process = self._process
        if process is None:
            return CrashError("the engine is not running")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_S)
        if len(self._tasks) == 2:
            await asyncio.wait([self._tasks[1]], timeout=_GRACE_S)  # its last words may still be in the pipe
        return CrashError(f"the engine stopped unexpectedly ({_ending(process.returncode)})", 1, self._last_words())

    def _last_words(self) -> str:
        return "\n".join(self._stderr)

    async def _reap(self) -> None:
        """Leave nothing of the last worker behind: no zombie, no open pipe, no task."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        # A grandchild may hold the pipes open for ever; the readers end with the worker all the same.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []


def _token(data: dict[str, Any], clean: PrintableFilter) -> ReplyToken:
    return ReplyToken(
        id=data["id"],
        text=clean.push(data["text"]),
        logprob=data["logprob"],
        depth=data["depth"],
        halting=tuple(data["halting"]),
        alternatives=tuple(Alternative(a["id"], printable(a["text"]), a["logprob"]) for a in data["alternatives"]),
    )


def _ending(returncode: int | None) -> str:
    if returncode is None:
        return "no longer answering"
    if returncode < 0:
        try:
            return f"signal {signal.Signals(-returncode).name}"
        except ValueError:
            return f"signal {-returncode}"
    return f"exit code {returncode}"
