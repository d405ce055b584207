"""A run's folder: checkpoints that survive kill -9 and a full disk, metrics, and the finished model directory."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from rlm_engine.errors import InputError


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write checkpoint.pt beside the old one and put it in its place only when it is whole and on disk.

    Raises InputError when it cannot be written (disk full); the previous checkpoint stays.
    """
    temporary = folder / "checkpoint.pt.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "checkpoint.pt")
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{folder}: checkpoint could not be written ({error}); the previous one is kept") from None


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None. Tensors and plain values only: nothing in the file is executed."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Metrics:
    """metrics.jsonl: one line per logged step; on resume lines after the checkpoint's step are cut off."""

    def __init__(self, folder: Path, resume_step: int):
        self._path = folder / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] < resume_step:
                        kept.append(line)
        self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
