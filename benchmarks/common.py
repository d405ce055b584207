"""What the benchmark scripts share: the machine's line, taking turns, models with random weights, tables."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

# Before torch is loaded: waiting threads must not spin, they would take the other engines' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from rlm_engine.config import ActConfig, ModelConfig
from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import EngineError
from rlm_engine.generate import Model, find_model
from rlm_engine.machine import load_average, physical_cores, processor_name
from rlm_engine.measure import available_variants, open_variant, precision

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

# The act family: one formula, some sizes, GPT-2's vocabulary and two role tokens. "tiny" is for --quick.
ACT_SIZES = {
    "tiny": {"vocab_size": 97, "d_model": 16, "n_heads": 2, "ffn": 24, "eos_token_id": 0, "context_length": 128},
    "15m": {"d_model": 256, "n_heads": 4, "ffn": 2048},
    "23m": {"d_model": 384, "n_heads": 6, "ffn": 3072},
    "33m": {"d_model": 512, "n_heads": 8, "ffn": 4096},
    "55m": {"d_model": 768, "n_heads": 12, "ffn": 6144},
    "110m": {"d_model": 1280, "n_heads": 20, "ffn": 10240},
}
_judging = True  # whether budgets are judged: not with --quick
_GPT2 = {"vocab_size": 50_259, "eos_token_id": 50_256, "context_length": 512}


def arguments(description: str | None, *, repeats: int = 3, model: bool = False) -> argparse.ArgumentParser:
    """The options every script has; with ``model`` also which model is measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether the script works, not how fast")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"rounds (default {repeats})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: physical cores)")
    if model:
        parser.add_argument("--model", metavar="NAME", help="a bundled model or a model directory")
        parser.add_argument(
            "--size", choices=ACT_SIZES, default="33m", help="without --model: act of this size, random weights"
        )
        parser.add_argument("--backends", default="torch,onnx", metavar="LIST", help="default torch,onnx")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and print what the numbers below depend on: machine, versions, date, command."""
    global _judging
    options = parser.parse_args()
    _judging = not options.quick
    if options.quick:
        options.repeats = 1
        if hasattr(options, "size"):
            options.size = "tiny"
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    options.threads = options.threads or physical_cores()
    busy = load_average()
    versions = ", ".join(f"{name} {found}" for name in ("torch", "onnxruntime", "numpy") if (found := _version(name)))
    print(f"machine: {processor_name()}, {physical_cores()} cores, {options.threads} threads used", end="")
    print("" if busy is None else f", load {busy:.1f} before the start")
    print(f"date: {datetime.now().astimezone().isoformat(timespec='minutes')}")
    print(f"python {sys.version.split()[0]}, {versions}")
    print(f"command: {shlex.join(['python', *sys.argv])}\n", flush=True)
    if "torch" in sys.modules or _version("torch"):
        import torch

        torch.set_num_threads(options.threads)
    return options


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def interleave(repeats: int, runs: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Every run once per round, in turns: a machine's speed drifts, and only neighbours in time compare."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def greedy(
    model: Model, prompt: Sequence[int], count: int, depth: Depth | None = None
) -> tuple[list[int], float, float]:
    """`count` likeliest tokens after a prompt, whatever they are: the tokens, seconds of the prompt, of the rest."""
    decoder = model.new_decoder(depth)
    started = time.perf_counter()
    tokens = [int(decoder.feed([prompt]).logits[-1].argmax())]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(decoder.feed([tokens[-1:]]).logits[-1].argmax()))
    return tokens, first - started, time.perf_counter() - first


def random_prompt(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    """Token ids that are neither the end of a text nor padding."""
    special = [config.eos_token_id, getattr(config, "pad_token_id", -1), getattr(config, "padding_id", -1)]
    allowed = np.setdiff1d(np.arange(config.vocab_size), special)
    return [int(i) for i in np.random.default_rng(seed).choice(allowed, count)]


def act_config(size: str) -> ActConfig:
    """An act model of one of ACT_SIZES."""
    return ActConfig(**(_GPT2 | {"tokenizer": "none"} | ACT_SIZES[size]))  # type: ignore[arg-type]


def random_module(config: ModelConfig, seed: int = 0) -> Any:
    """A PyTorch model with random weights: speed does not depend on them, apart from what a router decides."""
    import torch

    from rlm_engine.models import build_model

    return build_model(config).initialise(torch.Generator().manual_seed(seed)).requires_grad_(False).eval()


def backends_of(
    module: nn.Module, config: ModelConfig, folder: Path, wanted: Sequence[str], threads: int
) -> dict[str, Model]:
    """One PyTorch module on the engine's backends; ``wanted``: of torch, compiled, onnx (fp32, int8), what there is."""
    parameters = sum(p.numel() for p in module.parameters())
    models = {}
    for label, compiled in (("torch", False), ("compiled", True)):
        if label in wanted:
            import torch

            from rlm_engine.backends.torch import TorchBackend

            pieces: Any = module.pieces()  # type: ignore[operator]
            opened = TorchBackend(pieces, torch.float32, compiled=compiled)
            models[f"{label} fp32"] = Model("random", config, opened, None, parameters)
    if "onnx" in wanted:
        tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        for kind in ("fp32", "int8"):
            try:
                from rlm_engine.backends.onnx import open_onnx
                from rlm_engine.export.onnx import write_graphs

                (folder / kind).mkdir(parents=True)
                write_graphs(folder / kind, config, tensors, kind)
                backend = open_onnx(folder / kind, config, threads=threads)
            except (ImportError, EngineError) as error:
                print(f"onnx {kind} is left out: {error}")
                continue
            models[f"onnx {kind}"] = Model("random", config, backend, None, parameters)
    return models


def chosen_models(options: argparse.Namespace, folder: Path) -> dict[str, Model]:
    """What --model (or --size) and --backends ask for, by label. Exits with a message when none can be opened."""
    wanted = [part.strip() for part in options.backends.split(",")]
    if options.model is None:
        config = act_config(options.size)
        models = backends_of(random_module(config), config, folder, wanted, options.threads)
        print(f"model: act {options.size}, random weights (speed carries over, text and its depths do not)")
    else:
        models = {}
        try:
            directory = find_model(options.model)
            for variant in available_variants(directory):
                if variant in wanted:
                    model = open_variant(options.model, variant)
                    if variant == "onnx" and options.threads != physical_cores():
                        from rlm_engine.backends.onnx import open_onnx

                        model.backend = open_onnx(directory, model.config, threads=options.threads)
                    models[f"{variant} {precision(model, directory)}"] = model
        except EngineError as error:
            sys.exit(str(error))
        print(f"model: {options.model}")
    if not models:
        sys.exit(f"none of the backends {options.backends} is available here")
    return models


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first aligned left, the others right."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    for row in [header, *rows]:
        cells = [
            f"{cell:{'<' if n == 0 else '>'}{width}}" for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def verdict(what: str, value: float, limit: float, *, at_least: bool) -> None:
    """Print whether a budget was met in this run."""
    if not _judging:
        print(f"{what}: not judged with --quick")
        return
    met = value >= limit if at_least else value <= limit
    print(f"{what}: {value:.2f}, budget {'>=' if at_least else '<='} {limit:g}: {'met' if met else 'NOT met'}")
