"""A worker process with a scripted model: real protocol, real pipes, no weights.

``python tests/app/scripted_engine.py`` is used instead of ``python -m rlm_engine.worker``. What a prompt contains
decides what happens: "crash" kills the process after three tokens, "explode" raises, "long" writes 2,000 tokens,
"slow" waits between tokens, "escape" writes terminal sequences.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlm_engine.errors import ModelError
from rlm_engine.trace import Alternative, Token

STORY = (
    "Once there was a lighthouse keeper who counted the waves. Every evening he climbed the hundred and twelve steps, "
    "lit the lamp, and wrote one number in a book: how many waves had reached the third stone since the morning.\n\n"
    "Nobody had asked him to. But after forty years the book knew more about the sea than anyone in the village, and "
    "when the great storm came, it was the book, not the radio, that told them when to leave."
)
DEPTHS = (2, 3, 2, 5, 8, 4, 3, 2, 6, 7, 2, 2, 3, 5, 4, 8, 6, 3)


@dataclass
class Summary:
    stop_reason: str
    prompt_tokens: int
    new_tokens: int
    dropped_tokens: int
    prefill_s: float
    decode_s: float
    mean_depth: float
    seed: int


class Stream:
    """What `Model.chat` returns: an iterator with a writable `depth` and, at the end, a `summary`."""

    def __init__(self, text: str, pause_s: float, depth: Any, prompt: str, crash_after: int | None = None):
        self.depth = depth
        self.summary: Summary | None = None
        self._tokens = self._write(text, pause_s, prompt, crash_after)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        self._tokens.close()

    def _write(self, text: str, pause_s: float, prompt: str, crash_after: int | None) -> Iterator[Token]:
        depths = []
        for i, piece in enumerate(pieces(text)):
            if i == crash_after:
                time.sleep(1.0)  # the worker collects tokens for some milliseconds before it sends them
                print("native code: something terrible happened", file=sys.stderr, flush=True)
                os.abort()
            if pause_s:
                time.sleep(pause_s)
            limit = self.depth.max_steps or 8
            depth = float(min(limit, DEPTHS[(i * 7 + len(piece)) % len(DEPTHS)]))
            depths.append(depth)
            yield Token(i, piece, -0.5, depth, (0.25, 0.75), (Alternative(i, piece, -0.5), Alternative(7, "!", -2.0)))
        mean = sum(depths) / max(1, len(depths))
        self.summary = Summary("end_of_turn", len(prompt.split()), len(depths), 0, 0.04, len(depths) / 50, mean, 7)


def pieces(text: str) -> list[str]:
    """Cut a text as a byte-pair tokenizer would: words with their space, long ones in two."""
    found: list[str] = []
    for i, word in enumerate(text.split(" ")):
        word = word if i == 0 else " " + word
        found += [word] if len(word) < 8 else [word[:5], word[5:]]
    return found


class ScriptedModel:
    """The interface of `rlm_engine.Model` as far as the worker uses it."""

    parameters = 23_400_000
    max_depth = 8
    backend_name = "onnx"

    def __init__(self, name: str):
        self.name = f"act-23m-{name}" if name != "chat" else "act-23m"
        self.can_chat = name != "base"
        self.config = SimpleNamespace(architecture="act", context_length=1024)

    def chat(self, messages: Sequence[dict[str, str]], sampling: Any, depth: Any, alternatives: int = 0) -> Stream:
        return self._answer(messages[-1]["content"], STORY, sampling, depth)

    def generate(self, text: str, sampling: Any, depth: Any, alternatives: int = 0) -> Stream:
        return self._answer(text, " " + STORY[0].lower() + STORY[1:], sampling, depth)

    def _answer(self, prompt: str, text: str, sampling: Any, depth: Any) -> Stream:
        words = prompt.rsplit(None, 8)[-8:]
        if "explode" in words:
            raise RuntimeError("this was not foreseen")
        if "damaged" in words:
            raise ModelError("the model's next-token scores are not a number: its weights are damaged")
        if "escape" in words:
            text = "red \x1b[31malert\x1b[0m [bold]not bold[/bold] [/INST] \x1b]52;c;aGk=\x07end"
        if "long" in words:
            text = " ".join([STORY.replace("\n\n", " ")] * 40)
        pause_s = 0.03 if "slow" in words else float(os.environ.get("SCRIPTED_PAUSE_S", "0"))
        return Stream(text, pause_s, depth, prompt, 3 if "crash" in words else None)


def load(model: str, **options: str) -> ScriptedModel:
    print("a native library says hello on standard output")
    os.write(1, b"and writes to the file descriptor, too\n")
    if model == "missing":
        raise ModelError("missing: there is no such model; `rlm-chat models` lists what is installed")
    time.sleep(float(os.environ.get("SCRIPTED_LOAD_S", "0")))
    return ScriptedModel(model)


if __name__ == "__main__":
    from rlm_engine.worker import main

    main(load)
