"""`onnx/manifest.json`: what was exported, how exact it was found to be, and the checksums it is loaded by.

A model directory is a stranger's. Nothing names a file here but ourselves: the files are those the configuration asks
for, regular files in the one folder, and a graph may read weights from one of two files only: `tables.bin` for what
goes from tokens to states and back, `weights.bin` for all others. Only the tables may lie in a sibling's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlm_engine.checkpoint import read_json, sibling_directory
from rlm_engine.config import ActConfig, BlendConfig, ModelConfig, RoutedConfig
from rlm_engine.errors import ModelError
from rlm_engine.export.external import external_tensors
from rlm_engine.export.quantize import Storage
from rlm_engine.export.signatures import signatures

FOLDER, MANIFEST, WEIGHTS, TABLES = "onnx", "manifest.json", "weights.bin", "tables.bin"
PRECISIONS = ("fp32", "int8")
FORMAT = 2
_MAX_GRAPH_BYTES = 16 << 20  # matrices are outside
_MAX_MANIFEST_BYTES = 1 << 20
_AGAIN = "run `rlm-chat export onnx` again"


@dataclass(frozen=True)
class Verification:
    """How the export compared with PyTorch's float32 on a sample text, through the same decoder.

    ``logits_max_difference``: over all tokens that took the same depth. ``depth_agreement``, ``top1_agreement``:
    shares of the tokens with the same depth and the same likeliest next token. ``greedy_agreement``: share of a greedy
    text's tokens before the first that differs. ``logits_tolerance``: the difference above which the export is refused.
    None: exports older than these two.
    """

    reference: str
    tokens: int
    logits_max_difference: float
    depth_agreement: float
    top1_agreement: float
    logits_tolerance: float | None = None
    greedy_agreement: float | None = None


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 (hex) of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of the manifest. ``settings``: those of the configuration that are frozen into the graphs.

    ``storage``: how the weights were quantized; None for fp32. ``shared_with``: name of the sibling directory whose
    `tables.bin` this model uses, too.
    """

    precision: str
    parameters: int
    opset: int
    ir_version: int
    onnxruntime: str
    settings: dict[str, Any]
    files: dict[str, StoredFile]
    storage: Storage | None = None
    verification: Verification | None = None
    shared_with: str | None = None

    def folder(self, directory: Path, file: str) -> Path:
        """The folder that holds a file of the export in `directory`. Raises ModelError for an odd ``shared_with``."""
        if file == TABLES and self.shared_with is not None:
            directory = sibling_directory(directory, self.shared_with, f"{FOLDER}/{MANIFEST}")
        return directory / FOLDER

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"


def weight_file(graph: str) -> str:
    """The file a graph's weights are in. Fine-tuned models may share the tables of what they were made from."""
    return TABLES if graph in ("embed", "head") else WEIGHTS


def frozen_settings(config: ModelConfig) -> dict[str, Any]:
    """What a graph depends on. The rest of a configuration (window, halting rule, chat format) may change freely."""
    names = ["architecture", "vocab_size", "d_model", "n_heads", "norm_eps"]
    if isinstance(config, ActConfig):
        names += ["ffn", "max_steps", "logit_softcap"]
    elif isinstance(config, BlendConfig):
        names += ["n_layers", "max_steps", "context_length"]
    elif isinstance(config, RoutedConfig):
        names += ["n_layers", "ffn", "biases"]
    else:
        names += ["n_layers", "ffn", "max_steps", "router", "positions"]
        names += ["context_length"] if config.positions == "learned" else []
    everything = config.to_dict()
    return {name: everything[name] for name in names}


