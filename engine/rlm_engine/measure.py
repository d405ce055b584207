"""How fast a loaded model computes: prompt, tokens, recurrences, and the weights it has to read for them."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig, ModelConfig, RoutedConfig
from rlm_engine.decoding.interface import Decoder, Depth
from rlm_engine.errors import UsageError
from rlm_engine.machine import peak_resident_bytes, resident_bytes
from rlm_engine.sampling import Sampler, Sampling
from rlm_engine.trace import TokenTrace

if TYPE_CHECKING:
    from rlm_engine.generate import Model

VARIANTS = ("torch", "torch-bf16", "onnx")
_BUDGETS = 4  # depth budgets through which the line of time over recurrences is put
_BUDGET_TOKENS = 16
_PRECISIONS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Depth depends on the text: real prose, the same for every backend, rather than whatever each would write itself.
_PROSE = (
    "The old lighthouse keeper climbed the stairs every evening to light the lamp. From the top he could see the "
    "harbour, the fishing boats coming home, and far away the grey line where the sea met the sky. One night a small "
    "boy knocked at his door. He had lost his way in the fog, he said, and he was cold. The keeper gave him soup and "
    "bread and asked him where he lived. Behind the hill, said the boy, in the house with the green roof. Then we "
    "shall wait for the morning, said the keeper, because nobody should walk along the cliffs in the dark. "
)


@dataclass(frozen=True)
class DepthPoint:
    """Decoding under one depth budget: recurrences (passes) a token took on average, median seconds per token."""

    budget: int
    recurrences: float
    token_s: float


@dataclass(frozen=True)
class Measurement:
    """What one model on one backend did. Seconds, bytes, and rates per second; None: not known.

    ``decode_*``: computing one token after the other, each given the true text before it; choosing a token from the
    logits comes on top (``sampling_s`` each, default settings). ``*_best``: the fastest round.
    ``recurrence_s``, ``fixed_s``: slope and intercept of the least-squares line of time per token over recurrences;
    the intercept is the head, the layers outside the recursion, and what Python and the backend cost per token.
    None when other programs disturbed the rounds by more than a recurrence costs.
    ``weight_bytes``: weights read for a token of mean depth, each matrix as often as it is applied.
    ``read_bytes_per_s``: weight_bytes times the decoding rate; ``streaming_share``: its part of what `machine.
    streaming_read_limit` says. Memory is that of the whole process.
    """

    model: str
    architecture: str
    parameters: int
    backend: str
    precision: str
    device: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    load_s: float | None
    prefill_s: float
    prefill_tokens_per_s: float
    prefill_tokens_per_s_best: float
    decode_tokens_per_s: float
    decode_tokens_per_s_best: float
    sampling_s: float
    mean_depth: float
    recurrence_s: float | None
    fixed_s: float | None
    depth_points: tuple[DepthPoint, ...]
    weight_bytes: float | None
    read_bytes_per_s: float | None
    streaming_share: float | None
    resident_bytes: int | None
    peak_resident_bytes: int | None


def measure_model(
    model: Model,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    repeats: int = 3,
    depth: Depth | None = None,
    *,
    directory: Path | None = None,
    load_s: float | None = None,
    streaming: float | None = None,
) -> Measurement:
    """Measure one model by itself; `Meter` measures several in turns.

    ``directory``: the model's, from which the sizes of an ONNX export are read. ``streaming``: bytes per second of
    `machine.streaming_read_limit`. Raises UsageError for counts that cannot be.
    """
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    meter = Meter(model, prompt_tokens, new_tokens, depth, directory)
    meter.warm_up()
    for _ in range(repeats):
        meter.round()
    return with_streaming(meter.result(load_s), streaming)


def with_streaming(measured: Measurement, limit: float | None) -> Measurement:
    """The measurement with its share of the streaming limit [bytes/s]; none for a GPU, which has other memory."""
    if limit is None or measured.read_bytes_per_s is None or measured.device != "cpu":
        return measured
    return replace(measured, streaming_share=measured.read_bytes_per_s / limit)


class Meter:
    """Measures a model round by round, so that rounds of several models can take turns on a machine that drifts.

    A text that would not fit the model's context is cut: `new_tokens` tells what is left. Raises UsageError when the
    prompt alone does not fit.
    """

    def __init__(
        self,
        model: Model,
        prompt_tokens: int = 32,
        new_tokens: int = 128,
        depth: Depth | None = None,
        directory: Path | None = None,
    ):
        context = model.config.context_length
        for name, value in (("prompt tokens", prompt_tokens), ("new tokens", new_tokens)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if prompt_tokens >= context:
            raise UsageError(f"a prompt of {prompt_tokens} tokens leaves no room in the context of {context}")
        self.model, self.depth = model, depth or Depth()
        self.prompt_tokens, self.new_tokens = prompt_tokens, min(new_tokens, context - prompt_tokens)
        self._directory = directory
        ids = sample_ids(model, prompt_tokens + self.new_tokens)
        self._prompt, self._rest = ids[:prompt_tokens], ids[prompt_tokens:]
        self._prefill: list[float] = []
        self._decode: list[float] = []  # seconds of a round's tokens together
        self._sampling: list[float] = []
        self._traces: list[TokenTrace] = []
        self._by_budget: dict[int, list[tuple[int, float]]] = defaultdict(list)  # recurrences and seconds of a token

    def warm_up(self) -> None:
        """Touch everything once; not counted."""
        decoder = self.model.new_decoder(self.depth)
        decoder.feed([self._prompt])
        for token in self._rest[:3]:
            decoder.feed([[token]])

    def round(self) -> None:
        """The prompt, the tokens after it one by one, then some of them again under other depth budgets."""
        decoder = self.model.new_decoder(self.depth)
        started = time.perf_counter()
        logits = decoder.feed([self._prompt]).logits[-1]
        self._prefill.append(time.perf_counter() - started)
        total = 0.0
        for token in self._rest:
            started = time.perf_counter()
            result = decoder.feed([[token]])
            total += time.perf_counter() - started
            self._traces.append(result.traces[-1])
        self._decode.append(total)
        sampler = Sampler(Sampling(seed=0))
        for _ in range(4):
            started = time.perf_counter()
            sampler.choose(logits, self._prompt)
            self._sampling.append(time.perf_counter() - started)
        for budget in depth_budgets(self.depth.max_steps or self.model.max_depth):
            self._measure_budget(self._rewound(decoder), budget)

    def _measure_budget(self, decoder: Decoder, budget: int) -> None:
        # A threshold of 1 keeps tokens from halting before the budget is used, where the model's design allows it.
        forced = isinstance(self.model.config, ActConfig) and self.depth.halt_threshold is None
        decoder.depth = Depth(budget, 1.0 if forced else self.depth.halt_threshold)
        for token in self._rest[:_BUDGET_TOKENS]:
            started = time.perf_counter()
            result = decoder.feed([[token]])
            seconds = time.perf_counter() - started
            self._by_budget[budget].append((sum(result.traces[-1].steps), seconds))

    def _rewound(self, decoder: Decoder) -> Decoder:
        """A decoder that holds the prompt only."""
        if decoder.truncate(0, self.prompt_tokens):
            return decoder
        fresh = self.model.new_decoder(self.depth)
        fresh.feed([self._prompt])
        return fresh

    def result(self, load_s: float | None = None) -> Measurement:
        """Everything measured so far. Raises UsageError before the first round."""
        if not self._decode:
            raise UsageError("nothing was measured yet")
        model, rounds = self.model, len(self._decode)
        prefill, decode = statistics.median(self._prefill), statistics.median(self._decode)
        points = tuple(
            DepthPoint(budget, statistics.fmean(n for n, _ in seen), statistics.median(s for _, s in seen))
            for budget, seen in sorted(self._by_budget.items())
        )
        line = fit_line([p.recurrences for p in points], [p.token_s for p in points])
        if line is not None and min(line) <= 0:
            line = None  # other programs disturbed the rounds by more than a recurrence costs
        sizes = bytes_per_application(model, self._directory)
        weight_bytes = None if sizes is None else mean_weight_bytes(model.config, sizes, self._traces)
        rate = self.new_tokens / decode
        return Measurement(
            model=model.name,
            architecture=model.config.architecture,
            parameters=model.parameters,
            backend=model.backend_name,
            precision=precision(model, self._directory),
            device=str(getattr(model.backend, "device", "cpu")),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            rounds=rounds,
            load_s=load_s,
            prefill_s=prefill,
            prefill_tokens_per_s=self.prompt_tokens / prefill,
            prefill_tokens_per_s_best=self.prompt_tokens / min(self._prefill),
            decode_tokens_per_s=rate,
            decode_tokens_per_s_best=self.new_tokens / min(self._decode),
            sampling_s=statistics.median(self._sampling),
            mean_depth=statistics.fmean(trace.depth for trace in self._traces),
            recurrence_s=None if line is None else line[0],
            fixed_s=None if line is None else line[1],
            depth_points=points,
            weight_bytes=weight_bytes,
            read_bytes_per_s=None if weight_bytes is None else weight_bytes * rate,
            streaming_share=None,
            resident_bytes=resident_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
        )


def sample_ids(model: Model, count: int) -> list[int]:
    """`count` token ids of prose, or random ones for a model without tokenizer; never the end of a text."""
    config = model.config
    if model.tokenizer is not None:
        ids = model.tokenizer.encode(_PROSE)
        if len(ids) >= 16:
            return (ids * (count // len(ids) + 1))[:count]
    special = {config.eos_token_id, getattr(config, "pad_token_id", -1), getattr(config, "padding_id", -1)}
    allowed = [i for i in range(min(config.vocab_size, 1000)) if i not in special] or [0]
    return [int(i) for i in np.random.default_rng(0).choice(allowed, count)]


def depth_budgets(deepest: int) -> list[int]:
    """At most four budgets spread over 1..deepest."""
    return sorted({round(b) for b in np.linspace(1, deepest, min(deepest, _BUDGETS)).tolist()})


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line; None when all x are the same."""
    if len(x) < 2 or max(x) - min(x) < 1e-9:
        return None
    slope, intercept = np.polyfit(np.asarray(x), np.asarray(y), 1).tolist()
    return slope, intercept


