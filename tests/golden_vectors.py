"""Loading test vectors of published models: `<prefix>_{config,golden}.json` with `_{weights,golden}.safetensors`.

tests/data/reference is searched, and every directory named in the environment variable RLM_GOLDEN_DIRS
(separated as in PATH), so that vectors of other sizes can be tried without touching the tests.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from rlm_engine import published
from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import BlendConfig, ModelConfig, RoutedConfig
from rlm_engine.decoding.blend import BlendDecoder
from rlm_engine.decoding.interface import Depth
from rlm_engine.decoding.routed import RoutedDecoder
from rlm_engine.models.blend import BlendModel
from rlm_engine.models.routed import RoutedModel

REFERENCE = Path(__file__).parent / "data" / "reference"


@dataclass(frozen=True)
class Golden:
    """One set of vectors with the model they belong to."""

    prefix: Path
    config: Any
    model: Any
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]

    def case(self, name: str, field: str) -> torch.Tensor | None:
        array = self.arrays.get(f"{name}.{field}")
        return None if array is None else torch.from_numpy(array)

    def decoder(self, **options: Any) -> BlendDecoder | RoutedDecoder:
        return make_decoder(self.model, self.config, **options)


def prefixes(design: ModuleType) -> list[Path]:
    """All vector sets of a published design (a module of rlm_engine.published)."""
    extra = [Path(d) for d in os.environ.get("RLM_GOLDEN_DIRS", "").split(os.pathsep) if d]
    found = []
    for directory in [REFERENCE, *extra]:
        for weights in sorted(directory.glob("*_weights.safetensors")):
            with safe_open(weights, "np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if published.recognise({}, shapes) is design:
                found.append(weights.with_name(weights.name.removesuffix("_weights.safetensors")))
    return found


def beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{ending}")


@functools.cache
def load(prefix: Path, dtype: torch.dtype = torch.float32) -> Golden:
    weights = load_file(beside(prefix, "weights.safetensors"))
    shapes = {name: array.shape for name, array in weights.items()}
    data = json.loads(beside(prefix, "config.json").read_text())
    design = published.recognise(data, shapes)
    assert design is not None
    config = design.config(data, shapes, f"{prefix.name}_config.json")
    model = make_model(config).to(dtype).eval()
    model.load_state_dict({name: torch.from_numpy(a) for name, a in design.tensors(config, weights).items()})
    facts = json.loads(beside(prefix, "golden.json").read_text())
    return Golden(prefix, config, model, load_file(beside(prefix, "golden.safetensors")), facts)


def make_model(config: ModelConfig) -> BlendModel | RoutedModel:
    return BlendModel(config) if isinstance(config, BlendConfig) else RoutedModel(config)


def make_decoder(
    model: BlendModel | RoutedModel, config: BlendConfig | RoutedConfig, depth: Depth | None = None, **options: Any
) -> BlendDecoder | RoutedDecoder:
    backend = TorchBackend(model.pieces(), next(model.parameters()).dtype)
    if isinstance(config, BlendConfig):
        return BlendDecoder(backend, config, depth, **options)
    return RoutedDecoder(backend, config, depth, **options)


def greedy(decoder: BlendDecoder | RoutedDecoder, prompt: list[int], tokens: int) -> tuple[list[int], list[Any]]:
    """Argmax continuation of a prompt: the new ids and the trace behind each."""
    ids: list[int] = []
    traces = []
    fed = prompt
    for _ in range(tokens):
        result = decoder.feed([fed])
        ids.append(int(result.logits[0].argmax()))
        traces.append(result.traces[0])
        fed = ids[-1:]
    return ids, traces
