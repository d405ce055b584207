"""`rlm-train`: prepare data, pretrain, fine-tune, evaluate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rlm_engine.errors import EngineError
from rlm_engine.version import __version__
from rlm_training.data_cli import add_data_commands


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0 fine, 2 wrong usage, 3 model, 4 input, 130 interrupted)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except EngineError as error:
        if options.debug:
            raise
        print(f"rlm-train: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rlm-train: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlm-train", description="Train the recursive models of rlm-chat.")
    parser.add_argument("--version", action="version", version=f"rlm-train {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_data_commands(commands)

    for stage, text in (("pretrain", "train on the prepared text"), ("sft", "fine-tune on conversations")):
        command = commands.add_parser(stage, help=text)
        command.add_argument("--recipe", required=True, help="name of a shipped recipe, or a .toml file")
        command.add_argument("--out", type=Path, required=True, help="folder of the run")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
        command.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint")
        command.set_defaults(run=_train, stage=stage)

    evaluate = commands.add_parser("evaluate", help="perplexity and depth on held-out text")
    evaluate.add_argument("model", help="bundled model or model directory")
    evaluate.add_argument("--heldout", type=Path, required=True, help="prepared folder of held-out text")
    evaluate.add_argument("--tokens", type=int, default=20_000, help="tokens per domain at most (default 20000)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.set_defaults(run=_evaluate)

    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _train(options: argparse.Namespace) -> int:
    from rlm_engine.errors import UsageError
    from rlm_training.loop import Interrupted
    from rlm_training.recipe import load_recipe
    from rlm_training.stages import train

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.stage != options.stage:
        raise UsageError(f"{options.recipe} is a recipe for `rlm-train {recipe.stage}`")
    try:
        target = train(recipe, options.out, options.resume, _report)
    except Interrupted:
        print(f"rlm-train: stopped; continue with --resume --out {options.out}", file=sys.stderr)
        return 130
    print(f"model written to {target}")
    return 0


def _report(values: dict[str, Any]) -> None:
    if values["step"] % 20 == 0 or "heldout" in values:
        line = (
            f"step {values['step']:6}  loss {values['loss']:.3f}  depth {values['depth']:.2f}/{values['budget']}"
            f"  lr x{values['lr_scale']:.2f}  {values['tokens_per_s']:.0f} tokens/s"
        )
        if "heldout" in values:
            line += "  held out " + " ".join(f"{k} {v:.2f}" for k, v in values["heldout"].items())
        print(line, flush=True)


def _evaluate(options: argparse.Namespace) -> int:
    from rlm_training.evaluate import evaluate_heldout, format_table

    result = evaluate_heldout(options.model, options.heldout, options.tokens)
    if options.json:
        import json

        print(json.dumps(result, indent=1))
    else:
        print(format_table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
