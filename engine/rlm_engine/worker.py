"""The engine as a process: JSON Lines requests on standard input, JSON Lines events on standard output.

``python -m rlm_engine.worker`` runs it. Every message is one JSON object on one line with a ``type``; ASCII only.

Requests
    ``{"type": "load", "model": NAME_OR_DIRECTORY, "backend": "auto", "device": "auto", "dtype": "auto"}``
        Load a model; the one held before is freed first. Answered by ``loading``, then ``ready`` or ``error``.
    ``{"type": "chat", "id": N, "messages": [{"role", "content"}, ...], "sampling": {...}, "depth": {...}}``
        Write the assistant's next turn. ``sampling`` and ``depth`` hold fields of `Sampling` and `Depth`; an
        optional ``"alternatives": K`` asks for other candidates with each token (5 at most).
        Answered by ``tokens`` lines, then ``done`` or ``error`` with the same id. Ids rise from request to request.
    ``{"type": "generate", "id": N, "text": TEXT, "sampling": {...}, "depth": {...}}``
        Continue a text; answered like ``chat``.
    ``{"type": "cancel", "id": N}``
        End generation N (and earlier ones) after the token that is being computed. Its ``done`` still comes.
    ``{"type": "set_depth", "depth": {...}}``
        A new depth budget for the running generation, from its next token on. Fields left out mean the model's own.
    ``{"type": "shutdown"}``
        End the process now. Closing standard input does the same, so a worker never outlives its parent.

``load``, ``chat`` and ``generate`` run one after another in the order they came; ``cancel``, ``set_depth`` and
``shutdown`` act at once.

Events
    ``{"type": "loading", "model": NAME}``
    ``{"type": "ready", "model": NAME_AS_ASKED, "name", "architecture", "parameters", "context_length", "max_depth",
    "backend", "can_chat", "load_s"}``
    ``{"type": "tokens", "id": N, "tokens": [{"id", "text", "logprob", "depth", "halting", "alternatives"}, ...]}``
        At least one token; those computed within 20 ms, or while the reader was slow, share a line (64 at most).
    ``{"type": "done", "id": N, "stop_reason", "prompt_tokens", "new_tokens", "dropped_tokens", "prefill_s",
    "decode_s", "mean_depth", "seed"}``
        ``stop_reason``: end_of_turn, max_tokens, stop_string, context, or cancelled. After a cancellation the
        summary counts what was sent; fields only the engine knows are null when it did not say.
    ``{"type": "error", "id": N or null, "request": TYPE, "message": ONE_LINE, "exit_code": CODE, "traceback": TEXT or
    null}``
        ``traceback`` is set when the error is not one of `rlm_engine.errors`: a mistake of the program.

Standard output belongs to the protocol: file descriptor 1 is pointed at standard error before anything heavy is
imported, so a native library that prints cannot damage a line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from rlm_engine.errors import EngineError, InputError, UsageError

Loader = Callable[..., Any]  # (model, backend=, device=, dtype=) -> Model

_LOADING = ("backend", "device", "dtype")
BATCH_S = 0.02
BATCH_TOKENS = 64
ALTERNATIVES = 5


def serve(load: Loader, requests: Iterable[bytes], events: BinaryIO) -> int:
    """Answer ``requests`` (lines) on ``events`` until shutdown or the end of the input; returns an exit code.

    ``load(model, backend=, device=, dtype=)`` returns a model or raises; what a request leaves out is not passed.
    Generation runs in a daemon thread that is not waited
    for at the end: whoever asked is gone.
    """
    outbox = _Outbox(events)
    runner = _Runner(load, outbox)
    for line in requests:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            kind = request["type"]
            if kind in ("load", "chat", "generate"):
                runner.submit(request)
            elif kind == "cancel":
                runner.cancel(int(request["id"]))
            elif kind == "set_depth":
                runner.set_depth(dict(request["depth"]))
            elif kind == "shutdown":
                break
            else:
                outbox.put(_error(None, str(kind), UsageError(f"unknown request type {kind!r}")))
        except (ValueError, KeyError, TypeError) as problem:
            outbox.put(_error(None, "unknown", UsageError(f"unreadable request: {problem!r}")))
    runner.cancel_all()
    return 0


class _Outbox:
    """Sends events from its own thread, so that computing never waits for the reader of the pipe."""

    def __init__(self, events: BinaryIO):
        self._events = events
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.broken = False
        threading.Thread(target=self._send, name="outbox", daemon=True).start()

    def put(self, event: dict[str, Any]) -> None:
        """Send an event after those before it; tokens events of one generation may be merged."""
        self._queue.put(event)

    def _send(self) -> None:
        waiting: dict[str, Any] | None = None
        while True:
            event = waiting or self._queue.get()
            waiting = None
            started = time.monotonic()
            if event["type"] == "tokens":
                event, waiting = self._merge(event)
            try:
                self._events.write(json.dumps(event, allow_nan=False).encode("ascii") + b"\n")
                self._events.flush()
            except (OSError, ValueError):  # the reader is gone; the request loop sees the end of its input too
                self.broken = True
                return
            if event["type"] == "tokens" and waiting is None:
                time.sleep(max(0.0, BATCH_S - (time.monotonic() - started)))

    def _merge(self, event: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """All queued tokens of the event's generation as one event, and the first queued event that is not one."""
        tokens = list(event["tokens"])
        while len(tokens) < BATCH_TOKENS:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following["type"] != "tokens" or following["id"] != event["id"]:
                return {**event, "tokens": tokens}, following
            tokens.extend(following["tokens"])
        return {**event, "tokens": tokens}, None


