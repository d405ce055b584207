"""Model configurations: one validated, frozen class per architecture, read from and written to config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlm_engine.errors import ModelError

# Generous ceilings: a configuration beyond them is a damaged or hostile file, not a model for this program.
_LIMITS = {
    "vocab_size": 1_000_000,
    "d_model": 16_384,
    "n_heads": 256,
    "n_layers": 256,
    "ffn": 131_072,
    "max_steps": 64,
    "context_length": 1_048_576,
}


@dataclass(frozen=True)
class ChatFormat:
    """How messages become tokens; special tokens are named, never spelled by what a person types.

    A turn is ``prefix[role]`` + content + ``suffix[role]``; the reply is asked for with ``prefix["assistant"]``
    and ends at any of ``stop`` (special token texts or plain strings).
    Without a "system" prefix a system message is put in front of the first user turn.
    """

    prefix: dict[str, str]
    suffix: dict[str, str]
    stop: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ChatFormat:
        """Read and check the "chat_format" object of a config.json; ModelError names what is wrong."""
        if not isinstance(data, dict) or set(data) - {"prefix", "suffix", "stop"}:
            raise ModelError(f"{where}: chat_format must be an object with prefix, suffix and stop")
        prefix, suffix, stop = data.get("prefix"), data.get("suffix"), data.get("stop")
        for name, part in (("prefix", prefix), ("suffix", suffix)):
            roles = {"system", "user", "assistant"}
            if not isinstance(part, dict) or set(part) - roles or not all(isinstance(v, str) for v in part.values()):
                raise ModelError(f"{where}: chat_format.{name} must map system/user/assistant to texts")
        assert isinstance(prefix, dict) and isinstance(suffix, dict)
        if not {"user", "assistant"} <= set(prefix):
            raise ModelError(f"{where}: chat_format.prefix must name user and assistant")
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise ModelError(f"{where}: chat_format.stop must be a list of texts")
        return cls(prefix=dict(prefix), suffix=dict(suffix), stop=tuple(stop))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        return {"prefix": dict(self.prefix), "suffix": dict(self.suffix), "stop": list(self.stop)}


@dataclass(frozen=True)
class _Config:
    """What every architecture has. ``tokenizer`` is "gpt2", "technical", or "file" (tokenizer.json in the directory).

    ``added_tokens`` are special tokens appended after the tokenizer's own, in order. ``eos_token_id`` ends a text.
    ``provenance`` is free-form: where the weights come from.
    """

    architecture: ClassVar[str]

    vocab_size: int
    d_model: int
    n_heads: int
    eos_token_id: int
    context_length: int
    tokenizer: str = "gpt2"
    added_tokens: tuple[str, ...] = ()
    chat_format: ChatFormat | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ModelError when a value is out of range or values contradict each other."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ModelError(f"config: {f.name} must be an integer, got {value!r}")
            if f.type == "float":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ModelError(f"config: {f.name} must be a finite number, got {value!r}")
                object.__setattr__(self, f.name, float(value))
            if f.type == "bool" and not isinstance(value, bool):
                raise ModelError(f"config: {f.name} must be true or false, got {value!r}")
            if f.type == "str" and not isinstance(value, str):
                raise ModelError(f"config: {f.name} must be a text, got {value!r}")
            limit = _LIMITS.get(f.name)
            if limit is not None and not 1 <= value <= limit:
                raise ModelError(f"config: {f.name} must be between 1 and {limit}, got {value}")
        if self.d_model % self.n_heads:
            raise ModelError(f"config: d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ModelError(f"config: eos_token_id {self.eos_token_id} is outside the vocabulary of {self.vocab_size}")
        if len(self.added_tokens) > 1024 or not all(isinstance(t, str) and t for t in self.added_tokens):
            raise ModelError("config: added_tokens must be a short list of texts")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `config_from_dict` reads back."""
        data: dict[str, Any] = {"architecture": self.architecture}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, ChatFormat):
                value = value.to_dict()
            data[f.name] = list(value) if isinstance(value, tuple) else value
        return data

    def to_json(self) -> str:
        """Readable JSON text for config.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class ActConfig(_Config):
    """Adaptive computation time over one shared block (Graves 2016; Dehghani et al. 2018). `act-110m` and smaller.

    ``context_length`` is the attention window: a token sees at most this many latest tokens, itself included.
    ``rule``: "act" outputs the halting-weighted mean of the states, "last" the state at the halt.
    ``kv``: what deeper recurrences see of a halted token: "final" projects its last state once, "reuse" keeps the
    key and value of its last recurrence.
    ``bos_token_id``: what stood before every text in training and is put before a text to continue; None: nothing.
    """

    architecture: ClassVar[str] = "act"

    ffn: int = 3072
    max_steps: int = 8
    min_steps: int = 2
    halt_epsilon: float = 0.01
    rule: str = "act"
    kv: str = "final"
    rope_theta: float = 10_000.0
    logit_softcap: float = 15.0
    norm_eps: float = 1e-6
    bos_token_id: int | None = None

    def check(self) -> None:
        super().check()
        bos = self.bos_token_id
        if bos is not None and (not isinstance(bos, int) or isinstance(bos, bool) or not 0 <= bos < self.vocab_size):
            raise ModelError(f"config: bos_token_id must be a token of the vocabulary or null, got {bos!r}")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ModelError(f"config: min_steps must be between 1 and max_steps {self.max_steps}")
        if not 0.0 <= self.halt_epsilon < 1.0:
            raise ModelError(f"config: halt_epsilon must be in [0, 1), got {self.halt_epsilon}")
        if self.rule not in ("act", "last"):
            raise ModelError(f"config: rule must be 'act' or 'last', got {self.rule!r}")
        if self.kv not in ("final", "reuse"):
            raise ModelError(f"config: kv must be 'final' or 'reuse', got {self.kv!r}")
        _check_rope(self.head_dim, self.rope_theta)
        if self.logit_softcap <= 0:
            raise ModelError(f"config: logit_softcap must be positive, got {self.logit_softcap}")
        _check_eps(self.norm_eps)


@dataclass(frozen=True)
class BlendConfig(_Config):
    """rlm-48m: base layers, one recursive layer applied `max_steps` times, a router that blends the depths."""

    architecture: ClassVar[str] = "blend"

    n_layers: int = 6
    max_steps: int = 2
    dropout: float = 0.1
    norm_eps: float = 1e-5

    @property
    def ffn(self) -> int:
        """Feed-forward width: always four times the model's."""
        return 4 * self.d_model

    def check(self) -> None:
        super().check()
        _check_dropout(self.dropout)
        _check_eps(self.norm_eps)