def read_manifest(directory: Path, config: ModelConfig) -> Manifest:
    """Read and check `onnx/manifest.json` of a model directory against the configuration. Raises ModelError."""
    path = directory / FOLDER / MANIFEST
    _require_plain(directory / FOLDER, stat.S_ISDIR, "a folder")
    _require_plain(path, stat.S_ISREG, "a regular file")
    data = read_json(path, _MAX_MANIFEST_BYTES)
    if data.pop("format", None) != FORMAT:
        raise ModelError(f"{path}: not format {FORMAT}; {_AGAIN}, or use a program as new as the file")
    try:
        manifest = _from_dict(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: {error or 'damaged'}; {_AGAIN}") from None
    for name, value in frozen_settings(config).items():
        if manifest.settings.get(name) != value:
            raise ModelError(
                f"{path}: exported with {name} {manifest.settings.get(name)!r}, config.json says {value!r}; {_AGAIN}"
            )
    expected = {f"{name}.onnx" for name in signatures(config)} | {WEIGHTS, TABLES}
    if set(manifest.files) != expected:
        odd = sorted(set(manifest.files) ^ expected)[0]
        raise ModelError(f"{path}: {odd!r} is {'missing from' if odd in expected else 'not wanted in'} its files")
    return manifest


def _from_dict(data: dict[str, Any]) -> Manifest:
    """Raises TypeError, ValueError or KeyError saying what is wrong."""
    if set(data) - set(Manifest.__dataclass_fields__):
        raise ValueError(f"unknown key {min(set(data) - set(Manifest.__dataclass_fields__))!r}")
    missing = set(Manifest.__dataclass_fields__) - set(data)
    if missing:
        raise ValueError(f"{min(missing)!r} is missing")
    if data["precision"] not in PRECISIONS:
        raise ValueError(f"unknown precision {data['precision']!r}; this program knows {', '.join(PRECISIONS)}")
    for name in ("parameters", "opset", "ir_version"):
        if type(data[name]) is not int or data[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1")
    if not isinstance(data["onnxruntime"], str) or not isinstance(data["settings"], dict):
        raise ValueError("onnxruntime must be a text and settings an object")
    files = {name: _stored_file(name, entry) for name, entry in data["files"].items()}
    verification = data["verification"]
    if verification is not None:
        verification = Verification(**verification)
    storage = None if data["storage"] is None else _storage(data["storage"])
    return Manifest(**data | {"files": files, "storage": storage, "verification": verification})


def _storage(entry: dict[str, Any]) -> Storage:
    names: dict[str, Any] = {name: tuple(entry.pop(name, ())) for name in ("double", "single")}
    return Storage(**entry, **names)


def _stored_file(name: str, entry: Any) -> StoredFile:
    stored = StoredFile(**entry)
    good = type(stored.size_bytes) is int and stored.size_bytes >= 0 and isinstance(stored.sha256, str)
    if not good:
        raise ValueError(f"files: {name!r} needs size_bytes and sha256")
    return stored


def check_files(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Check every file; returns how many bytes of weights each graph reads when it runs. Raises ModelError.

    Rows that are looked up do not count. Regular files (no links), sizes and checksums of the manifest, and a graph
    refers to nothing but its `weight_file`.
    """
    read_bytes: dict[str, int] = {}
    for name, stored in manifest.files.items():
        folder = manifest.folder(directory, name)
        _require_plain(folder, stat.S_ISDIR, "a folder")
        path = folder / name
        _require_plain(path, stat.S_ISREG, "a regular file")
        size = path.stat().st_size
        if size != stored.size_bytes:
            raise ModelError(f"{path}: {size} bytes, the manifest says {stored.size_bytes}; {_AGAIN}")
        is_graph = name not in (WEIGHTS, TABLES)
        if is_graph and size > _MAX_GRAPH_BYTES:
            raise ModelError(f"{path}: {size} bytes is too large for a graph (at most {_MAX_GRAPH_BYTES})")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != stored.sha256:
            raise ModelError(f"{path}: its SHA-256 is not the manifest's, the file is damaged; {_AGAIN}")
        if is_graph:
            graph = name.removesuffix(".onnx")
            weights = weight_file(graph)
            read_bytes[graph] = _weight_bytes(path, weights, manifest.files[weights].size_bytes)
    return read_bytes


def _weight_bytes(path: Path, weights: str, size: int) -> int:
    try:
        tensors = external_tensors(path.read_bytes())
    except (ValueError, KeyError):
        raise ModelError(f"{path}: not an ONNX graph") from None
    for tensor in tensors:
        if tensor.location != weights:
            raise ModelError(f"{path}: wants to read {tensor.location!r}; this graph may read {weights} only")
        if tensor.offset < 0 or tensor.length < 0 or tensor.offset + tensor.length > size:
            raise ModelError(f"{path}: wants to read beyond the end of {weights}")
    return sum(tensor.length for tensor in tensors if not tensor.is_picked)


def _require_plain(path: Path, kind: Any, what: str) -> None:
    """No link either: it may lead anywhere."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    if not kind(mode):
        raise ModelError(f"{path}: not {what}; copy it here, links are not followed")
