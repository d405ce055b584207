"""Writing a model's `onnx/` folder: graphs built by hand from the weights, two weight files, a manifest.

Needs the package `onnx`, but not PyTorch; where PyTorch is installed the export is compared with it before it is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlm_engine.checkpoint import read_config, read_model_directory, read_own_config
from rlm_engine.config import ModelConfig
from rlm_engine.decoding.interface import Backend, Decoder
from rlm_engine.errors import ModelError, UsageError
from rlm_engine.export.manifest import (
    FOLDER,
    MANIFEST,
    PRECISIONS,
    TABLES,
    WEIGHTS,
    Manifest,
    StoredFile,
    Verification,
    check_files,
    frozen_settings,
    read_manifest,
)
from rlm_engine.export.quantize import Storage

if TYPE_CHECKING:
    from rlm_engine.tokenizer import Tokenizer

# Of logits, relative to the largest where that is above 1. float32: another order of summation, over all recurrences.
# int8: rounding is a few per cent; more is a broken export. What it costs is measured by benchmarks/quantization.py.
TOLERANCE = {"fp32": 1e-3, "int8": 0.25}
SAMPLE_TOKENS = 64  # half as a prompt, half token by token
GREEDY_TOKENS = 32  # generated after the sample's first half
_BESIDE = ("README.md", "tokenizer.json", "vocab.json", "merges.txt")  # what a model without weights still needs
_SAMPLE = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every morning she walked to "
    "the river, and on the way she counted the birds: one, two, three. The speed of light is about 300,000 kilometres "
    "per second, which is why we see distant stars as they were long ago. What do you think will happen next? "
)


def export_onnx(
    source: Path,
    target: Path | None = None,
    precision: str = "fp32",
    storage: Storage | None = None,
) -> Manifest:
    """Export the model directory `source` into its own `onnx/`, or into a new model directory `target`.

    ``precision``: "fp32" or "int8"; ``storage``: how int8 stores the weights, default `Storage.for_width`.
    What is there is replaced only once the new export works.
    Raises ModelError for damaged weights and for an fp32 export that does not compute what PyTorch does, UsageError
    for an unknown precision or a target that is in the way.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    _require_onnx()
    if target is None and "architecture" not in read_config(source):
        raise UsageError(f"{source} is a published checkpoint; give --out a new directory for the model")
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an empty directory; give --out a new one")
    config, tensors = read_model_directory(source, compare=False)
    directory = source if target is None else target
    directory.mkdir(parents=True, exist_ok=True)
    with _reported(directory), tempfile.TemporaryDirectory(dir=directory, prefix=".exporting-") as temporary:
        work = Path(temporary)
        manifest = write_graphs(work, config, tensors, precision, storage)
        manifest = _verified(work, config, tensors, manifest, _tokenizer(config, source))
        if target is not None:
            (directory / "config.json").write_text(config.to_json(), encoding="utf-8")
            for name in _BESIDE:
                if (source / name).is_file():
                    shutil.copyfile(source / name, directory / name)
        if (directory / FOLDER).exists():
            (directory / FOLDER).replace(work / "before")
        (work / FOLDER).replace(directory / FOLDER)
    return manifest


