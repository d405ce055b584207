"""Rotary position tables, in numpy so that decoding needs no torch; the models use the same function."""

from __future__ import annotations

import numpy as np


def rotary_tables(positions: np.ndarray, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float64 [tokens, head_dim/2], of rotary position embedding (Su et al. 2021).

    Computed in float64 so that positions far beyond the training length keep their precision
    (half precision tables are off by up to 2 rad at position 512).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)
