"""Turn a published checkpoint (a `.pt` of mor, or a safetensors directory of any design) into a model directory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlm_engine.checkpoint import TensorFile, read_config, read_model_directory, write_model_directory
from rlm_engine.config import MixtureConfig, ModelConfig
from rlm_engine.errors import EngineError, InputError, ModelError, UsageError
from rlm_engine.published import mixture, recognise

if TYPE_CHECKING:
    import torch

_PICKLED = (".pt", ".pth", ".bin")
_STATE_KEYS = ("model_state_dict", "state_dict", "model")  # what trainers call the weights in their checkpoints
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_TOKENIZER_FILES = {"technical": ("vocab.json", "merges.txt"), "file": ("tokenizer.json",)}


def convert_checkpoint(
    source: Path, target: Path, *, tokenizer: Path | None = None, heads: int | None = None
) -> ModelConfig:
    """Write ``source`` as a model directory ``target`` (config.json, model.safetensors, tokenizer files).

    ``source``: a `.pt` whose object is a state dict or holds one as "model_state_dict" (read with
    ``weights_only=True``: code in it is refused, never run), a `.safetensors` file of mor, or a published directory.
    ``tokenizer``: a directory with vocab.json and merges.txt, or tokenizer.json (default: a source directory itself);
    without one a mor model takes token ids only. ``heads``: attention heads, the one size the weights do not tell
    (default: heads of 64 dimensions, 6 for d_model 384).

    The target appears complete or not at all and is never overwritten. Returns its configuration.
    UsageError for arguments that cannot be, InputError for a missing source, ModelError for what is in it.
    """
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; choose another directory or remove it first")
    if heads is not None and heads < 1:
        raise UsageError(f"heads must be at least 1, got {heads}")
    config, tensors = _read(source, heads)
    if tokenizer is None and source.is_dir():
        tokenizer = source
    elif tokenizer is not None and not _kinds_in(tokenizer):
        raise InputError(f"{tokenizer}: holds neither vocab.json and merges.txt nor tokenizer.json")
    weights = source / "model.safetensors" if source.is_dir() else source
    provenance = {**config.provenance, "converted_from": source.name, "sha256": _sha256(weights)}
    config = dataclasses.replace(config, provenance=provenance)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the last step is a rename within one file system.
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        config = _with_tokenizer(config, tokenizer, partial)
        _write(partial, config, tensors)
        partial.chmod(0o755 & ~_umask())
        if os.path.lexists(target):  # made meanwhile: rename would replace an empty directory
            raise UsageError(f"{target}: exists already; choose another directory or remove it first")
        partial.rename(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _read(source: Path, heads: int | None) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    if source.is_dir():
        if "architecture" in read_config(source):
            raise UsageError(f"{source}: is a model directory of this program already")
        if heads is not None:
            raise UsageError(f"{source}: the number of heads stands in its config.json; leave heads out")
        return read_model_directory(source)
    if not source.is_file():
        raise InputError(f"{source}: no such file or directory")
    if source.suffix == ".safetensors":
        file = TensorFile(source)
        published = {name: file.read(name) for name in file.shapes}
    elif source.suffix in _PICKLED:
        published = _read_pickled(source)
    else:
        raise UsageError(f"{source}: expected a directory, a .safetensors file or a checkpoint {', '.join(_PICKLED)}")
    shapes = {name: tensor.shape for name, tensor in published.items()}
    design = recognise({}, shapes)
    if design is None:
        raise ModelError(f"{source}: the tensor names fit none of the published designs")
    if design is not mixture:
        raise UsageError(f"{source}: this design needs its config.json; give the directory that holds both")
    config = mixture.config({} if heads is None else {"n_heads": heads}, shapes, str(source))
    return config, mixture.tensors(config, published)


def _read_pickled(source: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UsageError("reading a .pt file needs PyTorch: pip install 'rlm-chat[torch]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about the pickle's age are not for the person converting it
            # Only the zip format of torch >= 1.6 can be mapped instead of read into memory.
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # whatever a damaged or hostile file provokes: it is refused all the same
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds Python objects beside tensors, and running code from a checkpoint is refused"
        raise ModelError(f"{source}: not a readable checkpoint ({reason})") from None
    tensors = _unwrap(_state_dict(loaded, source), source)
    size = source.stat().st_size
    result = {}
    for name, tensor in tensors.items():
        # A view can claim any size over a few stored bytes.
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise ModelError(f"{source}: tensor {name!r} {list(tensor.shape)} is not stored as it should be")
        if not tensor.is_floating_point():
            raise ModelError(f"{source}: tensor {name!r} is {tensor.dtype}; weights must be floating point")
        values = tensor.detach().to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"{source}: tensor {name!r} holds NaN or infinity; the file is damaged")
        result[name] = values
    return result


def _state_dict(loaded: Any, source: Path) -> dict[str, torch.Tensor]:
    import torch

    found = loaded
    if isinstance(loaded, dict):
        key = next((k for k in _STATE_KEYS if isinstance(loaded.get(k), dict)), None)
        found = loaded if key is None else loaded[key]
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{source}: holds no state dict (expected 'model_state_dict' or names with tensors)")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(f"{source}: {str(name)[:80]!r} is a {type(value).__name__}, not a tensor; no state dict")
    return found


def _unwrap(tensors: dict[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in result:
            raise ModelError(f"{source}: tensor {name!r} is there twice, with and without a wrapper's prefix")
        result[name] = tensor
    return result


def _kinds_in(directory: Path) -> list[str]:
    kinds = _TOKENIZER_FILES.items()
    return [kind for kind, names in kinds if all((directory / name).is_file() for name in names)]


def _with_tokenizer(config: ModelConfig, tokenizer: Path | None, target: Path) -> ModelConfig:
    """Copy the tokenizer's files, let the ordinary loader check them, and say in the configuration which kind it is."""
    from rlm_engine.tokenizer import load_tokenizer

    if not isinstance(config, MixtureConfig):
        return config  # the other designs use the bundled GPT-2 vocabulary
    kinds = _kinds_in(tokenizer) if tokenizer is not None else []
    if tokenizer is None or not kinds:
        return dataclasses.replace(config, tokenizer="none", chat_format=None)
    for name in _TOKENIZER_FILES[kinds[0]]:
        shutil.copyfile(tokenizer / name, target / name)
    config = dataclasses.replace(config, tokenizer=kinds[0], chat_format=None)
    try:
        loaded = load_tokenizer(config, target)
    except EngineError as error:  # name the file the person knows, not our copy of it
        raise ModelError(str(error).replace(str(target), str(tokenizer))) from None
    assert loaded is not None
    speaks = {"<bos>", "<user>", "<assistant>", "<|endoftext|>"} <= set(loaded.special)
    return dataclasses.replace(config, chat_format=mixture.CHAT_FORMAT if speaks else None)


def _write(target: Path, config: ModelConfig, tensors: dict[str, np.ndarray]) -> None:
    import torch

    write_model_directory(target, config, {name: torch.from_numpy(np.array(t)) for name, t in tensors.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
