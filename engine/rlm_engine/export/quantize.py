"""8-bit weights in blocks: round to nearest, symmetric, one scale per `BLOCK` inputs of an output.

The layout is that of ONNX Runtime's MatMulNBits (which also quantizes each token's activations per block when it
computes with accuracy level 4) and of GatherBlockQuantized, so that a tied table is stored once.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128
ZERO = 128  # what a stored byte of weight zero is


def quantize_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize [outputs, inputs]: uint8 [outputs, blocks, BLOCK] and float32 scales [outputs, blocks].

    The last block is padded by zeros. value = (byte - 128) * scale; the error is at most half a scale.
    """
    outputs, inputs = matrix.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((outputs, blocks * BLOCK), dtype=np.float32)
    padded[:, :inputs] = matrix
    values = padded.reshape(outputs, blocks, BLOCK)
    scales = np.abs(values).max(axis=2) / np.float32(127.0)
    divisors = np.where(scales > 0, scales, np.float32(1.0))[:, :, None]
    steps = np.clip(np.rint(values / divisors), -127, 127).astype(np.int16)
    return (steps + ZERO).astype(np.uint8), scales


def dequantize_blocks(stored: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """The float32 [outputs, inputs] that `quantize_blocks`' result stands for."""
    values = (stored.astype(np.float32) - np.float32(ZERO)) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(stored), -1)[:, :inputs])
