"""Conversation, document, modes and failures, without a screen."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import FakeEngine
from scripted_engine import STORY

from rlm_chat.session import Mode, Session, State

MODELS = {Mode.CHAT: "chat", Mode.CONTINUE: "base"}


async def ready(engine: FakeEngine) -> Session:
    session = Session(engine, MODELS)
    assert await session.load()
    return session


async def test_what_was_chosen_for_the_engine_reaches_it() -> None:
    engine = FakeEngine("Fine.")
    session = Session(engine, MODELS, engine_options={"backend": "torch", "dtype": "bfloat16"})
    assert await session.load()
    assert engine.options == {"backend": "torch", "dtype": "bfloat16"}


async def test_turns_are_sent_with_what_was_said_before() -> None:
    engine = FakeEngine("Fine.")
    session = await ready(engine)
    await session.send("How are you?")
    await session.send("Really?")
    assert engine.prompts[1] == [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Really?"},
    ]


async def test_the_persons_turn_is_there_before_the_model_begins() -> None:
    engine = FakeEngine(hold_after=0)
    session = await ready(engine)
    task = asyncio.create_task(session.send("Hello"))
    await engine.holding.wait()
    assert [t.text for t in session.turns[Mode.CHAT]] == ["Hello", ""]
    assert session.state is State.PREFILL
    await session.stop()
    await task


async def test_stop_keeps_the_partial_reply_and_marks_it() -> None:
    engine = FakeEngine(hold_after=5)
    session = await ready(engine)
    task = asyncio.create_task(session.send("Hello"))
    await engine.holding.wait()
    assert session.state is State.DECODE
    await session.stop()
    reply = await task
    assert reply is not None and reply.stopped
    assert len(reply.tokens) == 5
    assert STORY.startswith(reply.text)
    assert session.state is State.READY


async def test_a_second_send_while_writing_is_refused() -> None:
    engine = FakeEngine(hold_after=1)
    session = await ready(engine)
    task = asyncio.create_task(session.send("Hello"))
    await engine.holding.wait()
    assert await session.send("And now?") is None
    assert not session.clear()
    await session.stop()
    await task
    assert len(session.turns[Mode.CHAT]) == 2


async def test_a_crash_keeps_the_partial_reply_says_so_and_loads_again() -> None:
    engine = FakeEngine()
    engine.crash_after = 4
    session = await ready(engine)
    reply = await session.send("Hello")
    assert reply is not None and len(reply.tokens) == 4
    assert reply.problem == "the engine stopped unexpectedly (signal SIGSEGV): last line"
    assert engine.loads == ["chat", "chat"]
    assert session.state is State.READY
    assert session.notice == "The engine was started again."


async def test_continue_goes_on_with_the_document() -> None:
    engine = FakeEngine(" and then it rained.")
    session = await ready(engine)
    assert await session.switch(Mode.CONTINUE)
    assert engine.loads == ["chat", "base"]
    assert await session.send("") is None  # nothing to continue yet
    await session.send("It was dark ")
    await session.send("")
    await session.send("Nobody came")
    await session.send("\nThe end")
    assert engine.prompts == [
        "It was dark",
        "It was dark and then it rained.",
        "It was dark and then it rained. and then it rained. Nobody came",
        "It was dark and then it rained. and then it rained. Nobody came and then it rained.\nThe end",
    ]


async def test_each_mode_keeps_its_own_text() -> None:
    session = await ready(FakeEngine("Yes."))
    await session.send("Chat?")
    await session.switch(Mode.CONTINUE)
    assert session.turns[session.mode] == []
    await session.switch(Mode.CHAT)
    assert session.turns[session.mode][0].text == "Chat?"


async def test_a_mode_without_its_model_goes_back_with_a_notice() -> None:
    engine = FakeEngine(broken="base")
    session = await ready(engine)
    assert not await session.switch(Mode.CONTINUE)
    assert (session.mode, session.state) == (Mode.CHAT, State.READY)
    assert "Continue is not available: base: neither" in session.notice
    assert engine.loads == ["chat", "base", "chat"]


async def test_a_model_that_cannot_chat_only_continues() -> None:
    session = await ready(FakeEngine(can_chat=False))
    assert session.modes == (Mode.CONTINUE,)
    assert session.mode is Mode.CONTINUE
    assert "no chat format" in session.notice


async def test_a_model_that_cannot_be_loaded_leaves_the_reason() -> None:
    engine = FakeEngine(broken="chat")
    session = Session(engine, MODELS)
    assert not await session.load()
    assert session.state is State.FAILED
    assert session.problem is not None and session.problem.exit_code == 3
    assert await session.send("Hello") is None


@pytest.mark.parametrize(("steps", "limits"), [([-1, -1], [7, 6]), ([1], [8]), ([-9], [1]), ([-3, 3], [5, 8])])
async def test_the_depth_limit_stays_within_the_model(steps: list[int], limits: list[int]) -> None:
    session = await ready(FakeEngine())
    for step, limit in zip(steps, limits, strict=True):
        await session.change_depth(step)
        assert session.max_steps == limit
    if limits[-1] == 8:
        assert session.depth["max_steps"] is None


async def test_depth_changes_reach_the_running_reply() -> None:
    engine = FakeEngine(hold_after=3)
    session = await ready(engine)
    task = asyncio.create_task(session.send("Hello"))
    await engine.holding.wait()
    await session.change_depth(-6)
    engine.go.set()
    reply = await task
    assert reply is not None
    assert engine.depths == [{}, {"max_steps": 2}]
    assert {t.depth for t in reply.tokens[3:]} == {2.0}
