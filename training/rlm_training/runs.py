"""A run's folder: checkpoints that survive kill -9 and a full disk, and metrics.

recipe.json, data.json          what is trained on what
metrics.jsonl                   one line per step (see `loop`)
checkpoint-00000420.pt          state before step 420; a folder of shards with FSDP2
memory-00000420-0.pt            ACT's segment memories of process 0, only when a recipe uses memory
best/, model/                   model directories: lowest validation loss, and the end of the run
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlm_engine.errors import InputError, UsageError

_NEARLY_FULL = 16 << 20  # bytes: what the failed write was about to fill


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint*") if re.fullmatch(r"checkpoint(-\d+)?(\.pt)?", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's name tells."""
    number = re.search(r"\d+", checkpoint.name)
    return int(number.group()) if number else -1


@contextlib.contextmanager
def placed(target: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder to; it takes its place only when it is whole and on disk.

    InputError when it cannot be written (disk full); whatever was there before stays.
    """
    temporary = target.with_name(target.name + ".tmp")
    remove(temporary)
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _flush(path)
        temporary.replace(target)
        _flush(target.parent)
    except (OSError, RuntimeError) as error:
        why = write_reason(error, target.parent)
        with contextlib.suppress(OSError):
            remove(temporary)
        raise InputError(
            f"{target}: the checkpoint could not be written ({why}); the previous one is kept: "
            "make room and continue with --resume"
        ) from None


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write checkpoint-STEP.pt (see `placed`)."""
    with placed(folder / f"checkpoint-{step:08}.pt") as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None when there is none.

    Tensors and plain values only: nothing in the file is executed. A damaged file (a failing disk) is passed over
    with a warning; InputError when none is left.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if path.is_dir():
            raise UsageError(f"{path} was written with FSDP2; resume it with --fsdp under torchrun")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            print(f"rlm-train: {path} cannot be read ({reason(error)})", file=sys.stderr)
    if found:
        raise InputError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def save_memories(folder: Path, step: int, rank: int, memories: dict[str, Any]) -> None:
    """Write one process's segment memories; call it before the checkpoint they belong to."""
    if memories:
        with placed(folder / f"memory-{step:08}-{rank}.pt") as temporary, temporary.open("wb") as file:
            torch.save(memories, file)


def load_memories(folder: Path, step: int) -> dict[str, Any]:
    """The segment memories of all processes at a step; empty when the run keeps none."""
    memories: dict[str, Any] = {}
    for path in sorted(folder.glob(f"memory-{step:08}-*.pt")):
        memories |= torch.load(path, map_location="cpu", weights_only=True)
    return memories


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what an interrupted write left behind."""
    old = checkpoints(folder)[:-keep]
    kept = {step_of(path) for path in checkpoints(folder)[-keep:]}
    orphans = [p for p in folder.glob("memory-*.pt") if step_of(p) not in kept]
    for path in [*old, *orphans, *folder.glob("checkpoint*.tmp"), *folder.glob("memory*.tmp")]:
        remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """The first sentence of an error's text."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def write_reason(error: Exception, folder: Path) -> str:
    """Why writing to a folder failed; the writers of PyTorch and safetensors do not say that the disk is full."""
    if not isinstance(error, OSError) and shutil.disk_usage(folder).free < _NEARLY_FULL:
        return "no space left on the disk"
    return reason(error)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Metrics:
    """metrics.jsonl: one line per step; on resume lines from the checkpoint's step on are cut off.

    ``tensorboard``: also write TensorBoard events to the run's folder (extra `tensorboard`).
    """

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool = False):
        self._path = folder / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] < resume_step:
                        kept.append(line)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)
        self._events = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def close(self) -> None:
        """Write what TensorBoard's writer still holds back."""
        if self._events is not None:
            self._events.close()

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. InputError when the disk is full."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}; make room and continue with --resume") from None
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, values["step"])
            for name, value in values.get("heldout", {}).items():
                self._events.add_scalar(f"heldout/{name}", value, values["step"])


def _tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "train.tensorboard needs the package: pip install 'rlm-chat[tensorboard]', or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=resume_step)
