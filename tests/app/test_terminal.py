"""The program in a real pseudo-terminal: once with a real (random) model, else with the scripted worker."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import ChatFormat

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")

SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>()][0-9A-B]?)")
SCRIPTED = Path(__file__).with_name("scripted_app.py")
Start = Callable[..., "Terminal"]


class Terminal:
    """A pseudo-terminal with `rlm-chat` in it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], size: tuple[int, int]):
        self.child = pexpect.spawn(
            sys.executable,
            arguments,
            env=os.environ | environment,
            dimensions=(size[1], size[0]),
            encoding="utf-8",
            timeout=60,
        )
        self.before = termios.tcgetattr(self.child.child_fd)
        self.output = ""

    @property
    def shown(self) -> str:
        """All that was written so far without its terminal sequences."""
        return SEQUENCE.sub("", self.output)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was never shown; the end is {self.shown[-1500:]!r}"
            self.read()

    def read(self) -> bool:
        try:
            self.output += self.child.read_nonblocking(65536, timeout=0.05)
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            return False
        return True

    def forget(self) -> None:
        self.output = ""

    def end(self) -> int:
        """Wait for the end; the exit code, or minus the signal."""
        deadline = time.monotonic() + 30
        while self.read():
            assert time.monotonic() < deadline, "the program does not end"
        self.child.wait()
        return self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus

    def restored(self) -> bool:
        """Whether the terminal is as it was: alternate screen, mouse and paste modes off, cursor shown."""
        modes = {"1049": "l", "1000": "l", "1003": "l", "2004": "l", "25": "h"}
        last = {mode: re.findall(rf"\x1b\[\?{mode}([hl])", self.output)[-1:] for mode in modes}
        return last == {mode: [state] for mode, state in modes.items()}

    def worker(self) -> int:
        """The process id of the engine worker."""
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random act model with the gpt2 tokenizer and a chat format."""
    import torch
    from tiny_models import tiny_act

    chat_format = ChatFormat({"user": "<|endoftext|>", "assistant": "\n"}, {"user": "\n"}, ("<|endoftext|>",))
    module = tiny_act(1, torch.float32, vocab_size=50257, tokenizer="gpt2", context_length=256, chat_format=chat_format)
    directory = tmp_path / "tiny-act"
    write_model_directory(directory, module.config, module.state_dict())
    return directory


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Terminal] = []

    def begin(*arguments: str, size: tuple[int, int] = (80, 24)) -> Terminal:
        environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color"}
        terminal = Terminal(list(arguments) or [str(SCRIPTED), "chat"], environment, size)
        started.append(terminal)
        return terminal

    yield begin
    for terminal in started:
        terminal.child.close(force=True)


def gone(pid: int, within_s: float = 20.0) -> bool:
    """Whether a process ends soon (a zombie that nobody has waited for yet counts as ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_real_model_a_whole_conversation_and_a_clean_end(start: Start, model: Path) -> None:
    terminal = start("-m", "rlm_chat", "--model", str(model), "--max-tokens", "12", "--seed", "7")
    terminal.wait_for("Ask something")
    terminal.wait_for("ready")
    worker = terminal.worker()
    terminal.forget()
    terminal.child.send("Hello\r")
    terminal.wait_for("12 tokens")
    terminal.wait_for("seed 7")
    terminal.child.send("\x11")  # Ctrl+Q
    assert terminal.end() == 0
    assert terminal.restored()
    assert gone(worker)


def test_ctrl_c_stops_the_reply_then_quits(start: Start) -> None:
    terminal = start()
    terminal.wait_for("ready")
    terminal.child.send("slow long\r")
    terminal.wait_for("writing")
    terminal.forget()
    pressed = time.monotonic()
    terminal.child.send("\x03")
    terminal.wait_for("stopped")
    assert time.monotonic() - pressed < 3.0  # the whole reply takes a minute
    terminal.child.send("\x03")
    assert terminal.end() == 0
    assert terminal.restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(start: Start, number: signal.Signals) -> None:
    terminal = start()
    terminal.wait_for("ready")
    worker = terminal.worker()
    os.kill(terminal.child.pid, number)
    assert terminal.end() == 128 + number
    assert terminal.restored()
    assert gone(worker)


def test_no_worker_survives_kill_9(start: Start) -> None:
    terminal = start()
    terminal.wait_for("ready")
    terminal.child.send("slow long\r")
    terminal.wait_for("writing")
    worker = terminal.worker()
    os.kill(terminal.child.pid, signal.SIGKILL)
    assert gone(worker)


def test_a_killed_worker_costs_one_reply(start: Start) -> None:
    terminal = start()
    terminal.wait_for("ready")
    terminal.child.send("slow long\r")
    terminal.wait_for("writing")
    os.kill(terminal.worker(), signal.SIGKILL)
    terminal.wait_for("SIGKILL")
    terminal.wait_for("started again")
    terminal.forget()
    terminal.child.send("slow long\r")
    terminal.wait_for("writing")


def test_a_missing_model_is_explained_and_the_exit_code_is_3(start: Start) -> None:
    terminal = start(str(SCRIPTED), "missing")
    terminal.wait_for("could not be loaded")
    terminal.wait_for("missing: there is no such model")
    terminal.child.send("\x11")
    assert terminal.end() == 3
    assert terminal.restored()


@pytest.mark.parametrize("size", [(0, 0), (5, 2), (400, 100)])
def test_strange_sizes_are_survived(start: Start, size: tuple[int, int]) -> None:
    terminal = start(size=size)
    terminal.wait_for("small" if size == (5, 2) else "ready")
    terminal.child.setwinsize(30, 100)
    terminal.wait_for("ready")
    terminal.child.send("\x11")
    assert terminal.end() == 0
