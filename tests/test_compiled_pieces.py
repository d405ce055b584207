"""Pieces that went through torch.compile compute what the plain ones do, and are not compiled anew for every token."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import decoder_on, model_of
from torch._dynamo.utils import counters

from rlm_engine import load_model
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.errors import UsageError

pytestmark = pytest.mark.slow

PROMPT = [3, 1, 4, 1, 5]
FOLLOWING = [9, 2, 6, 5]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("design", ["act", "blend", "rlm-90m", "mixture-learned"])
def test_compiled_pieces_compute_the_same(design: str) -> None:
    model = model_of(design)
    torch._dynamo.reset()

    def decode(compiled: bool) -> list[np.ndarray]:
        backend = TorchBackend(model.pieces(), torch.float32, compiled=compiled)
        decoder = decoder_on(backend, model.config)
        logits = [decoder.feed([PROMPT], "all").logits]
        return logits + [decoder.feed([[token]]).logits for token in FOLLOWING]

    # fused kernels round differently in the last bits, and recurrences add that up
    for plain, fused in zip(decode(compiled=False), decode(compiled=True), strict=True):
        np.testing.assert_allclose(fused, plain, atol=1e-4 * np.abs(plain).max())


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_no_new_graphs_once_warm() -> None:
    model = model_of("act")
    torch._dynamo.reset()
    decoder = decoder_on(TorchBackend(model.pieces(), torch.float32, compiled=True), model.config)
    decoder.feed([PROMPT])
    for token in FOLLOWING[:2]:
        decoder.feed([[token]])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for token in FOLLOWING * 2:
        decoder.feed([[token]])
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiling_is_for_pytorch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compiled is for backend 'torch'"):
        load_model("base", backend="onnx", compiled=True)
