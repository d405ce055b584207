"""What the distributed tests start under torchrun: a tiny run; arguments: data, out, architecture, overrides..."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny_runs import tiny_recipe

from rlm_engine.errors import EngineError
from rlm_training.loop import Interrupted, Trainer
from rlm_training.stages import train


def main() -> int:
    torch.set_num_threads(1)
    data, out, architecture, *overrides = sys.argv[1:]
    resume = "resume" in overrides
    die = [int(o.removeprefix("die=")) for o in overrides if o.startswith("die=")]
    chosen = [o for o in overrides if o != "resume" and not o.startswith("die=")]
    if die and os.environ.get("RANK", "0") == "1":
        step = Trainer._step

        def dying(self: Trainer, number: int, flags: list[float]) -> object:
            if number == die[0]:
                os._exit(9)
            return step(self, number, flags)

        Trainer._step = dying  # type: ignore[method-assign, assignment]
    stage = next((s for s in ("sft", "dpo") if any(o.startswith("train.init") for o in chosen)), "pretrain")
    recipe = tiny_recipe(Path(data), architecture, stage, *chosen)
    try:
        train(recipe, Path(out), resume)
    except Interrupted:
        return 130
    except EngineError as error:
        print(f"rlm-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