class _Runner:
    """Loads models and generates, one request at a time, in a thread of its own."""

    def __init__(self, load: Loader, outbox: _Outbox):
        self._load_model = load
        self._outbox = outbox
        self._model: Any = None
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled = -1  # the highest generation id that was cancelled
        self._next_depth: dict[str, Any] | None = None
        threading.Thread(target=self._run, name="generation", daemon=True).start()

    def submit(self, request: dict[str, Any]) -> None:
        self._queue.put(request)

    def cancel(self, generation: int) -> None:
        self._cancelled = max(self._cancelled, generation)

    def cancel_all(self) -> None:
        self._cancelled = sys.maxsize

    def set_depth(self, depth: dict[str, Any]) -> None:
        self._next_depth = depth

    def _run(self) -> None:
        while True:
            request = self._queue.get()
            try:
                if request["type"] == "load":
                    self._load(request)
                else:
                    self._generate(request)
            # Native libraries raise outside Exception too: a Rust panic arrives as a BaseException (tokenizers#2094).
            except BaseException as problem:
                self._outbox.put(_error(request.get("id"), request["type"], problem))

    def _load(self, request: dict[str, Any]) -> None:
        name = str(request["model"])
        self._outbox.put({"type": "loading", "model": name})
        self._model = None  # two models at once would double the memory
        gc.collect()
        started = time.perf_counter()
        model = self._load_model(name, **{option: str(request[option]) for option in _LOADING if option in request})
        self._model = model
        self._outbox.put(
            {
                "type": "ready",
                "model": name,
                "name": str(model.name),
                "architecture": str(model.config.architecture),
                "parameters": int(model.parameters),
                "context_length": int(model.config.context_length),
                "max_depth": int(model.max_depth),
                "backend": str(model.backend_name),
                "can_chat": bool(model.can_chat),
                "load_s": round(time.perf_counter() - started, 4),
            }
        )

    def _generate(self, request: dict[str, Any]) -> None:
        generation = int(request["id"])
        if self._model is None:
            raise InputError("no model is loaded; load one first")
        from rlm_engine.decoding.interface import Depth
        from rlm_engine.sampling import Sampling

        sampling = _settings(Sampling, request.get("sampling") or {})
        self._next_depth = None
        depth = _settings(Depth, request.get("depth") or {})
        wanted = min(ALTERNATIVES, int(request.get("alternatives", 0)))
        ask, prompt = (
            (self._model.chat, request["messages"])
            if request["type"] == "chat"
            else (self._model.generate, request["text"])
        )
        stream = ask(prompt, sampling, depth, alternatives=wanted)
        started = time.perf_counter()
        first: float | None = None
        count, depths, cancelled = 0, 0.0, False
        with contextlib.closing(stream):
            while not (cancelled := generation <= self._cancelled or self._outbox.broken):
                change, self._next_depth = self._next_depth, None
                if change is not None:
                    stream.depth = _settings(Depth, change)
                token = next(stream, None)
                if token is None:
                    break
                first = first or time.perf_counter()
                count += 1
                depths += float(token.depth)
                self._outbox.put({"type": "tokens", "id": generation, "tokens": [_token(token)]})
        ended = time.perf_counter()
        summary = getattr(stream, "summary", None)
        done = {
            "type": "done",
            "id": generation,
            "stop_reason": getattr(summary, "stop_reason", None),
            "prompt_tokens": getattr(summary, "prompt_tokens", None),
            "new_tokens": count,
            "dropped_tokens": getattr(summary, "dropped_tokens", None),
            "prefill_s": round(getattr(summary, "prefill_s", (first or ended) - started), 4),
            "decode_s": round(getattr(summary, "decode_s", ended - (first or ended)), 4),
            "mean_depth": round(depths / count, 4) if count else 0.0,
            "seed": getattr(summary, "seed", None),
        }
        if cancelled:
            done["stop_reason"] = "cancelled"
        self._outbox.put(done)


def _settings(kind: Any, values: dict[str, Any]) -> Any:
    """Build Sampling or Depth from JSON; UsageError for a field that does not exist."""
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as problem:
        raise UsageError(f"{kind.__name__.lower()}: {problem}") from None


def _token(token: Any) -> dict[str, Any]:
    return {
        "id": int(token.id),
        "text": token.text,
        "logprob": round(float(token.logprob), 4),
        "depth": round(float(token.depth), 4),
        "halting": [round(float(p), 4) for p in token.halting],
        "alternatives": [
            {"id": int(a.id), "text": a.text, "logprob": round(float(a.logprob), 4)}
            for a in token.alternatives[:ALTERNATIVES]
        ],
    }


def _error(generation: int | None, request: str, problem: BaseException) -> dict[str, Any]:
    expected = isinstance(problem, EngineError)
    message = str(problem) if expected else f"unexpected {type(problem).__name__}: {problem}"
    return {
        "type": "error",
        "id": generation,
        "request": request,
        "message": " ".join(message.split()),
        "exit_code": problem.exit_code if isinstance(problem, EngineError) else 1,
        "traceback": None if expected else "".join(traceback.format_exception(problem)),
    }


def _load(model: str, **options: str) -> Any:
    from rlm_engine import load_model

    loaded = load_model(model, **options)  # type: ignore[arg-type]
    # Somebody is watching: past the window of a published design, reading it all again for every token is too slow.
    loaded.window = "block"
    return loaded


def main(load: Loader = _load) -> None:
    """Serve this process's standard input and output, then end the process; never returns."""
    protocol = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    faulthandler.enable()  # a crash in native code leaves its stack on standard error
    # Ctrl+C reaches every process of the terminal; stopping a reply is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = serve(load, sys.stdin.buffer, protocol)
    sys.stderr.flush()
    # No interpreter shutdown: the generation thread may be inside native code that must not be unwound.
    os._exit(code)


if __name__ == "__main__":
    main()
