"""What training costs: FLOPs per token of every design, the machine's matrix-product rate, and the expected time."""

from __future__ import annotations

import time

import torch

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig, ModelConfig
from rlm_training.recipe import Recipe

ASSUMED_UTILISATION = 0.5  # of the measured matrix-product rate; what the loop should reach


def forward_flops(config: ModelConfig, sequence: int, depth: float, memory: int = 0, vocabulary: int = 0) -> float:
    """FLOPs per token of a dense forward: two per multiplication in a matrix product, attention over all keys.

    ``depth``: recurrences (act, blend), passes (routed), mean passes per layer (mixture). ``vocabulary``: ids the
    head computes (0: all). Attention counts every key of the row (causal kernels do half of that), as is usual.
    """
    d, ffn = config.d_model, config.ffn
    attention = 4.0 * (sequence + memory) * d
    head = 2.0 * (vocabulary or config.vocab_size) * d
    if isinstance(config, ActConfig):
        return depth * (2.0 * (4 * d * d + 3 * d * ffn) + attention + 2.0 * d) + head
    if isinstance(config, MixtureConfig):
        router = 2.0 * (d * (d // 4) + (d // 4) * (config.max_steps + 1)) / sequence
        return config.n_layers * (depth * (2.0 * (5 * d * d + 2 * d * ffn) + attention) + router) + head
    block = 2.0 * (4 * d * d + 2 * d * ffn) + attention
    if isinstance(config, BlendConfig):  # every depth is computed, whatever the router says
        return (config.n_layers + config.max_steps) * block + 2.0 * d * (config.max_steps + 1) / sequence + head
    router = 2.0 * (d * d + d * (d // 2) + (d // 2) * 3) / sequence
    return (config.n_layers + depth) * block + router + head


def training_flops(recipe: Recipe, depth: float, step: int, steps: int) -> float:
    """FLOPs per token of forward and backward (three forwards; one more where blocks are recomputed)."""
    train, model = recipe.train, recipe.model
    memory = recipe.ponder.memory_tokens(step, steps) if isinstance(model, ActConfig) else 0
    vocabulary = train.sampled_vocabulary if step < train.full_softmax_from * steps else 0
    forward = forward_flops(model, train.sequence, depth, memory, vocabulary)
    if not train.recompute:
        return 3.0 * forward
    return 4.0 * forward - 2.0 * (vocabulary or model.vocab_size) * model.d_model


def run_flops(recipe: Recipe, steps: int) -> float:
    """FLOPs of a whole run of token batches: ACT by its growth schedule, routed and mixture at their middle depth."""
    train, model = recipe.train, recipe.model
    tokens = train.rows * train.sequence
    if not isinstance(model, ActConfig):
        return training_flops(recipe, typical_depth(model), steps, steps) * tokens * steps
    pieces = min(steps, 1000)  # the schedule is smooth: a thousand samples are plenty
    total = 0.0
    for piece in range(pieces):
        step = piece * steps // pieces
        total += training_flops(recipe, recipe.ponder.max_steps(step, steps), step, steps)
    return total / pieces * tokens * steps


def typical_depth(config: ModelConfig) -> float:
    """The depth costs are quoted at: the most ACT allows, the middle of the routers' choices elsewhere."""
    if isinstance(config, ActConfig | BlendConfig):
        return float(config.max_steps)
    return config.max_steps / 2 if isinstance(config, MixtureConfig) else float(config.steps[1])


def measure_matmul_rate(precision: str, device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of large matrix products in a precision, the best of several while ``seconds`` last."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.monotonic() + seconds
    repeats = 10 if device.type == "cuda" else 1
    while True:
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(device)
        best = min(best, (time.perf_counter() - began) / repeats)
        if time.monotonic() > end:
            return 2.0 * size**3 / best


def describe(recipe: Recipe, parameters: int, steps: int | None, rate: float) -> str:
    """What `--dry-run` prints. ``steps`` None: the data decides, and the time is given per million tokens."""
    depth = typical_depth(recipe.model)
    cost = training_flops(recipe, depth, steps or 1, steps or 1)
    lines = [
        f"recipe             {recipe.name} ({recipe.stage}, {recipe.model.architecture})",
        f"parameters         {parameters:,}",
        f"FLOPs per token    {cost / 1e9:.4g} G forward and backward at depth {depth:g}",
        f"matrix products    {rate / 1e9:,.0f} GFLOP/s measured in {recipe.train.precision}",
    ]
    if steps is None:
        seconds = 1e6 * cost / (rate * ASSUMED_UTILISATION)
        lines.append(f"expected time      {duration(seconds)} per million tokens at half of that rate")
    else:
        tokens = recipe.train.rows * recipe.train.sequence
        seconds = run_flops(recipe, steps) / (rate * ASSUMED_UTILISATION)
        lines.append(f"steps              {steps:,} of {tokens:,} tokens")
        lines.append(f"expected time      {duration(seconds)} at half of that rate")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
