"""The worker's protocol, spoken to `serve` in a thread and to a real process."""

from __future__ import annotations

import io
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import STORY, ScriptedModel, load, pieces

from rlm_engine.worker import BATCH_TOKENS, serve

SCRIPT = Path(__file__).with_name("scripted_engine.py")


class Conversation:
    """Requests in, events out, over real pipes."""

    def __init__(self, requests: Any, events: Any):
        self._requests, self._events, self._unread = requests, events, b""

    def send(self, kind: str, **fields: Any) -> None:
        self._requests.write(json.dumps({"type": kind, **fields}).encode() + b"\n")
        self._requests.flush()

    def receive(self) -> dict[str, Any]:
        while b"\n" not in self._unread:
            assert select.select([self._events], [], [], 60)[0], "the worker says nothing"
            chunk = os.read(self._events.fileno(), 1 << 16)
            assert chunk, "the worker closed its output"
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def until(self, kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All tokens up to the next event of this kind, and that event."""
        tokens = []
        while (event := self.receive())["type"] != kind:
            assert event["type"] in ("tokens", "loading"), event
            tokens += event.get("tokens", [])
        return tokens, event


@pytest.fixture
def worker() -> Iterator[Conversation]:
    """`serve` with the scripted model in a thread of this process."""
    request_read, request_write = os.pipe()
    event_read, event_write = os.pipe()
    ended: list[int] = []
    with (
        os.fdopen(request_read, "rb") as requests,
        os.fdopen(event_write, "wb") as events,
        os.fdopen(event_read, "rb") as answers,
    ):
        thread = threading.Thread(target=lambda: ended.append(serve(load, requests, events)))
        thread.start()
        with os.fdopen(request_write, "wb") as writer:
            yield Conversation(writer, answers)
        thread.join(20)  # the end of the input ends it
        assert ended == [0]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        yield child
        child.kill()


def test_load_is_announced_and_describes_the_model(worker: Conversation) -> None:
    worker.send("load", model="chat")
    assert worker.receive() == {"type": "loading", "model": "chat"}
    ready = worker.receive()
    assert ready.pop("load_s") >= 0
    assert ready == {
        "type": "ready",
        "model": "chat",
        "name": "act-23m",
        "architecture": "act",
        "parameters": 23_400_000,
        "context_length": 1024,
        "max_depth": 8,
        "backend": "onnx",
        "can_chat": True,
    }


def test_a_loader_is_told_what_the_request_says() -> None:
    told: queue.Queue[tuple[str, dict[str, str]]] = queue.Queue()

    def loader(model: str, **options: str) -> ScriptedModel:
        told.put((model, options))
        return ScriptedModel(model)

    def requests() -> Iterator[bytes]:
        yield b'{"type": "load", "model": "base"}\n'
        assert told.get(timeout=60) == ("base", {})
        yield b'{"type": "load", "model": "chat", "backend": "torch", "device": "cpu", "dtype": "bfloat16"}\n'
        assert told.get(timeout=60) == ("chat", {"backend": "torch", "device": "cpu", "dtype": "bfloat16"})

    assert serve(loader, requests(), io.BytesIO()) == 0


def test_chat_sends_every_token_once_and_in_order_then_a_summary(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "Hi"}], sampling={"seed": 7}, depth={})
    tokens, done = worker.until("done")
    assert [t["text"] for t in tokens] == pieces(STORY)
    assert set(tokens[0]) == {"id", "text", "logprob", "depth", "halting", "alternatives"}
    assert done["stop_reason"] == "end_of_turn"
    assert done["new_tokens"] == len(tokens)
    assert done["mean_depth"] == pytest.approx(sum(t["depth"] for t in tokens) / len(tokens), abs=1e-3)
    assert (done["seed"], done["dropped_tokens"]) == (7, 0)


def test_generate_continues_a_text_under_the_depth_limit(worker: Conversation) -> None:
    worker.send("load", model="base")
    worker.until("ready")
    worker.send("generate", id=3, text="It was dark and", depth={"max_steps": 2})
    tokens, done = worker.until("done")
    assert tokens[1]["text"] == " once"
    assert {t["depth"] for t in tokens} == {2.0}
    assert done["id"] == 3


def test_cancel_ends_within_one_token_and_keeps_the_worker(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "slow please"}])
    first = worker.receive()
    worker.send("cancel", id=1)
    rest, done = worker.until("done")
    assert done["stop_reason"] == "cancelled"
    assert done["new_tokens"] == len(first["tokens"]) + len(rest) < 40
    worker.send("chat", id=2, messages=[{"role": "user", "content": "Hi"}])
    tokens, done = worker.until("done")
    assert (done["id"], done["stop_reason"]) == (2, "end_of_turn")
    assert len(tokens) == len(pieces(STORY))


def test_cancel_of_a_waiting_generation_writes_nothing(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("cancel", id=5)
    worker.send("chat", id=5, messages=[{"role": "user", "content": "long"}])
    tokens, done = worker.until("done")
    assert tokens == []
    assert done["stop_reason"] == "cancelled"


def test_depth_set_while_writing_applies_to_the_tokens_that_follow(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "slow please"}])
    before = worker.receive()["tokens"]
    worker.send("set_depth", depth={"max_steps": 1})
    after, _ = worker.until("done")
    assert before[0]["depth"] > 1
    assert {t["depth"] for t in after[20:]} == {1.0}  # some may be in the pipe by now


def test_tokens_share_lines_when_they_come_fast(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "long"}])
    time.sleep(0.3)  # a reader that is busy
    sizes = []
    while (event := worker.receive())["type"] == "tokens":
        sizes.append(len(event["tokens"]))
    assert sum(sizes) == event["new_tokens"] > 2000
    assert max(sizes) == BATCH_TOKENS
    assert len(sizes) < event["new_tokens"] / 10


@pytest.mark.parametrize(
    ("request_fields", "exit_code", "words"),
    [
        ({"type": "load", "model": "missing"}, 3, "no such model"),
        ({"type": "chat", "id": 1, "messages": []}, 4, "no model is loaded"),
        ({"type": "dance"}, 2, "unknown request type 'dance'"),
    ],
)
def test_foreseen_errors_are_one_line_with_an_exit_code(
    worker: Conversation, request_fields: dict[str, Any], exit_code: int, words: str
) -> None:
    worker.send(**{"kind": request_fields["type"], **{k: v for k, v in request_fields.items() if k != "type"}})
    _, error = worker.until("error")
    assert error["exit_code"] == exit_code
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["traceback"] is None


def test_wrong_settings_are_usage_errors(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    for wrong in ({"sampling": {"temperature": -1}}, {"sampling": {"warmth": 1}}, {"depth": {"max_steps": 0}}):
        worker.send("chat", id=1, messages=[{"role": "user", "content": "Hi"}], **wrong)
        _, error = worker.until("error")
        assert (error["exit_code"], error["id"]) == (2, 1)


def test_unforeseen_errors_carry_their_traceback_and_the_worker_goes_on(worker: Conversation) -> None:
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "explode"}])
    _, error = worker.until("error")
    assert error["message"] == "unexpected RuntimeError: this was not foreseen"
    assert "scripted_engine.py" in error["traceback"]
    worker.send("chat", id=2, messages=[{"role": "user", "content": "Hi"}])
    assert worker.until("done")[1]["stop_reason"] == "end_of_turn"


def test_a_rust_panic_is_an_error_not_the_end(monkeypatch: pytest.MonkeyPatch, worker: Conversation) -> None:
    class PanicException(BaseException):
        pass

    def panic(self: ScriptedModel, *args: Any, **kwargs: Any) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(ScriptedModel, "chat", panic)
    worker.send("load", model="chat")
    worker.until("ready")
    worker.send("chat", id=1, messages=[{"role": "user", "content": "Hi"}])
    assert "PanicException" in worker.until("error")[1]["message"]


def test_garbage_is_answered_with_an_error(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(b'\xff\xfe not json\n[1]\n{"type": "cancel"}\n')
    process.stdin.flush()
    for _ in range(3):
        assert json.loads(process.stdout.readline())["exit_code"] == 2


def test_native_prints_cannot_reach_the_protocol(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b'{"type": "load", "model": "chat"}\n')
    process.stdin.flush()
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [line["type"] for line in lines] == ["loading", "ready"]
    process.stdin.write(b'{"type": "shutdown"}\n')
    process.stdin.flush()
    said = process.stderr.read()
    assert b"writes to the file descriptor" in said
    assert process.wait(20) == 0


def test_the_process_ends_when_its_parent_closes_the_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(b'{"type": "load", "model": "chat"}\n')
    process.stdin.write(b'{"type": "chat", "id": 1, "messages": [{"role": "user", "content": "slow long"}]}\n')
    process.stdin.flush()
    while json.loads(process.stdout.readline())["type"] != "tokens":
        pass
    process.stdin.close()
    assert process.wait(20) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_in_the_terminal_does_not_end_the_worker(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(b'{"type": "load", "model": "chat"}\n')
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert json.loads(process.stdout.readline())["type"] == "ready"
