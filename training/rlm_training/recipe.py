"""Recipes: one TOML file says everything about a training run; unknown keys and impossible values are refused."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from rlm_engine.config import ActConfig, config_from_dict
from rlm_engine.errors import EngineError, UsageError
from rlm_training.optim import OptimConfig
from rlm_training.schedule import PonderConfig, ScheduleConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    ``prepared``: folder made by `rlm-train prepare`. ``mix``: share of each source in the pretraining tokens.
    ``stream_tokens``: length of the shuffled stream, at least the tokens trained on (0: exactly those); a run that
    may be finished early or prolonged fixes it. ``conversations``: how often each chat source is read in SFT.
    ``replay``: share of an SFT batch's rows that is pretraining text. ``heldout``: prepared folder for validation.
    """

    prepared: str = "runs/data"
    mix: dict[str, float] = field(default_factory=dict)
    stream_tokens: int = 0
    conversations: dict[str, float] = field(default_factory=dict)
    replay: float = 0.0
    heldout: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how.

    ``tokens``: pretraining tokens (SFT runs through its conversations once and ignores it); ``sequence`` tokens a row,
    ``rows`` a batch. ``precision``: "float32" or "bfloat16" (autocast). ``compile``: torch.compile of the block and
    the loss. ``sampled_vocabulary``: ids competing in the sampled softmax (0: all), until ``full_softmax_from``
    (share of the run). ``freeze_embedding``: keep the table as it is, so that two checkpoints can share it.
    ``init``: model directory or run to start from. ``checkpoint_minutes``, ``validate_every`` (steps).
    """

    tokens: int = 1_000_000
    sequence: int = 512
    rows: int = 8
    seed: int = 1
    precision: str = "bfloat16"
    compile: bool = False
    threads: int = 0
    sampled_vocabulary: int = 0
    full_softmax_from: float = 0.9
    freeze_embedding: bool = False
    init: str = ""
    checkpoint_minutes: float = 10.0
    validate_every: int = 200

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequence < 2 or self.rows < 1:
            raise UsageError("train: tokens, sequence and rows must be positive")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"train: precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if self.sampled_vocabulary < 0 or not 0 <= self.full_softmax_from <= 1:
            raise UsageError("train: sampled_vocabulary must not be negative, full_softmax_from is a share of the run")


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    stage: str
    model: ActConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    ponder: PonderConfig

    def to_dict(self) -> dict[str, Any]:
        """A plain form for logs and checkpoints."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe by file path or by the name of a shipped one; ``overrides`` are "section.key=value" (TOML values).

    Raises UsageError naming the file and the key.
    """
    shipped = resources.files("rlm_training") / "recipes" / f"{name}.toml"
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe file")
        text = path.read_text(encoding="utf-8")
    elif shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    else:
        known = sorted(
            p.name.removesuffix(".toml")
            for p in (resources.files("rlm_training") / "recipes").iterdir()
            if p.name.endswith(".toml")
        )
        raise UsageError(f"unknown recipe {name!r}; shipped recipes are {', '.join(known)}, or give a .toml file")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: {error}") from None
    for override in overrides or []:
        _override(data, override)
    return _recipe(data, name)


def _override(data: dict[str, Any], text: str) -> None:
    key, _, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not dot or not value:
        raise UsageError(f"--set {text!r}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    data.setdefault(section, {})[name] = parsed


def _recipe(data: dict[str, Any], where: str) -> Recipe:
    sections: dict[str, Any] = {
        "data": DataConfig,
        "train": TrainConfig,
        "optim": OptimConfig,
        "schedule": ScheduleConfig,
        "ponder": PonderConfig,
    }
    unknown = sorted(set(data) - set(sections) - {"model", "name", "stage"})
    if unknown:
        raise UsageError(f"{where}: unknown section {unknown[0]!r}")
    stage = data.get("stage", "pretrain")
    if stage not in ("pretrain", "sft"):
        raise UsageError(f"{where}: stage must be 'pretrain' or 'sft', got {stage!r}")
    try:
        model = config_from_dict(data.get("model", {}), f"{where}: [model]")
    except EngineError as error:
        raise UsageError(str(error)) from None
    if not isinstance(model, ActConfig):
        raise UsageError(f"{where}: only the architecture 'act' can be trained so far, not {model.architecture!r}")
    parts = {name: _section(cls, data.get(name, {}), f"{where}: [{name}]") for name, cls in sections.items()}
    return Recipe(name=str(data.get("name", where)), stage=stage, model=model, **parts)


T = TypeVar("T")


def _section(cls: type[T], data: dict[str, Any], where: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        kind = str(fields[name].type)
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind.startswith("tuple"):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        expected = {"int": int, "float": float, "str": str, "bool": bool}.get(kind)
        if expected is not None and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
            raise UsageError(f"{where}: {name} must be of type {kind}, got {value!r}")
        values[name] = value
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
