"""`rlm-train`: prepare data, pretrain, fine-tune, evaluate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rlm_engine.errors import EngineError
from rlm_engine.version import __version__
from rlm_training.data_cli import add_data_commands

_STAGES = (
    ("pretrain", "train on the prepared text"),
    ("sft", "fine-tune on conversations"),
    ("dpo", "fine-tune on pairs of a better and a worse reply"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0 fine, 1 unexpected, 2 usage, 3 model, 4 input, 130 interrupted)."""
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
    except OSError as error:
        if options.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"rlm-train: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug:
            raise
        text = (str(error) or "no text").splitlines()[0]
        print(f"rlm-train: unexpected {type(error).__name__}: {text}; --debug shows where", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlm-train", description="Train the recursive models of rlm-chat.")
    parser.add_argument("--version", action="version", version=f"rlm-train {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_data_commands(commands)

    for stage, text in _STAGES:
        command = commands.add_parser(stage, help=text)
        command.add_argument("--recipe", required=True, help="name of a shipped recipe, or a .toml file")
        command.add_argument("--out", type=Path, help="folder of the run")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
        command.add_argument("--init", metavar="DIR", help="model directory to start from (train.init)")
        command.add_argument("--resume", action="store_true", help="continue from the folder's newest checkpoint")
        command.add_argument("--fsdp", action="store_true", help="under torchrun: FSDP2 instead of DDP (train.fsdp)")
        command.add_argument("--dry-run", action="store_true", help="print size, cost and expected time, then stop")
        command.set_defaults(run=_train, stage=stage)

    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_report(commands)

    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _train(options: argparse.Namespace) -> int:
    from rlm_engine.errors import UsageError
    from rlm_training.allocator import keep_freed_memory
    from rlm_training.loop import Interrupted
    from rlm_training.recipe import load_recipe
    from rlm_training.stages import dry_run, train

    overrides = list(options.overrides)
    if options.init:
        overrides.append(f"train.init={json.dumps(options.init)}")
    if options.fsdp:
        overrides.append("train.fsdp=true")
    recipe = load_recipe(options.recipe, overrides)
    if recipe.stage != options.stage:
        raise UsageError(f"{options.recipe} is a recipe for `rlm-train {recipe.stage}`")
    if options.dry_run:
        print(dry_run(recipe))
        return 0
    if options.out is None:
        raise UsageError("--out is missing: the folder of the run")
    leads = os.environ.get("RANK", "0") == "0"
    keep_freed_memory()
    try:
        target = train(recipe, options.out, options.resume)
    except Interrupted:
        if leads:
            print(f"rlm-train: stopped; continue with --resume --out {options.out}", file=sys.stderr)
        return 130
    if leads:
        print(f"model written to {target}")
    return 0


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser("calibrate", help="how decisive an act model's halting head is: one factor")
    calibrate.add_argument("model", type=Path, help="model directory")
    calibrate.add_argument("--prepared", type=Path, required=True, help="folder of rlm-train prepare: training text")
    calibrate.add_argument("--sources", nargs="+", default=[], metavar="NAME", help="of its sources (default all)")
    calibrate.add_argument("--tokens", type=int, default=20_000, help="of text, in all (default 20000)")
    calibrate.add_argument(
        "--tolerance", type=float, default=0.0025, metavar="NATS", help="per token, what it may cost (default 0.0025)"
    )
    calibrate.add_argument("--factor", type=float, metavar="F", help="this factor instead of the best one")
    calibrate.add_argument(
        "--price", type=float, metavar="NATS", help="fit the head anew: stop where all that follows saves less"
    )
    calibrate.add_argument("--out", type=Path, required=True, help="model directory to write")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from rlm_training.calibrate import Outcome, calibrate_halting

    def say(one: Outcome) -> None:
        print(f"{one.factor:6.2f}  {one.loss:8.5f}  {one.depth:5.3f} +- {one.deviation:.3f}", flush=True)

    print("factor      loss  depth")
    best = calibrate_halting(
        options.model,
        options.out,
        options.prepared,
        options.sources,
        options.tokens,
        say,
        options.tolerance,
        options.price,
        options.factor,
    )
    print(f"model written to {options.out}, halting logits times {best.factor:g}")
    return 0


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="perplexity, zero-shot tasks, depth and chat statistics")
    evaluate.add_argument("model", help="bundled model or model directory")
    evaluate.add_argument("--heldout", nargs="+", type=Path, default=[], help="files, folders or prepared folders")
    evaluate.add_argument("--max-tokens", type=int, default=20_000, help="per domain, 0 for all (default 20000)")
    evaluate.add_argument("--thresholds", default="0.5,0.9,0.99", help="exit thresholds (act), default 0.5,0.9,0.99")
    evaluate.add_argument("--depths", default=None, help="depth budgets such as 1-8 or 2,4 (default: all there are)")
    evaluate.add_argument("--tasks", nargs="+", type=Path, default=[], help="zero-shot tasks, .jsonl files or folders")
    evaluate.add_argument("--limit", type=int, default=0, help="items per task at most (default: all)")
    evaluate.add_argument(
        "--chat-prompts",
        nargs="?",
        const=Path(),
        type=Path,
        help="chat statistics; a file with a prompt a line, or none",
    )
    evaluate.add_argument("--chat-seeds", default="1", help="seeds of the sampled replies (default 1)")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write everything as JSON, too (- for the terminal)")
    evaluate.add_argument("--backend", default="torch", help="torch (default, batched) or onnx")
    evaluate.add_argument("--device", default="auto", help="auto, cpu or cuda")
    evaluate.add_argument("--precision", default="float32", help="float32 (default), or bfloat16: faster, less exact")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from rlm_training.allocator import keep_freed_memory
    from rlm_training.chat_statistics import default_prompts, read_prompts
    from rlm_training.evaluate import Plan, evaluate
    from rlm_training.evaluation_tables import format_evaluation
    from rlm_training.scoring import load_scorer

    to_file = options.json is not None and options.json != Path("-")
    if to_file:
        _check_writable(options.json)
    prompts: list[str] = []
    if options.chat_prompts is not None:
        prompts = default_prompts() if options.chat_prompts == Path() else read_prompts(options.chat_prompts)
    plan = Plan(
        heldout=tuple(options.heldout),
        max_tokens=options.max_tokens,
        thresholds=tuple(_numbers(options.thresholds, "--thresholds", float)),
        depths=None if options.depths is None else tuple(_numbers(options.depths, "--depths", int)),
        tasks=tuple(options.tasks),
        task_limit=options.limit,
        chat_prompts=tuple(prompts),
        chat_seeds=tuple(_numbers(options.chat_seeds, "--chat-seeds", int)),
    )
    keep_freed_memory()
    scorer = load_scorer(options.model, options.backend, options.device, options.precision)
    result = evaluate(scorer, plan, _progress())
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if options.json == Path("-"):
        print(text)
        return 0
    print(format_evaluation(result))
    if to_file:
        temporary = options.json.with_name(options.json.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(options.json)
    return 0


def _check_writable(path: Path) -> None:
    """Before hours of work: that its result can be written. Raises UsageError for a folder, OSError otherwise."""
    from rlm_engine.errors import UsageError

    if path.is_dir():
        raise UsageError(f"--json {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = path.with_name(path.name + ".tmp")
    attempt.touch()
    attempt.unlink()


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="a run's curves and tables as one HTML page, or as Markdown")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run (metrics.jsonl)")
    report.add_argument("--out", type=Path, help="the page (default RUN/report.html; PAGE.md: Markdown)")
    report.set_defaults(run=_write_report)


def _write_report(options: argparse.Namespace) -> int:
    from rlm_training.report import write_report

    target = write_report(options.run_folder, options.out)
    print(f"report written to {target}")
    return 0


def _numbers(text: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers of "1,3,5"; whole ones also as a range "1-8". Raises UsageError."""
    from rlm_engine.errors import UsageError

    numbers: list[Any] = []
    try:
        for part in filter(None, text.split(",")):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last) + 1) if dash and kind is int else [kind(part)]
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a list of numbers such as 1,2,3") from None
    return numbers


def _progress() -> Any:
    """Says what is being done on a terminal's last line; None when nobody watches."""
    if not sys.stderr.isatty():
        return None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
