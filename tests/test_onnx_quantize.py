"""8-bit weights: what is stored, that the graphs compute with exactly those values, and what both planes are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import decoder_on, model_of, onnx_backend, tensors_of
from tiny_models import tiny_act

from rlm_engine.backends.onnx import open_onnx
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.errors import ModelError
from rlm_engine.export.graphs import stays_float
from rlm_engine.export.manifest import read_manifest
from rlm_engine.export.onnx import write_graphs
from rlm_engine.export.quantize import (
    Storage,
    dequantize_blocks,
    dequantize_residual,
    quantize_blocks,
    quantize_residual,
)
from rlm_engine.models import module_from

DESIGNS = ("act", "act-64", "blend", "rlm-90m", "mixture-learned")
TABLES = ("embedding.", "tokens.", "unembedding.", "head.")
BLOCKS = st.sampled_from([16, 32, 128])


def once(matrix: np.ndarray, block: int) -> np.ndarray:
    """A matrix as one plane of 8 bits has it."""
    return dequantize_blocks(*quantize_blocks(matrix, block), matrix.shape[1])


def dequantized(design: str) -> Any:
    """The PyTorch model with the weights that the int8 export stands for."""
    model, storage = model_of(design), Storage()
    tensors = {}
    for name, tensor in tensors_of(model).items():
        if tensor.ndim == 2 and name.startswith(TABLES):
            stored, scales = quantize_blocks(tensor, storage.table_block)
            residual = dequantize_residual(quantize_residual(tensor, stored, scales), scales, tensor.shape[1])
            tensor = dequantize_blocks(stored, scales, tensor.shape[1]) + residual
        elif tensor.ndim == 2 and not stays_float(name):
            first = once(tensor, storage.matrix_block)
            tensor = first + once(tensor - first, storage.matrix_block) if storage.planes(name) > 1 else first
        tensors[name] = tensor
    return module_from(model.config, tensors)


@settings(max_examples=50, deadline=None)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 300),
    block=BLOCKS,
    size=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**16),
)
def test_an_error_is_at_most_half_a_step(outputs: int, inputs: int, block: int, size: float, seed: int) -> None:
    matrix = (np.random.default_rng(seed).standard_normal((outputs, inputs)) * size).astype(np.float32)
    stored, scales = quantize_blocks(matrix, block)
    assert stored.dtype == np.uint8 and stored.shape == (outputs, -(-inputs // block), block)
    back = dequantize_blocks(stored, scales, inputs)
    steps = np.repeat(scales, block, axis=1)[:, :inputs]
    assert (np.abs(back - matrix) <= steps * 0.5001).all()
    assert (stored.reshape(outputs, -1)[:, inputs:] == 128).all()  # padding is zero
    packed = quantize_residual(matrix, stored, scales)
    assert packed.dtype == np.uint8 and packed.shape == (outputs, -(-inputs // block) * block // 2)
    both = back + dequantize_residual(packed, scales, inputs)
    assert (np.abs(both - matrix) <= steps * 0.5001 / 15 + np.abs(matrix) * 1e-6).all()


def test_zeros_and_the_largest_weight_are_kept() -> None:
    matrix = np.zeros((2, 128), dtype=np.float32)
    matrix[1, 3] = -2.5
    stored, scales = quantize_blocks(matrix, 128)
    np.testing.assert_array_equal(dequantize_blocks(stored, scales, 128), matrix)
    residual = quantize_residual(matrix, stored, scales)
    np.testing.assert_array_equal(dequantize_residual(residual, scales, 128), np.zeros_like(matrix))


@pytest.mark.parametrize("design", ["rlm-90m", "act"])
def test_embedding_lookup_gives_the_dequantized_rows(design: str) -> None:
    model = dequantized(design)
    ids = np.arange(model.config.vocab_size)
    (found,) = onnx_backend(design, precision="int8").run("embed", ids)
    with torch.no_grad():
        expected = model.pieces()["embed"](torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("design", ["act", "rlm-90m", "mixture-learned"])
def test_the_likeliest_tokens_have_the_logits_of_both_planes(design: str) -> None:
    """All tokens of these vocabularies of 23 to 97, or the likeliest 32: in float32, without rounded activations."""
    model = dequantized(design)
    x = np.random.default_rng(0).standard_normal((6, model.config.d_model)).astype(np.float32)
    (found,) = onnx_backend(design, precision="int8").run("head", x)
    with torch.no_grad():
        (expected,) = (t.numpy() for t in model.pieces()["head"](torch.from_numpy(x)))
    best = np.argsort(-expected, axis=1)[:, : Storage().rescored // 2]
    picked = [np.take_along_axis(logits, best, axis=1) for logits in (found, expected)]
    np.testing.assert_allclose(*picked, rtol=0, atol=2e-5)


def test_a_head_without_rescoring_differs_by_rounding_the_activations(tmp_path: Path) -> None:
    """The kernels round each block of a token's activations to 8 bits: at most half a step of its largest."""
    model, storage = model_of("rlm-90m"), Storage(rescored=0)
    tensors = tensors_of(model)
    write_graphs(tmp_path, model.config, tensors, "int8", storage)
    x = np.random.default_rng(0).standard_normal((6, model.config.d_model)).astype(np.float32)
    (found,) = open_onnx(tmp_path, model.config, threads=1).run("head", x)
    weight = once(tensors["unembedding.weight"], storage.table_block)
    with torch.no_grad():
        normal = model.norm(torch.from_numpy(x)).numpy()
    bound = 0.5 * np.abs(normal).max(axis=1, keepdims=True) / 127 * np.abs(weight).sum(axis=1)[None, :] + 1e-5
    error = np.abs(found - normal @ weight.T)
    assert (error <= bound).all() and 1e-4 < error.max() < 0.05


