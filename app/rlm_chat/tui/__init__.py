"""The terminal user interface. Importing this package is cheap; `run_tui` imports Textual."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from typing import Any

from rlm_chat import locations
from rlm_chat.engine_client import ClientError, EngineClient
from rlm_chat.session import Mode, Session
from rlm_chat.settings import ENGINE_OPTIONS, Settings, load_settings

_LOG_BYTES = 256_000


def run_tui(
    model: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    depth: Mapping[str, Any] | None = None,
    engine: Mapping[str, str] | None = None,
) -> int:
    """Run the application until the person quits; returns an exit code.

    ``model``: a name or directory for both modes; None means the models of the settings. ``sampling`` and ``depth``:
    fields of `rlm_engine.Sampling` and `rlm_engine.Depth` that were given on the command line; they win over the
    settings, as do the fields of ``engine``: backend, device, dtype. Exit code 3 when no model could be loaded,
    128 + n when signal n ended it.
    """
    settings, notice = load_settings()
    _log_to_file()
    return asyncio.run(_run(settings, notice, model, sampling or {}, depth or {}, engine or {}))


async def _run(
    settings: Settings,
    notice: str | None,
    model: str | None,
    sampling: Mapping[str, Any],
    depth: Mapping[str, Any],
    chosen: Mapping[str, str],
) -> int:
    async with EngineClient() as engine:
        # First of all, so that the worker's imports run beside Textual's.
        with contextlib.suppress(ClientError):  # reported on the screen by the load that follows
            await engine.start()
        session = Session(
            engine,
            {Mode.CHAT: model or settings.model.chat, Mode.CONTINUE: model or settings.model.base},
            sampling=vars(settings.sampling) | dict(sampling),
            depth=vars(settings.depth) | {k: v for k, v in depth.items() if v is not None},
            engine_options={name: getattr(settings.model, name) for name in ENGINE_OPTIONS} | dict(chosen),
        )
        if os.environ.get("NO_COLOR") == "":
            del os.environ["NO_COLOR"]  # no-color.org: only a non-empty value counts; Textual counts both
        _give_size()
        from rlm_chat.tui.app import ChatApp

        app = ChatApp(session, settings, notice)
        _quit_on_signals(app)
        await app.run_async()
        if app.return_code or session.problem is None:
            return app.return_code or 0
        return session.problem.exit_code


def _give_size() -> None:
    """Treat a terminal without a size (serial lines, some containers) as 80x24.

    Told nothing, Textual 8.2.8 and Rich choose different heights, and the screen is laid out again without end.
    """
    if sys.platform == "win32":
        return
    import termios

    with contextlib.suppress(OSError):
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        if not columns or not lines:
            termios.tcsetwinsize(sys.stdout.fileno(), (24, 80))


def _quit_on_signals(app: Any) -> None:
    """A terminal that is closed or a `kill` ends the program in order: terminal restored, worker ended."""
    if sys.platform == "win32":
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, functools.partial(app.exit, return_code=128 + number))


def _log_to_file() -> None:
    """Keep what the engine says on standard error; a log that cannot be written is no reason to stop."""
    logger = logging.getLogger("rlm_chat")
    logger.propagate = False
    try:
        directory = locations.log_directory()
        directory.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = RotatingFileHandler(
            directory / "rlm-chat.log", maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True
        )
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    if not logger.handlers:
        logger.addHandler(handler)
