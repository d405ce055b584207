"""Put a trained base and chat model into the package: bf16 weights, one embedding table for both, ONNX 8-bit graphs.

    python packaging/bundle.py runs/act-15m/model runs/act-15m-sft/model

The chat model must have been fine-tuned with the embedding frozen (`train.freeze_embedding`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from rlm_engine.checkpoint import read_model_directory, write_model_directory
from rlm_engine.generate import BUNDLED

TABLE = "embedding.weight"


def main() -> int:
    """Write `base` and `chat` into the package's assets; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="model directory of the pretrained model")
    parser.add_argument("chat", type=Path, help="model directory of the fine-tuned model")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="where to put them (default: the package's assets)")
    options = parser.parse_args()
    base_config, base = read_model_directory(options.base)
    chat_config, chat = read_model_directory(options.chat)
    if not np.array_equal(base[TABLE], chat[TABLE]):
        print(
            f"bundle: {options.chat} has another {TABLE} than {options.base}; train with freeze_embedding",
            file=sys.stderr,
        )
        return 2
    for name in ("base", "chat"):
        shutil.rmtree(options.out / name / "onnx", ignore_errors=True)
    write_model_directory(options.out / "base", base_config, half(base))
    del chat[TABLE]
    write_model_directory(options.out / "chat", chat_config, half(chat), shared_with="base")
    return 0


def half(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The tensors in bfloat16."""
    return {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in tensors.items()}


if __name__ == "__main__":
    raise SystemExit(main())