def applications(config: ModelConfig, trace: TokenTrace) -> dict[str, float]:
    """How often each kind of piece is applied to a token with this trace. Looking up its embedding is nothing."""
    if isinstance(config, ActConfig):
        steps = trace.steps[0]
        return {"step": steps, "key_value": float(steps < config.max_steps), "head": 1}
    if isinstance(config, BlendConfig | RoutedConfig):
        return {"layer": config.n_layers, "recursion": trace.steps[0], "router": 1, "head": 1}
    return {"layer": sum(trace.steps), "router": config.n_layers if config.router == "adaptive" else 0, "head": 1}


def weights_per_application(config: ModelConfig) -> dict[str, int]:
    """Matrix elements that one application of each kind of piece reads; vectors are too short to count."""
    d, head = config.d_model, config.vocab_size * config.d_model
    if isinstance(config, ActConfig):
        return {"step": 4 * d * d + 3 * d * config.ffn, "key_value": 2 * d * d, "head": head}
    if isinstance(config, BlendConfig | RoutedConfig):
        block = 4 * d * d + 2 * d * config.ffn
        router = d * (config.max_steps + 1) if isinstance(config, BlendConfig) else d * d + d * (d // 2)
        return {"layer": block, "recursion": block, "router": router, "head": head}
    hidden = d // 4
    return {"layer": 5 * d * d + 2 * d * config.ffn, "router": hidden * (d + config.max_steps + 1), "head": head}


def bytes_per_application(model: Model, directory: Path | None = None) -> dict[str, float] | None:
    """Bytes of weights that one application of each kind of piece reads, as the backend stores them.

    None when that cannot be known: an ONNX export whose model directory is not given.
    """
    weights = weights_per_application(model.config)
    dtype = getattr(model.backend, "dtype", None)
    if dtype is not None:
        return {piece: float(count * dtype.itemsize) for piece, count in weights.items()}
    if directory is None:
        return None
    from rlm_engine.export.manifest import check_files, read_manifest

    graphs = check_files(directory, read_manifest(directory, model.config))
    sizes = {}
    for piece in weights:
        # layers are alike, and so are a mixture's routers: the first stands for all
        name = next(n for n in (piece, f"{piece}.0", f"layer.0.{piece}", "") if n in graphs or not n)
        sizes[piece] = float(graphs.get(name, 0))
    if isinstance(model.config, MixtureConfig):
        # the graph of a layer holds the projections of all passes; a pass reads its own only
        unread = (model.config.max_steps - 1) * model.config.d_model**2
        sizes["layer"] *= weights["layer"] / (weights["layer"] + unread)
    return sizes


def mean_weight_bytes(config: ModelConfig, sizes: dict[str, float], traces: Sequence[TokenTrace]) -> float:
    """Mean bytes of weights read per token over tokens with these traces."""
    return math.fsum(
        sizes[piece] * times for trace in traces for piece, times in applications(config, trace).items()
    ) / len(traces)


def precision(model: Model, directory: Path | None = None) -> str:
    """fp32, bf16, int8 ...; "unknown" for an ONNX export whose model directory is not given."""
    dtype = getattr(model.backend, "dtype", None)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        return _PRECISIONS.get(name, name)
    if directory is None:
        return "unknown"
    from rlm_engine.export.manifest import read_manifest

    return read_manifest(directory, model.config).precision


def available_variants(directory: Path) -> list[str]:
    """The backends that a model directory and this installation can run, in the order of `VARIANTS` without bf16."""
    from importlib.util import find_spec

    has_export = (directory / "onnx" / "manifest.json").is_file()
    found = []
    if (directory / "model.safetensors").is_file() and find_spec("torch") is not None:
        found.append("torch")
    if has_export and find_spec("onnxruntime") is not None:
        found.append("onnx")
    return found


def open_variant(name: str, variant: str, device: str = "auto") -> Model:
    """Load a model on one of `VARIANTS`. Errors as of `load_model`; UsageError for another variant."""
    from rlm_engine.generate import load_model

    if variant not in VARIANTS:
        raise UsageError(f"backends are {', '.join(VARIANTS)}; got {variant!r}")
    if variant == "onnx":
        return load_model(name, "onnx", device)
    return load_model(name, "torch", device, "bfloat16" if variant == "torch-bf16" else "float32")
