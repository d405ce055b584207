"""8-bit weights in blocks: round to nearest, symmetric, one scale per block of an output's inputs.

The layout is that of ONNX Runtime's MatMulNBits (which also quantizes each token's activations per block when it
computes with accuracy level 4) and of GatherBlockQuantized, so that a tied table is stored once.

What 8 bits lose is kept where it matters and costs little. A table has a second plane of 4 bits, of which only the
rows that are looked up are read. A matrix may have a second plane of 8 bits, which costs as much as the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ZERO = 128  # what a stored byte of weight zero is
RESIDUAL_LEVELS = 15  # steps of a 4-bit plane within one step of the 8-bit plane
_RESIDUAL_ZERO = 8
WIDE = 512  # d_model


@dataclass(frozen=True)
class Storage:
    """How an int8 export stores a model; the defaults are what is shipped (measured: benchmarks/quantization.py), for
    wide models see `for_width`.

    ``matrix_block``: inputs per scale of the matrices that are applied again and again. Activations are rounded in
    the same blocks. ``table_block``: of the embedding and the head, which are read once per token.
    ``rescored``: of how many likeliest tokens the logits are computed again, in float32 and from both planes of the
    table; 0: the table has one plane. ``double``, ``single``: parts of the names of matrices that have two planes of
    8 bits, or stay in float32.
    """

    matrix_block: int = 16
    table_block: int = 128
    rescored: int = 32
    double: tuple[str, ...] = ("block.w",)  # act: few weights, applied again and again
    single: tuple[str, ...] = ()

    @classmethod
    def for_width(cls, d_model: int) -> Storage:
        """What is shipped for a model of this width.

        Narrow models need the finer blocks for their likeliest tokens, and wait for their instructions anyway; wide
        ones wait for their weights, of which finer blocks read a tenth more and unpack a quarter slower.
        """
        table_block = 64 if d_model % 128 else 128  # a block that does not fit is padded
        if d_model < WIDE:
            return cls(table_block=table_block)
        return cls(matrix_block=128, table_block=table_block, double=("block.wv", "block.wo"))

    def planes(self, tensor: str) -> int:
        """In how many planes of 8 bits a matrix is stored, 0 for float32."""
        if any(part in tensor for part in self.single):
            return 0
        return 2 if any(part in tensor for part in self.double) else 1


def quantize_blocks(matrix: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize [outputs, inputs]: uint8 [outputs, blocks, block] and float32 scales [outputs, blocks].

    The last block is padded by zeros. value = (byte - 128) * scale; the error is at most half a scale.
    """
    values = _in_blocks(matrix, block)
    scales = np.abs(values).max(axis=2) / np.float32(127.0)
    steps = np.clip(np.rint(values / _divisors(scales)), -127, 127).astype(np.int16)
    return (steps + ZERO).astype(np.uint8), scales


def dequantize_blocks(stored: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """The float32 [outputs, inputs] that `quantize_blocks`' result stands for."""
    values = (stored.astype(np.float32) - np.float32(ZERO)) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(stored), -1)[:, :inputs])


def quantize_residual(matrix: np.ndarray, stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What `quantize_blocks` lost of a matrix, in 4 bits: uint8 [outputs, blocks * block / 2], the even input low.

    value = (nibble - 8) * scale / 15 with the scales of the first plane. Together the planes err by at most 1/30 of
    a scale.
    """
    outputs, _, block = stored.shape
    lost = _in_blocks(matrix - dequantize_blocks(stored, scales, matrix.shape[1]), block)
    steps = np.rint(lost / _divisors(scales) * RESIDUAL_LEVELS) + _RESIDUAL_ZERO
    nibbles = np.clip(steps, 0, 15).astype(np.uint8).reshape(outputs, -1)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def dequantize_residual(packed: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """The float32 [outputs, inputs] that `quantize_residual`'s result stands for."""
    outputs, blocks = scales.shape
    nibbles = np.stack([packed & 15, packed >> 4], axis=2).astype(np.float32) - np.float32(_RESIDUAL_ZERO)
    values = nibbles.reshape(outputs, blocks, -1) * (scales / np.float32(RESIDUAL_LEVELS))[:, :, None]
    return np.ascontiguousarray(values.reshape(outputs, -1)[:, :inputs])


def _in_blocks(matrix: np.ndarray, block: int) -> np.ndarray:
    """[outputs, blocks, block], padded by zeros."""
    outputs, inputs = matrix.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), dtype=np.float32)
    padded[:, :inputs] = matrix
    return padded.reshape(outputs, blocks, block)


def _divisors(scales: np.ndarray) -> np.ndarray:
    return np.where(scales > 0, scales, np.float32(1.0))[:, :, None]
