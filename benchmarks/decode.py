"""Decoding and prompt speed of one model's weights on PyTorch fp32 and ONNX Runtime fp32 and int8, in turns."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import act_config, arguments, backends_of, interleave, median, random_module, start, table, verdict

from rlm_engine.checkpoint import read_model_directory
from rlm_engine.errors import EngineError
from rlm_engine.generate import Model, find_model
from rlm_engine.machine import streaming_read_limit
from rlm_engine.measure import bytes_per_application, mean_weight_bytes, sample_ids
from rlm_engine.tokenizer import load_tokenizer

BASELINE = "torch fp32"
BUDGETS = {"onnx int8": 4.0}  # times PyTorch's decoding, act
SHARE_BUDGET = 0.6  # of the streaming-read limit, fp32


def main() -> None:
    """One table: tokens per second, ratios to PyTorch in the same run, depth, share of what memory can deliver."""
    parser = arguments(__doc__, repeats=7, model=True)
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="decoded per round")
    options = start(parser)
    if options.quick:
        options.prompt_tokens, options.tokens = 8, 4
    with tempfile.TemporaryDirectory() as folder:
        models = _models(options, Path(folder))
        runs = {label: partial(_round, m, options.prompt_tokens, options.tokens) for label, m in models.items()}
        for run in runs.values():
            run()  # first calls allocate and bind
        limits = [streaming_read_limit(repeats=1)]
        rounds = []
        for _ in range(options.repeats):
            rounds.append(interleave(1, runs))
            limits.append(streaming_read_limit(repeats=1))
        limit = max(limits)
        found = {label: [one[label][0] for one in rounds] for label in runs}
        sizes = {label: bytes_per_application(m, Path(folder) / label.split()[1]) for label, m in models.items()}
    rows, shares = [], {}
    rate = {label: options.tokens / median([r[1] for r in of]) for label, of in found.items()}
    prefill = {label: options.prompt_tokens / median([r[0] for r in of]) for label, of in found.items()}
    for label, of in found.items():
        traces = of[0][2]
        read = mean_weight_bytes(models[label].config, sizes[label] or {}, traces) if sizes[label] else float("nan")
        shares[label] = read * rate[label] / limit
        base = BASELINE if BASELINE in rate else next(iter(rate))
        rows.append([
            label, f"{rate[label]:.1f}", f"{options.tokens / min(r[1] for r in of):.1f}",
            f"{rate[label] / rate[base]:.2f}", f"{prefill[label]:.0f}", f"{prefill[label] / prefill[base]:.2f}",
            f"{sum(t.depth for t in traces) / len(traces):.2f}", f"{read / 1e6:.1f}", f"{shares[label]:.0%}",
        ])  # fmt: skip
    header = [
        "engine",
        "tokens/s",
        "best",
        f"ratio to {base}",
        "prompt tokens/s",
        "ratio",
        "depth",
        "MB/token",
        "share",
    ]
    table(header, rows)
    print(f"share: of {limit / 1e9:.1f} GB/s, the best streaming read between the rounds of this run")
    for label, budget in BUDGETS.items():
        if BASELINE in rate and label in rate:
            verdict(f"{label} against {BASELINE}", rate[label] / rate[BASELINE], budget, at_least=True)
    if "onnx fp32" in shares:
        verdict("onnx fp32, share of the streaming-read limit", shares["onnx fp32"], SHARE_BUDGET, at_least=True)


def _models(options: argparse.Namespace, folder: Path) -> dict[str, Model]:
    """The same weights on every engine; an export that a model directory already has is not used."""
    wanted = [part.strip() for part in options.backends.split(",")]
    if options.model is None:
        config = act_config(options.size)
        print(f"model: act {options.size}, random weights (speed carries over, text and its depths do not)")
        return backends_of(random_module(config), config, folder, wanted, options.threads)
    from rlm_engine.models import module_from

    try:
        directory = find_model(options.model)
        config, tensors = read_model_directory(directory)
        models = backends_of(module_from(config, tensors), config, folder, wanted, options.threads)
        tokenizer = load_tokenizer(config, directory)
    except EngineError as error:
        sys.exit(str(error))
    for model in models.values():
        model.tokenizer = tokenizer
    print(f"model: {options.model}, {config.architecture}, {next(iter(models.values())).parameters / 1e6:.1f} M")
    return models


def _round(model: Model, prompt_tokens: int, tokens: int):  # type: ignore[no-untyped-def]
    """Seconds for the prompt, seconds for the tokens after it, and their traces. The text is given, not chosen."""
    ids = sample_ids(model, prompt_tokens + tokens)
    decoder = model.new_decoder()
    started = time.perf_counter()
    decoder.feed([ids[:prompt_tokens]])
    first = time.perf_counter()
    traces = [decoder.feed([[token]]).traces[0] for token in ids[prompt_tokens:]]
    return first - started, time.perf_counter() - first, traces


if __name__ == "__main__":
    main()