@pytest.mark.parametrize("vocabulary", [20, 400])
def test_a_rescored_head_says_what_a_float_head_says(tmp_path: Path, vocabulary: int) -> None:
    """Logits so close that 8 bits often name another token as the likeliest; far from it nothing changes."""
    rng = np.random.default_rng(1)
    module = tiny_act(0, torch.float32, vocab_size=vocabulary, d_model=64, n_heads=2)
    tensors = tensors_of(module)
    tensors["embedding.weight"] = rng.standard_normal((vocabulary, 64)).astype(np.float32)
    x = rng.standard_normal((500, 64)).astype(np.float32)
    exact = module_from(module.config, tensors).float()
    with torch.no_grad():
        (expected,) = (t.numpy() for t in exact.pieces()["head"](torch.from_numpy(x)))
    wrong = []
    for name, storage in (("plain", Storage(rescored=0)), ("rescored", Storage())):
        (tmp_path / name).mkdir()
        write_graphs(tmp_path / name, module.config, tensors, "int8", storage)
        (found,) = open_onnx(tmp_path / name, module.config, threads=1).run("head", x)
        assert found.shape == expected.shape
        wrong.append(int((found.argmax(axis=1) != expected.argmax(axis=1)).sum()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)
    assert wrong[1] <= 2 < wrong[0]


def test_a_second_plane_of_a_matrix_takes_its_error_away(tmp_path: Path) -> None:
    model = model_of("act-64")
    ids = np.random.default_rng(3).integers(1, model.config.vocab_size, 10).tolist()
    exact = decoder_on(TorchBackend(model.pieces(), torch.float32), model.config).feed([ids], "all").logits
    errors = []
    for number, storage in enumerate((Storage(double=()), Storage(double=("block.w",)), Storage(single=("block.w",)))):
        (tmp_path / str(number)).mkdir()
        write_graphs(tmp_path / str(number), model.config, tensors_of(model), "int8", storage)
        found = decoder_on(open_onnx(tmp_path / str(number), model.config, threads=1), model.config).feed([ids], "all")
        errors.append(float(np.median(np.abs(found.logits - exact))))
    assert errors[0] > errors[1] > errors[2]


def test_storage_is_recorded(tmp_path: Path) -> None:
    model = model_of("act")
    write_graphs(tmp_path, model.config, tensors_of(model), "int8", Storage(double=("block.wq",)))
    assert read_manifest(tmp_path, model.config).storage == Storage(double=("block.wq",))
    path = tmp_path / "onnx" / "manifest.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"storage": {"planes": 3}}))
    with pytest.raises(ModelError, match="export onnx"):
        read_manifest(tmp_path, model.config)


@pytest.mark.parametrize("design", DESIGNS)
def test_decoding_is_close_to_the_dequantized_model(design: str) -> None:
    """Over the whole network the rounded activations are the only difference (random weights amplify it)."""
    model = dequantized(design)
    config = model.config
    ids = np.random.default_rng(3).integers(1, config.vocab_size, 10).tolist()
    found = decoder_on(onnx_backend(design, precision="int8"), config).feed([ids], "all")
    expected = decoder_on(TorchBackend(model.pieces(), torch.float32), config).feed([ids], "all")
    same = [a.steps == b.steps for a, b in zip(found.traces, expected.traces, strict=True)]
    assert sum(same) >= 8
    difference = np.abs(found.logits - expected.logits)[same]
    assert np.median(difference) < 0.02 * np.abs(expected.logits).max()


def test_routers_halting_head_and_positions_stay_float() -> None:
    for design in DESIGNS:
        model = model_of(design)
        kept = {name for name, tensor in tensors_of(model).items() if tensor.ndim == 2 and stays_float(name)}
        assert all(any(word in name for word in ("router", "halt", "positions", "step_embedding")) for name in kept)
        assert kept


def test_wide_models_have_wide_blocks(tmp_path: Path) -> None:
    assert Storage.for_width(256) == Storage() and Storage.for_width(768).matrix_block == 128
    module = tiny_act(0, torch.float32, vocab_size=64, d_model=512, n_heads=8)
    write_graphs(tmp_path, module.config, tensors_of(module), "int8")
    assert read_manifest(tmp_path, module.config).storage == Storage.for_width(512)
