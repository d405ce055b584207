"""Checking and renaming the tensors of a published checkpoint, and reading the fields of its config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlm_engine.config import ModelConfig
from rlm_engine.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: published tensors, each of ``shape``, joined along the first axis."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Our tensors by name, and published tensors that are checked and then dropped (all of these are optional).

    A check returns what is wrong with the values, or None.
    """

    sources: dict[str, Source]
    dropped: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], str | None]]]

    def check(self, shapes: Shapes, where: str) -> None:
        """Raise ModelError for the first tensor that is missing, misshaped or unknown."""
        expected = {name: source.shape for source in self.sources.values() for name in source.names}
        for name, shape in expected.items():
            if name not in shapes:
                raise ModelError(f"{where}: tensor {name!r} is missing, expected {list(shape)}")
        for name, shape in (expected | {name: shape for name, (shape, _) in self.dropped.items()}).items():
            if name in shapes and tuple(shapes[name]) != shape:
                raise ModelError(f"{where}: tensor {name!r} is {list(shapes[name])}, the config says {list(shape)}")
        for name, found in shapes.items():
            if name not in expected and name not in self.dropped:
                raise ModelError(f"{where}: tensor {name!r} {list(found)} is not part of this design, expected none")

    def convert(self, published: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        """The checked tensors under our names."""
        self.check({name: array.shape for name, array in published.items()}, where)
        for name, (_, wrong) in self.dropped.items():
            problem = wrong(published[name]) if name in published else None
            if problem:
                raise ModelError(f"{where}: tensor {name!r} {problem}")
        tensors = {}
        for name, source in self.sources.items():
            for part in source.names:
                if published[part].dtype.kind != "f":
                    raise ModelError(f"{where}: tensor {part!r} holds {published[part].dtype}, expected floating point")
            parts = [published[part] for part in source.names]
            tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tensors


class Fields:
    """Typed reads from a published config.json; usual Hugging Face keys beside them are ignored."""

    def __init__(self, data: Mapping[str, Any], where: str):
        self._data = data
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; ModelError when it is something else, or absent without a default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{self._where}: {key} must be an integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(f"{self._where}: {key} must be a finite number, got {value!r}")
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self._where}: {key!r} is missing")
        return value


def build(make: Callable[[], ModelConfig], where: str) -> ModelConfig:
    """Run a configuration's constructor; its errors are told as being in ``where``."""
    try:
        return make()
    except ModelError as error:
        raise ModelError(f"{where}: {str(error).removeprefix('config: ')}") from None
