"""Training speed: tokens per second of each recipe, the share of the matrix-product rate, and a GPT-2 beside it.

Every recipe runs at its own precision, sequence length, optimizer and head, at its full depth, on random tokens, with
`--tokens` a step in micro-batches of `--micro-tokens` (recipes for GPUs have larger batches than this machine's memory
holds). The second row of each pair is a plain decoder in GPT-2's shape (pre-norm, learned positions, GELU of four
times the width, tied head) with as many layers as make its FLOPs per token equal, in the same loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, start, table, verdict
from torch import Tensor, nn

from rlm_engine.config import ActConfig
from rlm_engine.models import build_model, layers
from rlm_training.allocator import keep_freed_memory
from rlm_training.compute import measure_matmul_rate, training_flops
from rlm_training.designs import Design, Forward, Plan, prepare_blocks
from rlm_training.display import Silent
from rlm_training.distributed import World, choose_device
from rlm_training.loop import Trainer
from rlm_training.micro import Micro, TokenSteps
from rlm_training.objectives import TokenObjective
from rlm_training.recipe import Recipe, load_recipe
from rlm_training.stages import make_objective
from rlm_training.stream import Batch

RECIPES = ("act-55m", "act-23m", "act-15m", "rlm-90m", "rlm-48m", "mor")
JUDGED = ("act-55m", "rlm-90m")
BUDGET = 0.5  # of the matrix-product rate, on the CPU
WARM_UP = 2  # steps: compilation, and memory that is taken for the first time


def main() -> None:
    """A pair of rows per recipe."""
    parser = arguments(__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="a step (default 8192)")
    parser.add_argument("--micro-tokens", type=int, default=4096, metavar="N", help="a micro-batch (default 4096)")
    options = start(parser)
    keep_freed_memory()
    if options.quick:
        options.tokens, options.micro_tokens = 256, 128
    rows, shares = [], {}
    for name in options.recipes or RECIPES:
        recipe = adapted(load_recipe(name), options.tokens, options.micro_tokens, options.quick)
        world = World(device=choose_device(recipe.train.device))
        torch.manual_seed(1)
        objective = make_objective(recipe, build_model(recipe.model).initialise().to(world.device))
        flops = 0.0
        for label in (name, "  GPT-2's shape"):
            if label != name:
                objective = TokenObjective(plain_design(recipe, flops, world), recipe.train.compile)
            rates = [measure_matmul_rate(recipe.train.precision, world.device)]
            speeds, depth = measure(recipe, objective, world, options.repeats)
            rates.append(measure_matmul_rate(recipe.train.precision, world.device))
            if label == name:
                flops = training_flops(recipe, depth, 0, 1)
            speed = float(np.median(speeds))
            shares[label] = speed * flops / max(rates)
            parameters = sum(p.numel() for p in objective.model.parameters())
            about = f"{recipe.train.rows} x {recipe.train.sequence}"
            rows.append(
                [label, f"{parameters / 1e6:.1f} M", about, f"{depth:.1f}", f"{flops / 1e9:.3f} G", f"{speed:,.0f}",
                 f"{max(rates) / 1e9:,.0f}", f"{100 * shares[label]:.0f} %"]
            )  # fmt: skip
            print(f"{label.strip()}: {', '.join(f'{s:,.0f}' for s in speeds)} tokens/s", flush=True)
    print()
    header = ["recipe", "parameters", "batch", "depth", "FLOPs/token", "tokens/s", "GFLOP/s of products", "share"]
    table(header, rows)
    print()
    for name in JUDGED:
        if name in shares:
            verdict(f"{name}, share of the measured matrix-product rate", shares[name], BUDGET, at_least=True)


def adapted(recipe: Recipe, tokens: int, micro_tokens: int, quick: bool) -> Recipe:
    """The recipe at full depth with a batch for this machine; nothing that happens later in a run."""
    train = recipe.train
    sequence = min(train.sequence, 32) if quick else train.sequence
    micro = max(1, micro_tokens // sequence)
    rows = max(micro, tokens // sequence // micro * micro)
    precision = train.precision
    if precision == "float16" and not torch.cuda.is_available():
        precision = "bfloat16"  # processors have no fast float16
    train = dataclasses.replace(
        train, init="", precision=precision, sequence=sequence, rows=rows, micro_rows=micro, validate_every=0
    )
    ponder, model = recipe.ponder, recipe.model
    if isinstance(model, ActConfig):
        ponder = dataclasses.replace(
            ponder, growth=((0.0, model.max_steps),), random_stop=0.0, memory=((0.0, 0),), gate_from=1.0
        )
    return dataclasses.replace(recipe, train=train, ponder=ponder)


class RandomTokens:
    """A token stream: ids drawn with Zipf's frequencies, so that the sampled head sees what text would show it."""

    def __init__(self, vocabulary: int, rows: int):
        self._rows = rows
        shares = 1.0 / (np.arange(vocabulary) + 10.0)
        self.counts = torch.from_numpy((1e9 * shares / shares.sum()).astype(np.int64))
        self._ends = np.cumsum(shares / shares.sum())

    def batch(self, step: int, sequence: int) -> Batch:
        """See `micro.TokenStream`."""
        uniform = np.random.default_rng([3, step]).random((self._rows, sequence + 1))
        ids = np.minimum(np.searchsorted(self._ends, uniform), len(self._ends) - 1).astype(np.int64)
        return Batch(ids[:, :-1], ids[:, 1:], np.ones((self._rows, sequence), dtype=np.float32))