@dataclass(frozen=True)
class RoutedConfig(_Config):
    """rlm-90m (``biases=True``) and rlm-198m (``biases=False``): a router picks 1, 3 or 5 passes per sequence.

    ``steps``: passes of the classes simple, medium, complex. ``pad_token_id``: that id is masked as a key and left
    out of the router's mean. ``rolling_window``: rlm-198m crops to `context_length`; rlm-90m never crops.
    ``tied`` says that the head is the embedding table (never so in the published files).
    """

    architecture: ClassVar[str] = "routed"

    n_layers: int = 8
    ffn: int = 2240
    steps: tuple[int, ...] = (1, 3, 5)
    pad_token_id: int = 50256
    biases: bool = True
    rolling_window: bool = False
    rope_theta: float = 10_000.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-5
    router_loss_weight: float = 0.1

    def check(self) -> None:
        super().check()
        good = len(self.steps) == 3 and all(isinstance(s, int) and not isinstance(s, bool) for s in self.steps)
        if not good or not all(1 <= s <= _LIMITS["max_steps"] for s in self.steps):
            raise ModelError(f"config: steps must be three pass counts of at least 1, got {list(self.steps)}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ModelError(f"config: pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}")
        _check_rope(self.head_dim, self.rope_theta)
        _check_dropout(self.hidden_dropout)
        _check_dropout(self.attention_dropout)
        _check_eps(self.norm_eps)


@dataclass(frozen=True)
class MixtureConfig(_Config):
    """mor: post-norm layers, each with its own router over 0..max_steps passes and one projection per pass.

    ``router``: "adaptive" or "fixed" (always max_steps). ``positions``: "learned", "sinusoidal" or "rope".
    """

    architecture: ClassVar[str] = "mixture"

    n_layers: int = 6
    ffn: int = 2048
    max_steps: int = 4
    padding_id: int = 0
    router: str = "adaptive"
    positions: str = "learned"
    rope_theta: float = 10_000.0
    dropout: float = 0.1
    norm_eps: float = 1e-5

    def check(self) -> None:
        super().check()
        if not 0 <= self.padding_id < self.vocab_size:
            raise ModelError(f"config: padding_id {self.padding_id} is outside the vocabulary of {self.vocab_size}")
        if self.router not in ("adaptive", "fixed"):
            raise ModelError(f"config: router must be 'adaptive' or 'fixed', got {self.router!r}")
        if self.positions not in ("learned", "sinusoidal", "rope"):
            raise ModelError(f"config: positions must be 'learned', 'sinusoidal' or 'rope', got {self.positions!r}")
        if self.positions == "rope":
            _check_rope(self.head_dim, self.rope_theta)
        if self.d_model < 4:
            raise ModelError(f"config: d_model must be at least 4 for the router, got {self.d_model}")
        _check_dropout(self.dropout)
        _check_eps(self.norm_eps)


ModelConfig = ActConfig | BlendConfig | RoutedConfig | MixtureConfig
ARCHITECTURES: dict[str, type[ModelConfig]] = {
    c.architecture: c for c in (ActConfig, BlendConfig, RoutedConfig, MixtureConfig)
}


def config_from_dict(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Build the configuration a config.json describes.

    Raises ModelError naming ``where`` for unknown architectures, unknown or missing keys, wrong types and ranges.
    """
    architecture = data.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{where}: unknown architecture {architecture!r}; this program knows {known}")
    cls = ARCHITECTURES[architecture]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields) - {"architecture"})
    if unknown:
        raise ModelError(f"{where}: unknown key {unknown[0]!r} for architecture {architecture!r}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ModelError(f"{where}: {missing[0]!r} is missing")
    values = {name: data[name] for name in fields if name in data}
    if values.get("chat_format") is not None:
        values["chat_format"] = ChatFormat.from_dict(values["chat_format"], where)
    for name in ("steps", "added_tokens"):
        if name in values:
            if not isinstance(values[name], list):
                raise ModelError(f"{where}: {name} must be a list, got {values[name]!r}")
            values[name] = tuple(values[name])
    if not isinstance(values.get("provenance", {}), dict):
        raise ModelError(f"{where}: provenance must be an object")
    try:
        return cls(**values)
    except ModelError as error:
        raise ModelError(f"{where}: {str(error).removeprefix('config: ')}") from None


def _check_rope(head_dim: int, theta: float) -> None:
    if head_dim % 2:
        raise ModelError(f"config: rotary positions need an even head width, got {head_dim}")
    if theta <= 1.0:
        raise ModelError(f"config: rope_theta must be above 1, got {theta}")


def _check_dropout(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise ModelError(f"config: dropout must be in [0, 1), got {rate}")


def _check_eps(eps: float) -> None:
    if not 0.0 < eps < 1.0:
        raise ModelError(f"config: norm_eps must be between 0 and 1, got {eps}")
