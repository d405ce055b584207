"""Recipes: one TOML file says everything about a training run; unknown keys and impossible values are refused."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from rlm_engine.checkpoint import read_config
from rlm_engine.config import ModelConfig, config_from_dict
from rlm_engine.errors import EngineError, UsageError
from rlm_training.designs import RouterConfig
from rlm_training.objectives import PreferenceConfig
from rlm_training.optim import OptimConfig
from rlm_training.schedule import PonderConfig, ScheduleConfig

STAGES = ("pretrain", "sft", "dpo")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    ``prepared``: folder made by `rlm-train prepare`. ``mix``: share of each source in the pretraining tokens; empty:
    every source by its size.
    ``stream_tokens``: length of the shuffled stream, at least the tokens trained on (0: exactly those); a run that
    may be finished early or prolonged fixes it. ``conversations``: how often each chat source is read in SFT; empty:
    each ``epochs`` times. ``replay``: share of an SFT batch's rows that is pretraining text from ``mix``.
    ``heldout``: prepared folder for validation. ``validation_rows``: rows of it, per source.
    """

    prepared: str = "runs/data"
    mix: dict[str, float] = field(default_factory=dict)
    stream_tokens: int = 0
    conversations: dict[str, float] = field(default_factory=dict)
    epochs: float = 1.0
    replay: float = 0.0
    heldout: str = ""
    validation_rows: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.replay < 1 or self.epochs <= 0 or self.validation_rows < 1:
            raise UsageError("replay must be in [0, 1), epochs above 0, validation_rows at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how.

    ``tokens``: pretraining tokens (SFT runs through its conversations, DPO through its pairs, and ignore it).
    ``most_steps``: stop after this many steps even if there is more to read (0: read all); schedules end there.
    ``sequence`` tokens a row, ``rows`` a batch, of all processes together (DPO: pairs a batch); ``micro_rows``: rows
    a process computes at a time, the gradients of a batch being accumulated (0: all it has).
    ``precision``: "float32", "bfloat16" (autocast), "float16" (autocast with loss scaling, for older GPUs).
    ``device``: "auto", "cpu", "cuda". ``threads``: of PyTorch on the CPU (0: its own choice).
    ``compile``: torch.compile of the block and the loss. ``recompute``: activation checkpointing of the block.
    ``skip_halted``: act leaves out what halted tokens do not need, which pays on a CPU (not with segment memory).
    ``sampled_vocabulary``: ids competing in the sampled softmax (0: all), until ``full_softmax_from`` (share of the
    run). ``freeze_embedding``: keep the token table as it is, so that two checkpoints can share it.
    ``init``: model directory to start from. ``average``: decay of the moving average of the weights that is validated
    and exported (0: none). ``checkpoint_minutes`` between checkpoints, ``keep`` of them; ``validate_every`` steps.
    ``fsdp``: shard parameters and optimizer states over the processes (FSDP2). ``tensorboard``: write its events too.
    """

    tokens: int = 1_000_000
    sequence: int = 512
    most_steps: int = 0
    rows: int = 8
    micro_rows: int = 0
    seed: int = 1
    precision: str = "bfloat16"
    device: str = "auto"
    threads: int = 0
    compile: bool = False
    recompute: bool = False
    skip_halted: bool = False
    sampled_vocabulary: int = 0
    full_softmax_from: float = 0.9
    freeze_embedding: bool = False
    init: str = ""
    average: float = 0.0
    checkpoint_minutes: float = 10.0
    keep: int = 2
    validate_every: int = 200
    fsdp: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequence < 2 or self.rows < 1 or self.keep < 1 or self.most_steps < 0:
            raise UsageError("tokens, sequence, rows and keep must be positive")
        if self.threads < 0 or self.validate_every < 0 or self.checkpoint_minutes < 0:
            raise UsageError("threads, validate_every and checkpoint_minutes must not be negative")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.micro_rows and (self.micro_rows < 0 or self.rows % self.micro_rows):
            raise UsageError(f"micro_rows must divide rows ({self.rows}), got {self.micro_rows}")
        if self.sampled_vocabulary < 0 or not 0 <= self.full_softmax_from <= 1:
            raise UsageError("sampled_vocabulary must not be negative, full_softmax_from is a share of the run")
        if not 0 <= self.average < 1:
            raise UsageError(f"average must be in [0, 1), got {self.average}")
        if self.skip_halted and (self.recompute or self.fsdp):
            raise UsageError("skip_halted goes neither with recompute nor with fsdp")
        if self.fsdp and self.precision == "float16":
            raise UsageError("fsdp and precision 'float16' do not go together; use 'bfloat16'")

    def slices(self, processes: int) -> int:
        """Micro-batches of a step over all processes. UsageError when the rows cannot be shared out evenly."""
        if self.rows % processes:
            raise UsageError(f"{self.rows} rows cannot be shared out evenly among {processes} processes")
        own = self.rows // processes
        micro = min(self.micro_rows or own, own)
        if own % micro:
            raise UsageError(f"a process's {own} rows cannot be cut into micro-batches of {micro} rows")
        return self.rows // micro


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    stage: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    ponder: PonderConfig
    router: RouterConfig
    dpo: PreferenceConfig

    def to_dict(self) -> dict[str, Any]:
        """A plain form for logs and checkpoints."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}


_SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "ponder": PonderConfig,
    "router": RouterConfig,
    "dpo": PreferenceConfig,
}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the program."""
    files = (resources.files("rlm_training") / "recipes").iterdir()
    return sorted(p.name.removesuffix(".toml") for p in files if p.name.endswith(".toml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe by file path or by the name of a shipped one; ``overrides`` are "section.key=value" (TOML values).

    Raises UsageError naming the file and the key.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe file")
        text = path.read_text(encoding="utf-8")
    elif name in shipped_recipes():
        text = (resources.files("rlm_training") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        known = ", ".join(shipped_recipes())
        raise UsageError(f"unknown recipe {name!r}; shipped recipes are {known}, or give a .toml file")
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
    if not isinstance(data.setdefault(section, {}), dict):
        raise UsageError(f"--set {text!r}: {section} is no section")
    data[section][name] = parsed


def _recipe(data: dict[str, Any], where: str) -> Recipe:
    unknown = sorted(set(data) - set(_SECTIONS) - {"model", "name", "stage"})
    if unknown:
        raise UsageError(f"{where}: unknown section {unknown[0]!r}")
    stage = data.get("stage", "pretrain")
    if stage not in STAGES:
        raise UsageError(f"{where}: stage must be one of {', '.join(STAGES)}, got {stage!r}")
    parts = {name: _section(cls, data.get(name, {}), f"{where}: [{name}]") for name, cls in _SECTIONS.items()}
    recipe = Recipe(str(data.get("name", where)), stage, _model(data, parts["train"].init, where), **parts)
    try:
        check(recipe, set(data))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return recipe


def _model(data: dict[str, Any], init: str, where: str) -> ModelConfig:
    """[model], or without it the configuration of train.init; with both they must fit, dropout rates aside."""
    try:
        given = config_from_dict(data["model"], f"{where}: [model]") if "model" in data else None
        if not init:
            if given is None:
                raise UsageError(f"{where}: needs a [model], or train.init, a model directory to start from")
            return given
        if given is not None and not Path(init).exists():
            return given  # a recipe can be looked at before the stage it builds on has run
        found = read_config(Path(init))
        found.pop("shared_with", None)
        start = config_from_dict(found, f"{init}/config.json")
    except UsageError:
        raise
    except EngineError as error:
        raise UsageError(str(error)) from None
    if given is not None:
        # Dropout belongs to a stage, not to the weights: the recipe's counts.
        rates = [f.name for f in dataclasses.fields(given) if f.name.endswith("dropout")]
        for key, value in given.to_dict().items():
            if key not in {"provenance", "chat_format", *rates} and start.to_dict().get(key) != value:
                raise UsageError(f"{where}: [model] says {key} = {value!r}, {init} has {start.to_dict().get(key)!r}")
        start = dataclasses.replace(start, **{name: getattr(given, name) for name in rates})
    return start


def check(recipe: Recipe, sections: set[str]) -> None:
    """Refuse what cannot work together, one clear line each; ``sections``: those the file or --set names."""
    model, train, ponder = recipe.model, recipe.train, recipe.ponder
    act = model.architecture == "act"
    if "ponder" in sections and not act:
        raise UsageError(f"[ponder] is for architecture 'act', not {model.architecture!r}")
    if "router" in sections and act:
        raise UsageError("[router] is for architectures with routers, 'act' has none")
    if "dpo" in sections and recipe.stage != "dpo":
        raise UsageError(f"[dpo] is for stage 'dpo', not {recipe.stage!r}")
    if recipe.stage != "pretrain" and not train.init:
        raise UsageError(f"stage {recipe.stage!r} continues a model: set train.init to its directory (--init DIR)")
    if recipe.stage == "dpo" and train.sampled_vocabulary:
        raise UsageError("train.sampled_vocabulary gives no log-probabilities; DPO needs 0")
    if train.sampled_vocabulary >= model.vocab_size:
        raise UsageError(f"train.sampled_vocabulary must be below the vocabulary of {model.vocab_size}")
    if recipe.stage != "sft" and (recipe.data.replay or recipe.data.conversations):
        raise UsageError(f"data.replay and data.conversations are for stage 'sft', not {recipe.stage!r}")
    if recipe.stage == "sft" and recipe.data.replay and round(recipe.data.replay * train.rows) >= train.rows:
        raise UsageError("data.replay leaves no row for conversations; raise train.rows or lower data.replay")
    remembered = ponder.most_memory() if act else 0
    learned = model.architecture == "blend" or getattr(model, "positions", "") == "learned"
    if (act or learned) and train.sequence + remembered > model.context_length:
        raise UsageError(
            f"train.sequence {train.sequence} and memory {remembered} do not fit model.context_length "
            f"{model.context_length}"
        )
    if act:
        _check_ponder(recipe)
    if model.architecture == "mixture" and train.fsdp:
        raise UsageError("mixture skips passes row by row, which FSDP2 cannot follow; train it with DDP")
    if model.architecture == "mixture" and (train.compile or train.recompute):
        raise UsageError("train.compile and train.recompute are not for mixture: its passes are chosen row by row")


def _check_ponder(recipe: Recipe) -> None:
    ponder, most = recipe.ponder, getattr(recipe.model, "max_steps", 0)
    deepest = max(depth for _, depth in ponder.growth)
    if deepest > most:
        raise UsageError(f"ponder.growth reaches {deepest} recurrences, the model has {most}")
    if ponder.most_memory() and recipe.stage != "pretrain":
        raise UsageError(f"ponder.memory needs contiguous text, stage {recipe.stage!r} reads documents one by one")
    if ponder.gate_from < 1 and recipe.stage == "dpo":
        raise UsageError("ponder.gate_from trains on next-token losses; it is for pretrain and sft")
    if ponder.gate_from < 1 and recipe.train.fsdp:
        raise UsageError("ponder.gate_from freezes the trunk during the run, which FSDP2 cannot follow; use DDP")
    if ponder.gate_from < 1:
        least = getattr(recipe.model, "min_steps", 1) + 1
        begun = [depth for share, depth in ponder.growth if share <= ponder.gate_from][-1]
        if min([begun, *(depth for share, depth in ponder.growth if share > ponder.gate_from)]) < least:
            raise UsageError(f"ponder.gate_from needs ponder.growth to allow {least} recurrences there, to compare two")


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
            if not isinstance(value, list) or not all(isinstance(v, list) for v in value):
                raise UsageError(f"{where}: {name} must be a list of pairs, got {value!r}")
            value = tuple(tuple(v) for v in value)
        if kind.startswith("dict") and not isinstance(value, dict):
            raise UsageError(f"{where}: {name} must be a table of numbers, got {value!r}")
        expected = {"int": int, "float": float, "str": str, "bool": bool}.get(kind)
        if expected is not None and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
            raise UsageError(f"{where}: {name} must be of type {kind}, got {value!r}")
        values[name] = value
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