def write_graphs(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    precision: str,
    storage: Storage | None = None,
) -> Manifest:
    """Write `directory`/onnx with an unverified manifest. Raises ModelError when tensors and configuration differ."""
    import onnxruntime

    from rlm_engine.export.designs import build_graphs
    from rlm_engine.export.graphs import IR_VERSION, OPSET, WeightFile, Weights

    folder = directory / FOLDER
    folder.mkdir()
    stored = {name: WeightFile(folder / name) for name in (WEIGHTS, TABLES)}
    storage = (storage or Storage.for_width(config.d_model)) if precision == "int8" else None
    weights = Weights(tensors, stored, storage)
    files = {}
    try:
        for name, model in build_graphs(config, weights):
            raw = model.SerializeToString()
            (folder / f"{name}.onnx").write_bytes(raw)
            files[f"{name}.onnx"] = StoredFile(len(raw), hashlib.sha256(raw).hexdigest())
    finally:
        digests = {name: file.close() for name, file in stored.items()}
    files |= {name: StoredFile(file.size, digests[name]) for name, file in stored.items()}
    manifest = Manifest(
        precision=precision,
        parameters=sum(tensor.size for tensor in tensors.values()),
        opset=OPSET,
        ir_version=IR_VERSION,
        onnxruntime=onnxruntime.__version__,
        settings=frozen_settings(config),
        files=files,
        storage=storage,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def share_tables(directory: Path, sibling: str) -> None:
    """Delete the export's tables where the directory `sibling` beside it has the same; both models then use those.

    Raises ModelError when either export is damaged or the tables differ.
    """
    own, other = (read_manifest(d, read_own_config(d)) for d in (directory, directory.parent / sibling))
    if other.shared_with is not None or own.files[TABLES] != other.files[TABLES]:
        raise ModelError(f"{directory / FOLDER / TABLES} is not the same as {sibling}'s; nothing was deleted")
    shared = replace(own, shared_with=sibling)
    check_files(directory, shared)
    (directory / FOLDER / MANIFEST).write_text(shared.to_json(), encoding="utf-8")
    (directory / FOLDER / TABLES).unlink(missing_ok=True)


def _verified(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    manifest: Manifest,
    tokenizer: Tokenizer | None,
) -> Manifest:
    """The manifest with what a comparison with PyTorch's float32 found; as it is where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        return manifest
    from rlm_engine.backends.onnx import open_onnx
    from rlm_engine.backends.torch import TorchBackend
    from rlm_engine.models import module_from

    single = {name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()}
    pieces = module_from(config, single).pieces()
    ids = _sample(config, tokenizer)
    reference, exported = TorchBackend(pieces, torch.float32), open_onnx(directory, config)
    expected, depths = _decode(reference, config, ids)
    found, found_depths = _decode(exported, config, ids)
    texts = [_greedy(backend, config, ids) for backend in (reference, exported)]
    same = np.array([a == b for a, b in zip(depths, found_depths, strict=True)])
    difference = float(np.abs(found - expected)[same].max()) if same.any() else float("inf")
    allowed = TOLERANCE[manifest.precision] * max(1.0, float(np.abs(expected).max()))
    exact = manifest.precision == "fp32"
    verification = Verification(
        reference=f"torch {torch.__version__}, float32",
        tokens=len(ids),
        logits_max_difference=difference,
        depth_agreement=float(same.mean()),
        top1_agreement=float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        logits_tolerance=allowed,
        greedy_agreement=next((n for n, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), len(texts[0]))
        / len(texts[0]),
    )
    # a halting decision on the edge may fall either way; the states after it then differ
    if difference > allowed or (exact and same.mean() < 0.95):
        raise ModelError(
            f"the exported graphs differ from PyTorch by {difference:.2g} in a logit (allowed {allowed:.2g}), depths "
            f"agree for {same.mean():.0%}; nothing was replaced"
        )
    manifest = replace(manifest, verification=verification)
    (directory / FOLDER / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _sample(config: ModelConfig, tokenizer: Tokenizer | None) -> list[int]:
    count = min(SAMPLE_TOKENS, config.context_length)
    if tokenizer is not None:
        return tokenizer.encode(_SAMPLE)[:count]
    return np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()


def _decode(backend: Backend, config: ModelConfig, ids: list[int]) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Logits [tokens, vocabulary] and passes of every token: half of them as a prompt, the rest one by one."""
    from rlm_engine.generate import Model

    decoder: Decoder = Model("", config, backend, None, 0).new_decoder()
    half = max(1, len(ids) // 2)
    results = [decoder.feed([ids[:half]], "all"), *(decoder.feed([[i]]) for i in ids[half:])]
    return np.concatenate([r.logits for r in results]), [t.steps for r in results for t in r.traces]


def _greedy(backend: Backend, config: ModelConfig, ids: list[int]) -> list[int]:
    """The likeliest continuation of the sample's first half, as far as the context goes."""
    from rlm_engine.generate import Model

    decoder = Model("", config, backend, None, 0).new_decoder()
    half = max(1, len(ids) // 2)
    logits, text = decoder.feed([ids[:half]]).logits[-1], []
    for _ in range(max(1, min(GREEDY_TOKENS, config.context_length - half))):
        text.append(int(logits.argmax()))
        logits = decoder.feed([[text[-1]]]).logits[-1]
    return text


def _tokenizer(config: ModelConfig, directory: Path) -> Tokenizer | None:
    from rlm_engine.tokenizer import load_tokenizer

    return load_tokenizer(config, directory)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ModelError(f"exporting needs the package {error.name}: pip install 'rlm-chat[export]'") from None


@contextlib.contextmanager
def _reported(directory: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is a line, not a traceback."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or directory}: {error.strerror}") from None
