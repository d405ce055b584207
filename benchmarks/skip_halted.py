"""A training step of act that leaves out what halted tokens do not need, against one that computes all recurrences.

Forward and backward pass of the loss over prose at the model's own depths, with the recipes' precision, compiled
blocks and attention; no optimizer. Means something for a trained model only: random weights never halt early.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from common import arguments, interleave, median, start, table, timed

from rlm_engine.checkpoint import read_model_directory
from rlm_engine.errors import UsageError
from rlm_engine.generate import find_model, load_model
from rlm_engine.measure import sample_ids
from rlm_engine.models.act import ActModel
from rlm_training.act_design import Act
from rlm_training.allocator import keep_freed_memory
from rlm_training.attention import fast_attention
from rlm_training.designs import Plan
from rlm_training.micro import Micro
from rlm_training.objectives import TokenObjective
from rlm_training.schedule import PonderConfig


def main() -> None:
    """Two rows: dense, and without halted tokens."""
    parser = arguments(__doc__.split("\n\n")[0] if __doc__ else None, repeats=5)
    parser.add_argument("--model", default="base", metavar="NAME", help="a trained act model (default base)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="of a batch (default 16)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of a row (default 512)")
    options = start(parser)
    if options.quick:
        options.rows, options.tokens = 2, 64
    keep_freed_memory()
    config, tensors = read_model_directory(find_model(options.model))
    if config.architecture != "act":
        raise UsageError(f"{options.model}: {config.architecture} has no halted tokens; give an act model")
    module = ActModel(config)  # type: ignore[arg-type]
    module.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    micro = prose(options.model, options.rows, options.tokens)
    objectives = {
        name: TokenObjective(Act(module, PonderConfig(), not options.quick, skip_halted=skip), not options.quick)
        for name, skip in (("all recurrences", False), ("without halted tokens", True))
    }
    found = {name: step(objective, micro) for name, objective in objectives.items()}
    for objective in objectives.values():
        step(objective, micro)  # memory that is taken for the first time
    seconds = interleave(options.repeats, {n: partial(timed, partial(step, o, micro)) for n, o in objectives.items()})
    dense = median(seconds["all recurrences"])
    rows = [
        [name, f"{found[name][0]:.4f}", f"{found[name][1]:.2f}", f"{micro.inputs.numel() / median(s):,.0f}",
         f"{dense / median(s):.2f}x"]
        for name, s in seconds.items()
    ]  # fmt: skip
    table(["step", "loss", "mean depth", "tokens/s", "against all"], rows)


def prose(model: str, rows: int, tokens: int) -> Micro:
    """Rows that begin at different places of the same prose."""
    ids = np.asarray(sample_ids(load_model(model), 4096))
    grid = (np.arange(rows)[:, None] * 97 + np.arange(tokens + 1)) % len(ids)
    inputs, targets = torch.from_numpy(ids[grid][:, :-1].copy()), torch.from_numpy(ids[grid][:, 1:].copy())
    counts = torch.ones(rows, tokens)
    return Micro(0, 1, inputs, targets, counts, counts / counts.numel(), counts / counts.numel())


def step(objective: TokenObjective, micro: Micro) -> tuple[float, float]:
    """One forward and backward pass; the loss in nats and the mean depth."""
    with torch.autocast("cpu", torch.bfloat16), fast_attention():
        loss, measured = objective(micro, Plan(0))
    loss.backward()
    objective.zero_grad()
    return float(measured["loss"]), float(measured["depth"]) / micro.inputs.numel()


if __name__ == "__main__":
    main()
