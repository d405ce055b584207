"""8-bit weights: what is stored, and that the graphs compute with exactly those values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import decoder_on, model_of, onnx_backend, tensors_of

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.export.designs import stays_float
from rlm_engine.export.quantize import BLOCK, dequantize_blocks, quantize_blocks
from rlm_engine.models import module_from

DESIGNS = ("act", "act-64", "blend", "rlm-90m", "mixture-learned")


def dequantized(design: str) -> Any:
    """The PyTorch model with the weights that the int8 export stands for."""
    model = model_of(design)
    tensors = {}
    for name, tensor in tensors_of(model).items():
        if tensor.ndim == 2 and not stays_float(name):
            stored, scales = quantize_blocks(tensor)
            tensor = dequantize_blocks(stored, scales, tensor.shape[1])
        tensors[name] = tensor
    return module_from(model.config, tensors)


@settings(max_examples=50, deadline=None)
@given(
    outputs=st.integers(1, 5), inputs=st.integers(1, 3 * BLOCK), size=st.floats(1e-6, 1e6), seed=st.integers(0, 2**16)
)
def test_an_error_is_at_most_half_a_step(outputs: int, inputs: int, size: float, seed: int) -> None:
    matrix = (np.random.default_rng(seed).standard_normal((outputs, inputs)) * size).astype(np.float32)
    stored, scales = quantize_blocks(matrix)
    assert stored.dtype == np.uint8 and stored.shape == (outputs, -(-inputs // BLOCK), BLOCK)
    back = dequantize_blocks(stored, scales, inputs)
    steps = np.repeat(scales, BLOCK, axis=1)[:, :inputs]
    assert (np.abs(back - matrix) <= steps * 0.5001).all()
    assert (stored.reshape(outputs, -1)[:, inputs:] == 128).all()  # padding is zero


def test_zeros_and_the_largest_weight_are_kept() -> None:
    matrix = np.zeros((2, BLOCK), dtype=np.float32)
    matrix[1, 3] = -2.5
    stored, scales = quantize_blocks(matrix)
    np.testing.assert_array_equal(dequantize_blocks(stored, scales, BLOCK), matrix)


@pytest.mark.parametrize("design", ["rlm-90m", "act"])
def test_embedding_lookup_gives_the_dequantized_rows(design: str) -> None:
    model = dequantized(design)
    ids = np.arange(model.config.vocab_size)
    (found,) = onnx_backend(design, precision="int8").run("embed", ids)
    with torch.no_grad():
        expected = model.pieces()["embed"](torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("design", ["rlm-90m", "mixture-learned"])
def test_head_differs_from_the_dequantized_one_only_by_rounding_the_activations(design: str) -> None:
    """The kernels round each block of a token's activations to 8 bits: at most half a step of its largest."""
    model, count = dequantized(design), 6
    x = np.random.default_rng(0).standard_normal((count, model.config.d_model)).astype(np.float32)
    (found,) = onnx_backend(design, precision="int8").run("head", x)
    with torch.no_grad():
        (expected,) = (t.numpy() for t in model.pieces()["head"](torch.from_numpy(x)))
        final = model.norm if design == "rlm-90m" else model.norm_out
        weight = (model.unembedding if design == "rlm-90m" else model.head).weight.numpy()
        step = np.abs(final(torch.from_numpy(x)).numpy()).max(axis=1, keepdims=True) / 127
    bound = 0.5 * step * np.abs(weight).sum(axis=1)[None, :] + 1e-5
    assert (np.abs(found - expected) <= bound).all()
    assert np.abs(found - expected).max() < 0.05


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
