"""Which backend runs a model directory, and opening it. Only what is chosen gets imported."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

from rlm_engine.checkpoint import read_header, read_model_directory, read_own_config
from rlm_engine.config import ModelConfig
from rlm_engine.decoding.interface import Backend
from rlm_engine.errors import ModelError, UsageError

BACKENDS = ("auto", "onnx", "torch")
DEVICES = ("auto", "cpu", "cuda", "directml", "coreml")
DTYPES = ("auto", "float32", "bfloat16")
_EXPORT = Path("onnx", "manifest.json")


def open_backend(
    directory: Path, backend: str = "auto", device: str = "auto", dtype: str = "auto", compiled: bool = False
) -> tuple[ModelConfig, Backend, int]:
    """A model directory's configuration, the backend that runs it, and how many parameters it has.

    "auto" is ONNX Runtime where the directory holds an export and onnxruntime is installed, else PyTorch; a GPU asked
    for by name means PyTorch as well. PyTorch on device "auto" takes a CUDA GPU when there is one.
    ``dtype`` is PyTorch's: "auto" computes in float32 on the CPU and in bfloat16 on a GPU; an ONNX export has the
    precision it was written in. ``compiled``: PyTorch's pieces are compiled, see `TorchBackend`.
    Raises UsageError for a backend, device or dtype that does not exist, ModelError when the model cannot be loaded.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device not in DEVICES:
        raise UsageError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if backend == "auto":
        ready = (directory / _EXPORT).is_file() and importlib.util.find_spec("onnxruntime") is not None
        backend = "onnx" if ready and device != "cuda" and dtype == "auto" and not compiled else "torch"
    if backend == "torch":
        return _open_torch(directory, device, dtype, compiled)
    if compiled:
        raise UsageError("compiled is for backend 'torch'; ONNX Runtime optimises its graphs itself")
    if dtype != "auto":
        raise UsageError("dtype is for backend 'torch'; an ONNX export has the precision it was written in")
    return _open_onnx(directory, device)


def count_parameters(directory: Path, config: ModelConfig) -> int:
    """Parameters of a directory in our own layout, read from headers. Raises ModelError when it is damaged."""
    if (directory / "model.safetensors").exists() or not (directory / _EXPORT).exists():
        return sum(math.prod(shape) for shape in read_header(directory)[1].values())
    from rlm_engine.export.manifest import read_manifest

    return read_manifest(directory, config).parameters


def _open_onnx(directory: Path, device: str) -> tuple[ModelConfig, Backend, int]:
    from rlm_engine.export.manifest import read_manifest

    if not (directory / _EXPORT).is_file():
        raise ModelError(f"{directory}: no ONNX export; make one: rlm-chat export onnx {directory}")
    try:
        from rlm_engine.backends.onnx import open_onnx
    except ImportError:
        raise ModelError("ONNX Runtime is not installed; run: pip install onnxruntime") from None
    config = read_own_config(directory)
    opened = open_onnx(directory, config, device.replace("auto", "cpu"))
    return config, opened, read_manifest(directory, config).parameters


def _open_torch(directory: Path, device: str, dtype: str, compiled: bool) -> tuple[ModelConfig, Backend, int]:
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"device {device!r} needs ONNX Runtime: export the model (rlm-chat export onnx) first")
    if (directory / _EXPORT).is_file() and not (directory / "model.safetensors").exists():
        raise ModelError(f"{directory}: holds an ONNX export only, no model.safetensors; use --backend onnx")
    if "torch" not in sys.modules:
        # Waiting threads must not spin: measured 2 to 8 times slower beside any other work on few cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError:
        raise ModelError(
            f"{directory} has no ONNX export and PyTorch is not installed; run: pip install 'rlm-chat[torch]'"
            if not (directory / _EXPORT).is_file()
            else "PyTorch is not installed; run: pip install 'rlm-chat[torch]'"
        ) from None
    from rlm_engine.backends.torch import TorchBackend
    from rlm_engine.models import module_from

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU here; use --device cpu")
    target = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    config, tensors = read_model_directory(directory)
    number = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and target == "cuda") else torch.float32
    module = module_from(config, tensors).to(target, number)
    parameters = sum(p.numel() for p in module.parameters())
    pieces: Any = module.pieces()
    return config, TorchBackend(pieces, number, target, compiled), parameters
