"""The client against a real worker process with a scripted model."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripted_engine import STORY, pieces

from rlm_chat.engine_client import ClientError, CrashError, EngineClient, ReplyToken, Summary, worker_command

COMMAND = [sys.executable, str(Path(__file__).with_name("scripted_engine.py"))]


@pytest.fixture
async def engine() -> AsyncIterator[EngineClient]:
    async with EngineClient(COMMAND) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def collect(stream: AsyncIterator[list[ReplyToken] | Summary]) -> tuple[list[ReplyToken], Summary]:
    tokens: list[ReplyToken] = []
    async for event in stream:
        if isinstance(event, Summary):
            return tokens, event
        tokens += event
    raise AssertionError("the stream ended without a summary")


async def test_a_chat_is_streamed_whole(engine: EngineClient) -> None:
    info = await engine.load("chat")
    assert (info.name, info.max_depth, info.can_chat) == ("act-23m", 8, True)
    tokens, summary = await collect(engine.chat(ask("Hi"), {"seed": 7}, {}))
    assert [t.text for t in tokens] == pieces(STORY)
    assert summary.stop_reason == "end_of_turn"


async def test_terminal_sequences_never_come_through(engine: EngineClient) -> None:
    await engine.load("chat")
    tokens, _ = await collect(engine.chat(ask("escape"), {}, {}))
    text = "".join(t.text for t in tokens)
    assert text == "red alert [bold]not bold[/bold] [/INST] end"


async def test_cancel_keeps_what_there_is(engine: EngineClient) -> None:
    await engine.load("chat")
    count = 0
    async for event in engine.chat(ask("slow please"), {}, {}):
        if isinstance(event, Summary):
            assert event.stop_reason == "cancelled"
            assert event.new_tokens == count < 40
            return
        count += len(event)
        await engine.cancel()


async def test_an_abandoned_reply_does_not_leak_into_the_next(engine: EngineClient) -> None:
    await engine.load("chat")
    async for _ in engine.chat(ask("long"), {}, {}):
        break
    await engine.cancel()
    tokens, summary = await collect(engine.chat(ask("Hi"), {}, {}))
    assert len(tokens) == summary.new_tokens == len(pieces(STORY))


async def test_a_model_that_cannot_be_loaded_says_why_and_the_worker_stays(engine: EngineClient) -> None:
    with pytest.raises(ClientError, match="no such model") as caught:
        await engine.load("missing")
    assert caught.value.exit_code == 3
    assert (await engine.load("chat")).name == "act-23m"


async def test_a_crash_costs_one_reply_and_the_worker_comes_back(engine: EngineClient) -> None:
    await engine.load("chat")
    tokens: list[ReplyToken] = []
    with pytest.raises(CrashError, match=r"SIGABRT|exit code") as caught:
        async for event in engine.chat(ask("crash"), {}, {}):
            assert not isinstance(event, Summary)
            tokens += event
    assert len(tokens) == 3
    assert "something terrible happened" in caught.value.details
    assert not engine.running
    await engine.load("chat")
    assert (await collect(engine.chat(ask("Hi"), {}, {})))[1].stop_reason == "end_of_turn"


async def test_a_worker_killed_between_replies_is_noticed(engine: EngineClient) -> None:
    await engine.load("chat")
    assert engine._process is not None
    engine._process.kill()
    with pytest.raises(CrashError):
        await collect(engine.chat(ask("Hi"), {}, {}))
    await engine.load("chat")
    assert engine.running


async def test_a_program_that_is_no_worker_is_an_error() -> None:
    async with EngineClient([sys.executable, "-c", "print('hello')"]) as engine:
        with pytest.raises(CrashError):
            await engine.load("chat")
    async with EngineClient(["/nowhere/at/all"]) as engine:
        with pytest.raises(ClientError, match="could not be started"):
            await engine.load("chat")


async def test_close_leaves_no_process_even_when_it_does_not_listen() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('[]', flush=True); time.sleep(60)"
    engine = EngineClient([sys.executable, "-c", deaf])
    await engine.start()
    assert engine._process is not None
    pid = engine._process.pid
    await asyncio.sleep(0.2)
    await asyncio.wait_for(engine.close(), 20)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_close_while_loading_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_LOAD_S", "30")
    engine = EngineClient(COMMAND)
    loading = asyncio.create_task(engine.load("chat"))
    await asyncio.sleep(0.5)
    await asyncio.wait_for(engine.close(), 20)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    assert not engine.running


def test_the_worker_never_imports_from_the_current_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-P" in worker_command()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert worker_command() == [sys.executable, "--engine-worker"]
