"""Never lose a run: what is interrupted, killed or out of disk goes on exactly where it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, run, tiny_recipe, write_prepared

from rlm_engine.errors import InputError, UsageError
from rlm_training import loop
from rlm_training.display import Silent
from rlm_training.loop import Interrupted
from rlm_training.recipe import Recipe
from rlm_training.runs import checkpoints, load_checkpoint, save_checkpoint

EVERY_STEP = "train.checkpoint_minutes=0"
EVERYTHING = [  # memory, growth, random stops, averaging, accumulation, the sampled softmax and the gate phase at once
    "ponder.memory=[[0.0, 0], [0.2, 8], [0.4, 32]]",
    "ponder.memory_documents=true",
    "ponder.growth=[[0.0, 2], [0.3, 4]]",
    "ponder.gate_from=0.8",
    "train.average=0.9",
    "train.micro_rows=4",
    "train.sampled_vocabulary=40",
    "train.most_steps=10",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 6000)


class StopAt(Silent):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals):
        self._step, self._number = step, number

    def step(self, values: dict[str, Any]) -> None:
        if values["step"] == self._step:
            os.kill(os.getpid(), self._number)


def _same_model(a: Path, b: Path) -> bool:
    return (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()


def _interrupted(recipe: Recipe, folder: Path, *stops: int) -> list[float]:
    for number, step in zip((signal.SIGTERM, signal.SIGINT), stops, strict=False):
        with pytest.raises(Interrupted):
            run(recipe, folder, resume=True, display=StopAt(step, number))
    return run(recipe, folder, resume=True)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("act", EVERYTHING),
        pytest.param(  # CPUs are slow at float16
            "act",
            ["train.most_steps=3", "train.precision='float16'", "optim.name='adamw'", "optim.lr=0.003"],
            marks=pytest.mark.slow,
        ),
        ("blend", ["train.most_steps=8", "train.precision='bfloat16'"]),  # dropout
        ("mixture", ["train.most_steps=8", "router.gradient='straight-through'", "schedule.name='onecycle'"]),
    ],
)
def test_interrupted_runs_repeat_the_uninterrupted_one(
    data: Path, tmp_path: Path, architecture: str, overrides: list[str]
) -> None:
    recipe = tiny_recipe(data, architecture, "pretrain", *overrides)
    whole = run(recipe, tmp_path / "whole")
    stops = (2, 5) if len(whole) > 5 else (0, 1)
    assert _interrupted(recipe, tmp_path / "stopped", *stops) == whole
    assert _same_model(tmp_path / "whole", tmp_path / "stopped")


def test_sft_resumes_exactly(data: Path, tmp_path: Path) -> None:
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=1"), tmp_path / "base")
    init = f"train.init={json.dumps(str(tmp_path / 'base' / 'model'))}"
    recipe = tiny_recipe(data, "act", "sft", init, "train.most_steps=6")
    assert _interrupted(recipe, tmp_path / "stopped", 1, 3) == run(recipe, tmp_path / "whole")


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny_runs import run, tiny_recipe
from rlm_training import runs

save, written = torch.save, []

def dies(state, file):
    written.append(state)
    if len(written) < 4:
        return save(state, file)
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

runs.torch.save = dies
recipe = tiny_recipe(Path(sys.argv[1]), "act", "pretrain", "train.checkpoint_minutes=0", "train.most_steps=6")
run(recipe, Path(sys.argv[2]))
"""


def test_kill_9_in_the_middle_of_a_checkpoint_loses_nothing(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(data), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("*.tmp"))  # what the interrupted write left
    assert [p.name for p in checkpoints(tmp_path / "killed")] == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]
    recipe = tiny_recipe(data, "act", "pretrain", EVERY_STEP, "train.most_steps=6")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = run(recipe, tmp_path / "killed", resume=True)
        assert resumed == run(recipe, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_one_line(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, "act", "pretrain", EVERY_STEP, "train.most_steps=4")

    class FillsUp(Silent):
        def step(self, values: dict[str, Any]) -> None:
            if values["step"] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match="previous one is kept") as caught:
            run(recipe, tmp_path / "full", display=FillsUp())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert checkpoints(tmp_path / "full")[-1].name == "checkpoint-00000002.pt"
    assert run(recipe, tmp_path / "full", resume=True) == run(recipe, tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    state = load_checkpoint(tmp_path)
    assert state is not None and state["step"] == 1
    assert "checkpoint-00000002.pt cannot be read" in capsys.readouterr().err
    checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.raises(InputError, match="none of its 2 checkpoints"):
        load_checkpoint(tmp_path)


def test_checkpoints_execute_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"step": Evil()}, tmp_path / "checkpoint-00000001.pt")
    with pytest.raises((InputError, Exception)):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_run_is_not_overwritten_and_not_resumed_on_other_data(data: Path, tmp_path: Path) -> None:
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=2"), tmp_path)
    with pytest.raises(UsageError, match="already holds a run"):
        run(tiny_recipe(data, "act", "pretrain"), tmp_path)
    with pytest.raises(UsageError, match=r"train.rows = 8"):
        run(tiny_recipe(data, "act", "pretrain", "train.rows=4"), tmp_path, resume=True)
    with pytest.raises(UsageError, match="another optimizer"):
        run(tiny_recipe(data, "act", "pretrain", "optim.name='adamw'"), tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"another \[model\]"):
        run(tiny_recipe(data, "act", "pretrain", "model.ffn=64"), tmp_path, resume=True)
    other = write_prepared(tmp_path / "other", tokens=10_000)
    with pytest.raises(UsageError, match="'text' is not what"):
        run(tiny_recipe(other, "act", "pretrain"), tmp_path, resume=True)
    run(tiny_recipe(data, "act", "pretrain", "train.most_steps=3", "optim.lr=0.01"), tmp_path, resume=True)
    assert len(losses(tmp_path)) == 3  # prolonged, with another learning rate


def test_a_disk_too_full_for_the_best_weights_does_not_stop_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, notes = loop.write_model_directory, []

    def full(target: Path, *others: Any) -> None:
        if target.name == "best":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(target, *others)

    class Listener(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(loop, "write_model_directory", full)
    heldout = [f"data.heldout={json.dumps(str(data))}", "train.validate_every=2", "train.most_steps=4"]
    assert len(run(tiny_recipe(data, "act", "pretrain", *heldout), tmp_path, display=Listener())) == 4
    assert any("best: could not be written" in note and "No space left" in note for note in notes)
    assert (tmp_path / "model" / "model.safetensors").is_file() and not (tmp_path / "best").exists()


def test_old_checkpoints_go_and_the_newest_stay(data: Path, tmp_path: Path) -> None:
    memory = ["ponder.memory=[[0.0, 16]]", "train.most_steps=5", "train.keep=3"]
    run(tiny_recipe(data, "act", "pretrain", EVERY_STEP, *memory), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{n:08}.pt" for n in (3, 4, 5)]
    assert sorted(p.name for p in tmp_path.glob("memory-*")) == [f"memory-{n:08}-0.pt" for n in (3, 4, 5)]
