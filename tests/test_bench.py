"""Measuring: numbers are sane and complete, the command's output can be read, the benchmark scripts run."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_act

from rlm_chat import bench
from rlm_chat.cli import main
from rlm_engine import Depth, UsageError
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import BlendConfig, MixtureConfig, ModelConfig, RoutedConfig
from rlm_engine.generate import Model
from rlm_engine.machine import physical_cores, processor_name, resident_bytes, streaming_read_limit
from rlm_engine.measure import (
    Measurement,
    Meter,
    applications,
    available_variants,
    bytes_per_application,
    depth_budgets,
    fit_line,
    measure_model,
    weights_per_application,
)
from rlm_engine.models import build_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = {"vocab_size": 61, "d_model": 16, "n_heads": 2, "eos_token_id": 0, "context_length": 48, "tokenizer": "none"}
CONFIGS: dict[str, ModelConfig] = {
    "act": tiny_act(1).config,
    "blend": BlendConfig(**SMALL, n_layers=2),  # type: ignore[arg-type]
    "routed": RoutedConfig(**SMALL, n_layers=2, ffn=24, pad_token_id=1),  # type: ignore[arg-type]
    "mixture": MixtureConfig(**SMALL, n_layers=2, ffn=24),  # type: ignore[arg-type]
}


def random_model(design: str, dtype: torch.dtype = torch.float32) -> Model:
    config = CONFIGS[design]
    module = build_model(config).initialise(torch.Generator().manual_seed(3)).to(dtype).eval()
    parameters = sum(p.numel() for p in module.parameters())
    return Model("tiny", config, TorchBackend(module.pieces(), dtype), None, parameters)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = tiny_act(5, torch.float32)
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model_directory(path, module.config, module.state_dict())
    return path


@pytest.mark.parametrize("design", CONFIGS)
def test_measurements_are_finite_and_consistent(design: str) -> None:
    model = random_model(design)
    measured = measure_model(model, prompt_tokens=5, new_tokens=8, repeats=2, streaming=1e9)
    numbers = [value for value in asdict(measured).values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert measured.decode_tokens_per_s_best >= measured.decode_tokens_per_s > 0
    assert measured.prefill_tokens_per_s == pytest.approx(5 / measured.prefill_s)
    assert measured.weight_bytes is not None and measured.read_bytes_per_s is not None
    assert measured.streaming_share == pytest.approx(measured.read_bytes_per_s / 1e9)
    assert 0 < measured.weight_bytes <= 4 * 64 * model.parameters
    assert (measured.backend, measured.precision, measured.rounds) == ("torch", "fp32", 2)
    assert 0 <= measured.mean_depth <= model.max_depth
    assert [p.budget for p in measured.depth_points] == depth_budgets(model.max_depth)
    assert all(p.token_s > 0 for p in measured.depth_points)


@pytest.mark.parametrize("design", CONFIGS)
def test_counted_weights_are_the_models_matrices(design: str) -> None:
    """Every matrix but the embedding tables, once; a mixture has one projection for each of its passes."""
    model, config = random_model(design), CONFIGS[design]
    counted = weights_per_application(config)
    shapes = {name: tensor.shape for name, tensor in build_model(config).state_dict().items() if tensor.dim() == 2}
    matrices = {name: math.prod(shape) for name, shape in shapes.items()}
    left_out = ("embedding", "tokens.", "positions.", "halt.", "step_embedding")
    inside = sum(n for name, n in matrices.items() if not name.startswith(left_out))
    per_pass = sum(n for name, n in matrices.items() if "step_projections" in name)
    if design == "act":
        assert inside == counted["step"]
    elif isinstance(config, BlendConfig):
        assert inside == config.n_layers * counted["layer"] + counted["recursion"] + counted["router"]
    elif design == "routed":
        classes = matrices["router.classes.weight"]
        assert inside - classes == 2 * counted["layer"] + counted["recursion"] + counted["router"] + counted["head"]
    else:
        others = 2 * (counted["layer"] + counted["router"] - config.d_model**2) + counted["head"]
        assert inside - per_pass == others
    trace = model.new_decoder().feed([[5, 6, 7]]).traces[-1]
    assert set(applications(config, trace)) <= set(counted)


def test_more_recurrences_read_more_weights() -> None:
    model = random_model("act")
    shallow, deep = (measure_model(model, 4, 4, 1, Depth(n, 1.0)) for n in (2, 5))
    assert (shallow.mean_depth, deep.mean_depth) == (2, 5)
    sizes = bytes_per_application(model)
    assert sizes is not None and shallow.weight_bytes is not None and deep.weight_bytes is not None
    assert deep.weight_bytes - shallow.weight_bytes == pytest.approx(3 * sizes["step"] - sizes["key_value"])
    half = bytes_per_application(random_model("act", torch.bfloat16))
    assert half == {piece: size / 2 for piece, size in sizes.items()}


def test_a_text_longer_than_the_context_is_cut() -> None:
    model = random_model("blend")
    meter = Meter(model, prompt_tokens=40, new_tokens=100)
    assert meter.new_tokens == 8
    with pytest.raises(UsageError, match="no room in the context of 48"):
        Meter(model, prompt_tokens=48)
    with pytest.raises(UsageError, match="new tokens"):
        Meter(model, new_tokens=0)
    with pytest.raises(UsageError, match="nothing was measured"):
        meter.result()


def test_lines_and_budgets() -> None:
    assert fit_line([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx((2.0, 1.0))
    assert fit_line([2, 2], [1.0, 3.0]) is None
    assert [depth_budgets(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 3, 6, 8]]


def test_the_machine_is_known() -> None:
    assert physical_cores() >= 1 and processor_name()
    assert 1e6 < streaming_read_limit(1 << 22, 1) < 1e13
    before = resident_bytes()
    if before is not None:
        filled = bytearray(os.urandom(1 << 20)) * 64
        after = resident_bytes()
        assert after is not None and len(filled) == 1 << 26 and after - before > 1 << 25


def small_options(directory: Path) -> list[str]:
    return ["bench", "--model", str(directory), "--prompt-tokens", "4", "--new-tokens", "6", "--repeats", "2"]


@pytest.fixture
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_engine.machine.streaming_read_limit", lambda **_: 1e10)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("quick_memory")
def test_command_prints_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small_options(directory), "--backends", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["results"]
    assert report["baseline"] == "PyTorch fp32" and report["machine"]["cores"] >= 1
    assert (row["backend"], row["precision"], row["rounds"], row["new_tokens"]) == ("torch", "fp32", 2, 6)
    assert row["decode_ratio"] == 1.0 and row["decode_tokens_per_s"] > 0 and row["load_s"] > 0
    assert row["streaming_share"] == pytest.approx(row["read_bytes_per_s"] / 1e10, rel=1e-4)


@pytest.mark.usefixtures("quick_memory")
def test_depth_and_device_reach_the_measurement(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--max-depth", "2", "--halt-threshold", "1.0", "--device", "cpu", "--json"]
    assert main([*small_options(directory), "--backends", "torch", *more]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["mean_depth"], row["device"]) == (2.0, "cpu")
    assert [point["budget"] for point in row["depth_points"]] == [1, 2]


@pytest.mark.skipif(find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="needs the export extra")
@pytest.mark.usefixtures("quick_memory")
def test_onnx_is_found_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlm_engine.export.onnx import write_graphs

    module = tiny_act(6, torch.float32, vocab_size=300, d_model=128, ffn=256)
    write_model_directory(tmp_path / "tiny", module.config, module.state_dict())
    assert available_variants(tmp_path / "tiny") == ["torch"]
    tensors = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    write_graphs(tmp_path / "tiny", module.config, tensors, "int8")
    assert available_variants(tmp_path / "tiny") == ["torch", "onnx"]
    assert main([*small_options(tmp_path / "tiny"), "--backends", "onnx", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["backend"], row["precision"]) == ("onnx", "int8")
    # 8 bits and a scale of 32 bits for every 16 or 128 weights, the block's twice, and small vectors in float32; the
    # second plane of the table does not count: of it only looked up rows are read
    mean_steps = row["mean_depth"]
    weights = weights_per_application(module.config)
    block, key_value = (2 * weights[piece] * (1 + 4 / 16) for piece in ("step", "key_value"))
    head = weights["head"] * (1 + 4 / 128)
    assert row["weight_bytes"] == pytest.approx(mean_steps * block + key_value + head, rel=0.05)


def test_table_says_what_limits(capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(
        measure_model(random_model("act"), 4, 6, 1), decode_tokens_per_s=10.0, weight_bytes=2e8, read_bytes_per_s=2e9
    )
    fast = replace(
        slow, backend="onnx", precision="int8", decode_tokens_per_s=45.0, read_bytes_per_s=9e9, recurrence_s=0.004,
        fixed_s=0.005,
    )  # fmt: skip
    results = [slow, fast]
    report = bench._report(results, 1e10, busy=7.0)
    bench._print_table(results, report | {"machine": {"processor": "A\x1b[31mB", "cores": 2}})
    printed = capsys.readouterr().out
    assert "PyTorch fp32" in printed and "ONNX int8" in printed and "4.50x" in printed and "90%" in printed
    assert "ONNX int8 is limited by memory: it reads 200 MB of weights" in printed
    assert "78% of a token's time" in printed and "The machine was busy" in printed
    assert "\x1b" not in printed
    unknown = replace(slow, weight_bytes=None, read_bytes_per_s=None, recurrence_s=None, fixed_s=None)
    assert bench._report([unknown], 1e10, None)["notes"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--backends", "jax"), 2, "torch, torch-bf16, onnx"),
        (("--backends", "torch,torch"), 2, "each once"),
        (("--backends", ","), 2, "--backends takes"),
        (("--repeats", "0"), 2, "--repeats"),
        (("--max-depth", "0"), 2, "max depth must be at least 1"),
        (("--model", "/does/not/exist"), 3, "neither a bundled model"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], code: int, says: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", str(directory), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and says in captured.err and captured.err.count("\n") == 1


def test_a_backends_error_reaches_the_reader(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(directory), "--backends", "onnx"]) == 3
    assert "no ONNX export" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_interrupted_cleanly(directory: Path) -> None:
    """Ctrl-C at once, while the first backend is still loading: one line, 130, and no process is left."""
    command = [sys.executable, "-m", "rlm_chat", *small_options(directory), "--backends", "torch"]
    parent = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        # a shell's background job, which these tests may be part of, ignores SIGINT and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while not (started := children.read_text().split()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    # otherwise Ctrl-C would reach the child as well, and its traceback the terminal
    while os.getpgid(int(started[0])) == parent.pid:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert out == b"" and err.decode().strip() == "rlm-chat: interrupted"
    assert not Path(f"/proc/{started[0]}").exists()


@pytest.fixture
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Scripts import `common`; they set torch's threads, which must not outlive them."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    sys.modules.pop("common", None)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("beside_the_scripts")
@pytest.mark.parametrize(
    ("script", "baseline"),
    [
        ("published_loop", "baseline: published loop"),
        ("early_exit", "baseline: depth 8"),
        ("batch", "rows (baseline: 1)"),
        ("speculation", "same tokens as plain decoding"),
        ("skip_halted", "against all"),
        pytest.param("startup", "baseline: python -c pass", marks=pytest.mark.slow),
    ],
)
def test_scripts_run(
    script: str, baseline: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--quick", "--threads", "1"])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("machine: ") and f"{script}.py --quick --threads 1\n" in printed
    assert baseline in printed and "torch" in printed
    if script == "published_loop":
        counts = [line.split()[-1] for line in printed.splitlines() if line.startswith("cached, torch fp32")]
        assert counts == ["12/12", "12/12"]
    if script == "speculation":
        assert "same tokens as plain decoding: 2 of 2 settings" in printed


@pytest.mark.usefixtures("beside_the_scripts")
@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama.cpp is installed")
def test_a_missing_peer_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["against_llama_cpp.py", "--quick", "--threads", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / "against_llama_cpp.py"), run_name="__main__")
    assert end.value.code == 3
    assert "pip install 'rlm-chat[bench]'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_script_runs_by_itself() -> None:
    command = [sys.executable, str(BENCHMARKS / "early_exit.py"), "--quick", "--threads", "1", "--backends", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "depth 5 against depth 8" in done.stdout


def test_measurement_survives_the_pipe() -> None:
    measured = measure_model(random_model("act"), 4, 6, 1)
    assert bench._measurement(json.loads(json.dumps(asdict(measured)))) == measured
    assert isinstance(measured, Measurement)
