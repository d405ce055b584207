"""The screen must be there before anything heavy is: the application's process never imports the engine's libraries."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("numpy", "torch", "onnxruntime", "tokenizers", "safetensors")


def loaded_by(code: str) -> set[str]:
    """The heavy modules that are loaded after this code ran in a fresh interpreter."""
    report = f"{code}\nimport sys; print(*[m for m in {HEAVY!r} + ('textual',) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_application_loads_nothing_of_the_engine() -> None:
    assert loaded_by("import rlm_chat.tui.app, rlm_chat.cli, rlm_chat.oneshot, rlm_chat.session") == {"textual"}


def test_starting_the_worker_needs_not_even_textual() -> None:
    assert loaded_by("import rlm_chat.tui, rlm_chat.engine_client") == set()


def test_the_worker_answers_before_it_loads_anything() -> None:
    assert loaded_by("import rlm_engine.worker") == set()
