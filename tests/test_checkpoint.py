"""Model directories: what loads, and that everything damaged or hostile is refused in one clear line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_act

from rlm_engine import load_model
from rlm_engine.checkpoint import TensorFile, read_model_directory, write_model_directory
from rlm_engine.errors import ModelError, UsageError
from rlm_engine.generate import describe_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = tiny_act(1, torch.float32)
    write_model_directory(tmp_path / "model", model.config, model.state_dict())
    return tmp_path / "model"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_header(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def test_round_trip(directory: Path) -> None:
    config, tensors = read_model_directory(directory)
    model = tiny_act(1, torch.float32)
    assert config == model.config
    assert {k: v.tolist() for k, v in tensors.items()} == {k: v.tolist() for k, v in model.state_dict().items()}
    facts = describe_model(directory)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_load(directory: Path, dtype: torch.dtype) -> None:
    model = tiny_act(1, dtype)
    write_model_directory(directory, model.config, model.state_dict())
    _, tensors = read_model_directory(directory)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name], tensor.double().numpy())
    assert np.isfinite(load_model(str(directory)).logits([1, 2, 3])).all()


def test_pytorch_computes_in_the_dtype_asked_for(directory: Path) -> None:
    def logits(dtype: str) -> np.ndarray:
        return load_model(str(directory), backend="torch", dtype=dtype).logits([1, 2, 3, 4])

    exact, half = logits("float32"), logits("bfloat16")
    np.testing.assert_array_equal(logits("auto"), exact)  # on the CPU
    difference = np.abs(half - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()  # bfloat16 keeps 8 bits; errors add up over the recurrences
    with pytest.raises(UsageError, match="dtype must be one of"):
        load_model(str(directory), dtype="float8")
    with pytest.raises(UsageError, match="dtype is for backend 'torch'"):
        load_model(str(directory), backend="onnx", dtype="bfloat16")


def test_two_models_share_a_table(directory: Path) -> None:
    config, tensors = read_model_directory(directory)
    rest = {k: torch.from_numpy(v) for k, v in tensors.items() if k != "embedding.weight"}
    twin = directory.parent / "twin"
    write_model_directory(twin, config, rest, shared_with=directory.name)
    np.testing.assert_array_equal(load_model(str(twin)).logits([5, 6]), load_model(str(directory)).logits([5, 6]))
    edit_config(twin, shared_with="../model")
    with pytest.raises(ModelError, match="sibling"):
        load_model(str(twin))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "gpt"}, "unknown architecture 'gpt'"),
        ({"architecture": 3}, "unknown architecture 3"),
        ({"d_model": 32}, "'step_embedding' is [5, 16], config says [5, 32]"),
        ({"d_model": "16"}, "d_model must be"),
        ({"d_model": 10**12}, "d_model must be between"),
        ({"n_heads": 3}, "not a multiple"),
        ({"n_heads": True}, "n_heads must be an integer"),
        ({"vocab_size": ...}, "'vocab_size' is missing"),
        ({"vocab_size": 10**9}, "vocab_size must be between"),
        ({"eos_token_id": 61}, "outside the vocabulary"),
        ({"halt_epsilon": -1.0}, "halt_epsilon"),
        ({"rule": "best"}, "rule must be"),
        ({"min_steps": 9}, "min_steps"),
        ({"depht": 3}, "unknown key 'depht'"),
        ({"context_length": 1_048_576, "max_steps": 64}, "step_embedding"),
        ({"tokenizer": "gpt5"}, "tokenizer"),
        ({"chat_format": {"prefix": {}}}, "chat_format"),
        ({"added_tokens": "x"}, "added_tokens must be a list"),
        ({"norm_eps": float("nan")}, "not a number"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "unknown key 'auto_map'"),
    ],
)
def test_bad_config_is_one_clear_line(directory: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(directory, **changes)
    with pytest.raises(ModelError) as caught:
        load_model(str(directory))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000])
def test_config_that_is_no_json_object(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(directory))


def test_huge_context_is_refused_before_allocation(directory: Path) -> None:
    edit_config(directory, context_length=1_048_576, d_model=16)
    model = load_model(str(directory))
    model.config.__dict__["d_model"] = 16_384  # as if the weights were that large too
    with pytest.raises(ModelError, match="GiB"):
        model.new_decoder()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda h: h.pop("halt.bias"), "does not follow|holds"),
        (lambda h: h["halt.bias"].update(shape=[2]), "does not fill"),
        (lambda h: h["halt.bias"].update(dtype="I32"), "weights must be floating point"),
        (lambda h: h["halt.bias"].update(dtype="X9"), "unknown dtype"),
        (lambda h: h["halt.bias"].update(data_offsets=[0, 4]), "does not follow"),
        (lambda h: h["halt.bias"].update(shape=[-1]), "whole numbers"),
        (lambda h: h["halt.bias"].pop("shape"), "incomplete"),
        (lambda h: h["embedding.weight"].update(shape=[16, 61]), r"is \[16, 61\], config says \[61, 16\]"),
        (lambda h: h["embedding.weight"].update(shape=[10**15, 10**15]), "does not fill"),
        (lambda h: h.update(extra=h.pop("gain_in")), "'gain_in' is missing"),
    ],
)
def test_lying_tensor_header_is_refused(directory: Path, edit: Callable[[dict[str, Any]], None], says: str) -> None:
    edit_header(directory, edit)
    with pytest.raises(ModelError, match=says):
        load_model(str(directory))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(str(directory))


def test_nan_and_infinity_in_weights(directory: Path) -> None:
    model = tiny_act(1, torch.float32)
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            model.block.wo.weight[3, 2] = value
        write_model_directory(directory, model.config, model.state_dict())
        with pytest.raises(ModelError, match=r"'block\.wo\.weight' holds NaN or infinity"):
            load_model(str(directory))


def test_missing_files_and_devices(directory: Path) -> None:
    with pytest.raises(ModelError, match="neither a bundled model"):
        load_model(str(directory / "nothing"))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="missing"):
        load_model(str(directory))
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(str(directory))


def test_header_length_is_not_believed(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[:8] = struct.pack("<Q", 2**62)
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="does not fit the file"):
        TensorFile(path)


def test_neither_ours_nor_published(directory: Path) -> None:
    edit_config(directory, architecture=...)
    with pytest.raises(ModelError, match="neither"):
        load_model(str(directory))


def test_python_files_in_a_model_directory_are_never_run(directory: Path) -> None:
    for name in ("modeling.py", "__init__.py", "config.py", "tokenizer.py"):
        (directory / name).write_text(f"open({str(directory / 'ran')!r}, 'w')")
    load_model(str(directory)).logits([1])
    assert not (directory / "ran").exists()
