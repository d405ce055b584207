"""The settings file: TOML, read once at the start, never written by this program."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlm_chat import locations

DEPTH_VIEWS = ("ink", "heat", "plain")
SEND_KEYS = ("enter", "ctrl+j")
ENGINE_OPTIONS = ("backend", "device", "dtype")  # entries of [model] that are passed to the engine as they are


class SettingsError(ValueError):
    """A settings file that cannot be used; the text says which entry and what it may be."""


@dataclass(frozen=True)
class ModelSettings:
    """The table [model]: which models to load and on what."""

    chat: str = "chat"
    """Model for Chat: a bundled name or a directory."""
    base: str = "base"
    """Model for Continue: a bundled name or a directory."""
    backend: str = "auto"
    """auto, onnx or torch."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """What PyTorch computes in: auto (float32, on a GPU bfloat16), float32 or bfloat16."""

    def __post_init__(self) -> None:
        _one_of("model.backend", self.backend, ("auto", "onnx", "torch"))
        _one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class SamplingSettings:
    """The table [sampling]: how tokens are chosen."""

    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more surprising."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already used less likely; 1 is off."""
    seed: int | None = None
    """The same seed gives the same reply; left out, every reply draws a new one."""
    greedy: bool = False
    """Always take the likeliest token."""
    max_tokens: int = 256
    """A reply's length in tokens at most."""

    def __post_init__(self) -> None:
        _range("sampling.temperature", self.temperature, 0, 100)
        _range("sampling.top_k", self.top_k, 0, 10_000_000)
        _range("sampling.top_p", self.top_p, 1e-9, 1)
        _range("sampling.min_p", self.min_p, 0, 1)
        _range("sampling.repetition_penalty", self.repetition_penalty, 1e-3, 1000)
        _range("sampling.seed", self.seed, 0, 2**63 - 1)
        _range("sampling.max_tokens", self.max_tokens, 1, 1_000_000)


@dataclass(frozen=True)
class DepthSettings:
    """The table [depth]: how hard the model may think."""

    max_steps: int | None = None
    """Passes per token at most; left out, the model's own limit."""
    halt_threshold: float | None = None
    """Adaptive models stop a token when its halting probabilities sum to this; left out, the model's own."""

    def __post_init__(self) -> None:
        _range("depth.max_steps", self.max_steps, 1, 64)
        _range("depth.halt_threshold", self.halt_threshold, 1e-6, 1)


@dataclass(frozen=True)
class Settings:
    """Everything a person may set."""

    theme: str = "rlm-dark"
    """A colour theme: rlm-dark, rlm-light, or one of Textual's (the command palette lists them)."""
    send_key: str = "enter"
    """The key that sends: enter (then Ctrl+J makes a new line) or ctrl+j (then Enter does)."""
    depth_view: str = "ink"
    """How depth colours a reply: ink (the letters), heat (their background) or plain."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Which models to load."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How tokens are chosen."""
    depth: DepthSettings = field(default_factory=DepthSettings)
    """How hard the model may think."""

    def __post_init__(self) -> None:
        _one_of("send_key", self.send_key, SEND_KEYS)
        _one_of("depth_view", self.depth_view, DEPTH_VIEWS)


def load_settings(path: Path | None = None) -> tuple[Settings, str | None]:
    """The settings, and a notice for the person when the file could not be used (then they are the defaults).

    ``path``: default `locations.settings_file`. A missing file is fine and gives no notice.
    """
    path = path or locations.settings_file()
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
        return settings_from_dict(data), None
    except FileNotFoundError:
        return Settings(), None
    except tomllib.TOMLDecodeError as problem:
        reason = f"not valid TOML: {problem}"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
    except SettingsError as problem:
        reason = str(problem)
    return Settings(), f"{path}: {reason}. The defaults are used; the file is left as it is."


def settings_from_dict(data: dict[str, Any]) -> Settings:
    """Build settings from a parsed TOML document; SettingsError for unknown names, wrong types and ranges."""
    return _build(Settings, data, "")


T = TypeVar("T")


def _build(kind: type[T], data: dict[str, Any], prefix: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise SettingsError(f"{prefix}{name} is not a setting; there are {known}")
        default = fields[name].default_factory
        if dataclasses.is_dataclass(default) and isinstance(default, type):
            if not isinstance(value, dict):
                raise SettingsError(f"{prefix}{name} must be a table")
            values[name] = _build(default, value, f"{prefix}{name}.")
        else:
            values[name] = _typed(f"{prefix}{name}", value, str(fields[name].type))
    return kind(**values)


def _typed(name: str, value: Any, kind: str) -> Any:
    kind = kind.removesuffix(" | None")
    accepted: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
    if not isinstance(value, accepted[kind]) or (isinstance(value, bool) and kind != "bool"):
        words = {"str": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"}
        raise SettingsError(f"{name} must be {words[kind]}, got {value!r}")
    return float(value) if isinstance(value, int) and kind == "float" else value


def _range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise SettingsError(f"{name} must be between {low} and {high}, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
