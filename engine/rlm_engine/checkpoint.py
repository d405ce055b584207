"""Reading and writing model directories: validated before anything is allocated; no code from them is ever run."""

from __future__ import annotations

import json
import math
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlm_engine.config import ModelConfig, config_from_dict
from rlm_engine.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object of config.json. ModelError for anything but a small regular file with one JSON object."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    return read_json(directory / "config.json", MAX_CONFIG_BYTES)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object of a small regular file of at most `limit` bytes. Raises ModelError."""
    text = _read_small_file(path, limit)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ModelError("a key occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ModelError(f"{name} is not a number")


def _read_small_file(path: Path, limit: int) -> str:
    _require_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise ModelError(f"{path}: {size} bytes is too large for this file (at most {limit})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _require_regular(path: Path) -> None:
    """A FIFO or device would hang or flood the reader."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: not a regular file")


class TensorFile:
    """A safetensors file, checked completely before a tensor is read: sizes, offsets, no holes, no overlap."""

    def __init__(self, path: Path):
        self.path = path
        _require_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ModelError(f"{path}: truncated, {size} bytes")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise ModelError(f"{path}: header of {length} bytes does not fit the file of {size} bytes")
            raw = file.read(length)
        self._start = 8 + length
        try:
            header = json.loads(raw, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        except ModelError as error:
            raise ModelError(f"{path}: header: {error}") from None
        except (ValueError, RecursionError):
            raise ModelError(f"{path}: header is not valid JSON") from None
        if not isinstance(header, dict):
            raise ModelError(f"{path}: header is not a JSON object")
        header.pop("__metadata__", None)
        self._entries = {name: self._entry(name, entry) for name, entry in header.items()}
        position = 0
        for name, (_, _, begin, end) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != position:
                raise ModelError(f"{path}: tensor {name!r} does not follow the one before it")
            position = end
        if self._start + position != size:
            raise ModelError(f"{path}: holds {size} bytes, the header describes {self._start + position}; truncated?")

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise ModelError(f"{where}: incomplete header entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _BYTES:
            raise ModelError(f"{where}: unknown dtype {dtype!r}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
                raise ModelError(f"{where}: shape and offsets must be lists of whole numbers")
        if len(shape) > 8 or len(offsets) != 2:
            raise ModelError(f"{where}: impossible shape or offsets")
        if offsets[1] - offsets[0] != math.prod(shape) * _BYTES[dtype]:
            raise ModelError(f"{where}: {shape} of {dtype} does not fill its {offsets[1] - offsets[0]} bytes")
        return dtype, tuple(shape), offsets[0], offsets[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: entry[1] for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Every tensor's dtype as the format names it (F32, BF16, ...)."""
        return {name: entry[0] for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor: half and single precision as float32, F64 and I64 as they are.

        ModelError for other dtypes and for NaN or infinity.
        """
        dtype, shape, begin, end = self._entries[name]
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            raw = file.read(end - begin)
        if len(raw) != end - begin:
            raise ModelError(f"{self.path}: truncated while reading {name!r}")
        if dtype == "BF16":
            values = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype in _NUMPY:
            values = np.frombuffer(raw, dtype=_NUMPY[dtype])
            values = values.astype(np.float32) if dtype == "F16" else values.copy()
        else:
            raise ModelError(f"{self.path}: tensor {name!r} has dtype {dtype}; weights must be floating point")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ModelError(f"{self.path}: tensor {name!r} holds NaN or infinity; the file is damaged")
        return values.reshape(shape)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in our own layout. Nothing is allocated."""
    import torch

    from rlm_engine.models import build_model

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}


def read_model_directory(directory: Path, *, compare: bool = True) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Configuration and weights (float32, or float64 where stored so) in our own tensor names.

    Recognises our own layout and the published ones. A directory may leave tensors to a sibling it names in
    ``"shared_with"`` (our base and chat models share the embedding table).
    Raises ModelError naming file, tensor, found and expected shape; sizes are compared before anything is allocated.
    ``compare=False``: names and sizes are the caller's to check (knowing what to expect takes PyTorch).
    """
    data = read_config(directory)
    if "architecture" not in data:
        return _read_published(directory, data, TensorFile(directory / "model.safetensors"))
    config, files = _open(directory, data)
    if compare:
        _compare(files, expected_shapes(config), directory)
    return config, {name: file.read(name) for name, file in files.items()}


def read_header(directory: Path) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """Configuration and tensor shapes of a directory in our own layout, without reading weights or needing torch."""
    config, files = _open(directory, read_config(directory))
    return config, {name: file.shapes[name] for name, file in files.items()}


def read_own_config(directory: Path) -> ModelConfig:
    """The configuration of a directory in our own layout; its weights are not looked at."""
    data = read_config(directory)
    data.pop("shared_with", None)
    return config_from_dict(data, str(directory / "config.json"))


def _open(directory: Path, data: dict[str, Any]) -> tuple[ModelConfig, dict[str, TensorFile]]:
    """The configuration, and which file holds each tensor."""
    weights = TensorFile(directory / "model.safetensors")
    data = dict(data)
    shared = data.pop("shared_with", None)
    config = config_from_dict(data, str(directory / "config.json"))
    files = dict.fromkeys(weights.shapes, weights)
    if shared is not None:
        sibling = TensorFile(sibling_directory(directory, shared, "config.json") / "model.safetensors")
        files = dict.fromkeys(sibling.shapes, sibling) | files
    return config, files


def sibling_directory(directory: Path, name: Any, said_by: str) -> Path:
    """The directory beside a model's that holds what both share. Raises ModelError for anything but a plain name."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ModelError(f"{directory / said_by}: shared_with must be the name of a sibling directory")
    return directory.parent / name


def _compare(files: Mapping[str, TensorFile], expected: dict[str, tuple[int, ...]], directory: Path) -> None:
    path = directory / "model.safetensors"
    for name, shape in expected.items():
        if name not in files:
            raise ModelError(f"{path}: tensor {name!r} is missing")
        found = files[name].shapes[name]
        if found != shape:
            raise ModelError(f"{path}: tensor {name!r} is {list(found)}, config says {list(shape)}")
        if files[name].dtypes[name] not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(
                f"{path}: tensor {name!r} has dtype {files[name].dtypes[name]}; weights must be floating point"
            )
    extra = sorted(set(files) - set(expected))
    if extra:
        raise ModelError(f"{path}: tensor {extra[0]!r} does not belong to this model")


def _read_published(
    directory: Path, data: dict[str, Any], weights: TensorFile
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    from rlm_engine import published

    design = published.recognise(data, weights.shapes)
    if design is None:
        raise ModelError(
            f"{directory / 'config.json'}: neither an rlm-chat model (no 'architecture') nor one of the published "
            "designs; the tensor names fit none of them"
        )
    config = design.config(data, weights.shapes, str(directory / "config.json"))
    return config, design.tensors(config, {name: weights.read(name) for name in weights.shapes})


def write_model_directory(
    directory: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor], shared_with: str = ""
) -> None:
    """Write config.json and model.safetensors atomically, replacing what is there.

    An ONNX export of the weights before is not found any more: its manifest goes.
    ``shared_with``: name of a sibling that holds the tensors left out here.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    data = config.to_dict()
    if shared_with:
        data["shared_with"] = shared_with
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        new = Path(temporary)
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, new / "model.safetensors")
        (new / "config.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (directory / "onnx" / "manifest.json").unlink(missing_ok=True)
        for name in ("model.safetensors", "config.json"):
            (new / name).chmod(0o644)  # a temporary directory's files are private
            (new / name).replace(directory / name)
