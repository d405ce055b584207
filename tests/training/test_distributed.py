"""Two processes give to the bit what one gives with two micro-batches; a lost process costs no result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import losses, write_prepared

pytestmark = pytest.mark.slow
JOB = Path(__file__).with_name("distributed_job.py")
COMMON = ["train.most_steps=6", "train.micro_rows=4", "train.checkpoint_minutes=0"]
EVERYTHING = [
    "ponder.memory=[[0.0, 0], [0.3, 16]]",
    "train.average=0.9",
    "optim.clip=0.05",
    "train.sampled_vocabulary=40",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 6000)


def _job(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(JOB.parent), "OMP_NUM_THREADS": "1"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, str(JOB), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def _losses(processes: int, data: Path, out: Path, architecture: str, *overrides: str) -> list[float]:
    done = _job(processes, data, out, architecture, *COMMON, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(out)


@pytest.mark.parametrize(
    ("architecture", "overrides", "fsdp"),
    [("act", EVERYTHING, True), ("routed", [], True), ("mixture", [], False), ("act", ["ponder.gate_from=0.5"], False)],
)
def test_two_processes_equal_one_with_two_micro_batches(
    data: Path, tmp_path: Path, architecture: str, overrides: list[str], fsdp: bool
) -> None:
    one = _losses(1, data, tmp_path / "one", architecture, *overrides)
    assert len(one) == 6
    assert _losses(2, data, tmp_path / "ddp", architecture, *overrides) == one
    models = [tmp_path / "one/model/model.safetensors", tmp_path / "ddp/model/model.safetensors"]
    if fsdp:
        assert _losses(2, data, tmp_path / "fsdp", architecture, *overrides, "train.fsdp=true") == one
        models.append(tmp_path / "fsdp/model/model.safetensors")
    assert len({path.read_bytes() for path in models}) == 1


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_a_killed_process_fails_the_job_and_resuming_repeats_the_losses(data: Path, tmp_path: Path, fsdp: str) -> None:
    sharded = [f"train.fsdp={fsdp}", "ponder.memory=[[0.0, 16]]", "train.average=0.9"]
    whole = _losses(2, data, tmp_path / "whole", "act", *sharded)
    killed = _job(2, data, tmp_path / "killed", "act", *COMMON, *sharded, "die=3")
    assert killed.returncode != 0 and "exitcode  : 9" in killed.stderr
    assert len(losses(tmp_path / "killed")) == 3
    assert _losses(2, data, tmp_path / "killed", "act", *sharded, "resume") == whole
    written = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]


def test_fsdp_needs_more_than_one_process(data: Path, tmp_path: Path) -> None:
    done = _job(1, data, tmp_path, "act", *COMMON, "train.fsdp=true")
    assert done.returncode == 2 and "torchrun" in done.stderr