class Enough(Exception):  # noqa: N818  (not an error)
    """All steps are measured: what follows in a run, its checkpoint, is not."""


class Stopwatch(Silent):
    """Keeps the steps' speeds."""

    def __init__(self, steps: int):
        self._steps = steps
        self.speeds: list[float] = []
        self.depths: list[float] = []

    def step(self, values: dict[str, Any]) -> None:
        """See `Display`."""
        self.speeds.append(values["tokens_per_s"])
        self.depths.append(values["depth"])
        if len(self.speeds) == self._steps:
            raise Enough


def measure(recipe: Recipe, objective: TokenObjective, world: World, repeats: int) -> tuple[list[float], float]:
    """Tokens per second of each measured step, and the depth to count: ACT computes all it may, halted or not."""
    stream = RandomTokens(recipe.model.vocab_size, recipe.train.rows)
    watch = Stopwatch(WARM_UP + repeats)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            recipe,
            objective,
            TokenSteps(stream, recipe.train.sequence),
            max(1000, WARM_UP + repeats),
            Path(folder),
            recipe.model,
            world,
            token_counts=stream.counts,
            display=watch,
        )
        with contextlib.suppress(Enough):
            trainer.run(resume=False)
    fixed = isinstance(recipe.model, ActConfig)
    depth = float(recipe.model.max_steps) if fixed else float(np.median(watch.depths))  # type: ignore[union-attr]
    return watch.speeds[WARM_UP:], depth


class PlainBlock(nn.Module):
    """GPT-2's layer: x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, d: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, ffn), nn.Linear(ffn, d)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, tokens, d]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(layers.dense_attention(q, k, v).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Plain(nn.Module):
    """Token and position tables, the layers, a last norm; the head is the token table."""

    def __init__(self, vocabulary: int, tokens: int, d: int, heads: int, ffn: int, depth: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(tokens, d)
        self.layers = nn.ModuleList(PlainBlock(d, heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """States [rows, tokens, d] before the head."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@dataclasses.dataclass
class PlainDesign:
    """The plain model as the loop wants it."""

    model: Plain
    deepest: int = 1
    cap: float = 0.0
    masked: bool = False
    padding: int | None = None
    all_used: bool = True

    def head(self) -> Tensor:
        """Tied."""
        return self.model.tokens.weight

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """Depth is always 1."""
        return Forward(self.model(micro.inputs), torch.ones(1, 1))

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> None:
        """None."""


def plain_design(recipe: Recipe, flops: float, world: World) -> Design:
    """The plain model of the recipe's width whose training costs ``flops`` per token: layers and their MLP's width."""
    config, sequence = recipe.model, recipe.train.sequence
    d = config.d_model
    forward = flops / (4.0 if recipe.train.recompute else 3.0)
    body = forward - 2.0 * (recipe.train.sampled_vocabulary or config.vocab_size) * d
    attention = 8.0 * d * d + 4.0 * sequence * d
    depth = max(1, round(body / (attention + 16.0 * d * d)))
    ffn = max(8, round((body / depth - attention) / (4.0 * d)))
    model = Plain(config.vocab_size, sequence, d, config.n_heads, 8 * round(ffn / 8), depth).to(world.device)
    prepare_blocks(list(model.layers), recipe.train.compile, recipe.train.recompute)
    return PlainDesign(model)


if __name__ == "__main__":
    main()
