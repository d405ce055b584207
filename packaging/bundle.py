"""Put trained models into the package.

    python packaging/bundle.py --base runs/act-15m-continue/model --chat runs/act-15m-sft/model \\
        --design rlm-48m-small=runs/rlm-48m-small/model

`base` and `chat` get bf16 weights for PyTorch and 8-bit graphs for ONNX Runtime, with one embedding table for both: the
chat model must have been fine-tuned with the embedding frozen (`train.freeze_embedding`). Models of other designs are
8-bit graphs only; those with two tables store them in one plane, a third smaller, where the likeliest token stays the
same in 99 % all the same (benchmarks/quantization.py --one-plane).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlm_engine.checkpoint import read_model_directory, read_own_config, write_model_directory
from rlm_engine.config import ActConfig, BlendConfig
from rlm_engine.errors import EngineError
from rlm_engine.export.onnx import export_onnx, share_tables
from rlm_engine.export.quantize import Storage
from rlm_engine.generate import BUNDLED

TABLE = "embedding.weight"


def main() -> int:
    """Write the models into the package's assets; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model directory of the pretrained model")
    parser.add_argument("--chat", type=Path, help="model directory of the model fine-tuned from it")
    parser.add_argument("--design", nargs="*", default=[], metavar="NAME=DIR", help="a model of another design")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="where to put them (default: the package's assets)")
    options = parser.parse_args()
    try:
        if options.base or options.chat:
            bundle_pair(options.base, options.chat, options.out)
        for design in options.design:
            name, source = design.split("=", 1)
            bundle_design(Path(source), options.out / name)
    except EngineError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def bundle_pair(base: Path, chat: Path, out: Path) -> None:
    """Weights and 8-bit exports of `base` and `chat`; raises EngineError when they cannot share their tables."""
    configs, tensors = zip(*(read_model_directory(source) for source in (base, chat)), strict=True)
    for name in ("base", "chat"):
        shutil.rmtree(out / name / "onnx", ignore_errors=True)
    write_model_directory(out / "base", configs[0], half(tensors[0]))
    own = {n: t for n, t in tensors[1].items() if n != TABLE or not np.array_equal(t, tensors[0][TABLE])}
    write_model_directory(out / "chat", configs[1], half(own), shared_with="base")
    for name in ("base", "chat"):
        export_onnx(out / name, precision="int8")
    share_tables(out / "chat", "base")


def bundle_design(source: Path, target: Path) -> None:
    """An 8-bit export of `source` in the place of the one in `target`, whose card stays."""
    card = target / "README.md"
    kept = card.read_bytes() if card.is_file() else None
    shutil.rmtree(target, ignore_errors=True)
    config = read_own_config(source)
    storage = Storage.for_width(config.d_model)
    if not isinstance(config, ActConfig | BlendConfig):  # the head has a table of its own
        storage = replace(storage, rescored=0, double=())
    export_onnx(source, target, "int8", storage)
    if kept is not None:
        card.write_bytes(kept)


def half(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The tensors in bfloat16."""
    return {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in tensors.items()}


if __name__ == "__main__":
    raise SystemExit(main())
