"""The command line. Nothing heavy is imported here: `rlm-chat --version` needs neither numpy nor Textual."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rlm_engine.errors import EngineError, UsageError
from rlm_engine.version import __version__

WORKER_ARGUMENT = "--engine-worker"  # how a frozen program starts itself as its engine process

MODEL_OPTIONS = ("model", "backend", "device", "dtype")
SAMPLING_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "greedy", "max_tokens", "stop",
)  # fmt: skip
DEPTH_OPTIONS = ("max_depth", "halt_threshold")
EXIT_CODES = """exit codes: 0 fine; 1 unexpected error; 2 wrong usage; 3 model cannot be loaded;
4 input refused (empty, too long, not text); 130 interrupted; 141 the reader of the output went away"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rlm-chat`; returns the exit code. Errors made for people are one line on standard error."""
    if arguments is None and sys.argv[1:2] == [WORKER_ARGUMENT]:
        from rlm_engine import worker

        worker.main()
    options = _parser().parse_args(arguments)
    for name in ("json", "debug"):
        setattr(options, name, getattr(options, name, False))
    try:
        _refuse_ignored(options)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except EngineError as error:
        if options.debug:
            raise
        print(f"rlm-chat: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nrlm-chat: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except OSError as error:
        if options.debug:
            raise
        _silence_stdout()
        print(f"rlm-chat: {error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"rlm-chat: unexpected {type(error).__name__}: {error}; --debug shows where", file=sys.stderr)
        return 1


def _silence_stdout() -> None:
    """The interpreter flushes standard output once more at its end; that must not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_ignored(options: argparse.Namespace) -> None:
    """UsageError for an option that stands before a command which has no such option."""
    for name in (*MODEL_OPTIONS, *SAMPLING_OPTIONS, *DEPTH_OPTIONS):
        if hasattr(options, name) and name not in options.takes:
            raise UsageError(f"--{name.replace('_', '-')} is not an option of this command; see its --help")
    if getattr(options, "batch", None) is not None and options.input is None:
        raise UsageError("--batch is for the lines of --input; leave it out for a single prompt")


def _parser() -> argparse.ArgumentParser:
    common = _common_options()
    everything = (*MODEL_OPTIONS, *SAMPLING_OPTIONS, *DEPTH_OPTIONS)
    parser = argparse.ArgumentParser(
        prog="rlm-chat",
        description="Chat with a small recursive language model on your own machine, and watch it think. "
        "Without a command the chat screen opens.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"rlm-chat {__version__}")
    parser.set_defaults(run=_tui, takes=everything)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    chat = commands.add_parser("chat", parents=[common], help="one reply to a prompt, or a plain conversation")
    chat.add_argument("prompt", nargs="?", help="what to say; standard input is read when it is piped")
    _add_generation_options(chat, '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}')
    chat.add_argument("--system", help="a system message put before the conversation")
    chat.set_defaults(run=_run("chat"), takes=everything)

    complete = commands.add_parser("complete", parents=[common], help="continue a text with the base model")
    complete.add_argument("text", nargs="?", help="the beginning; standard input is read when it is piped")
    _add_generation_options(complete, '{"prompt": "..."}')
    complete.set_defaults(run=_run("complete"), takes=everything)

    score = commands.add_parser(
        "score",
        parents=[_output_options(), _model_options(), _depth_options()],
        help="how likely the model finds a text, and its depths",
    )
    score.add_argument("file", help="a text file, or - for standard input")
    score.set_defaults(run=_run("score"), takes=(*MODEL_OPTIONS, *DEPTH_OPTIONS))

    bench = commands.add_parser(
        "bench",
        parents=[_output_options(), _model_options(backend=False), _depth_options()],
        help="how fast a model runs on this machine",
    )
    bench.add_argument(
        "--backends", metavar="LIST", help="of torch, torch-bf16, onnx, with commas between (default: what is there)"
    )
    bench.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="length of the prompt (default 32)")
    bench.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens after it (default 128)")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds, taken in turns (default 3)")
    bench.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one backend, driven through pipes
    bench.set_defaults(run=_run("bench", "rlm_chat.bench"), takes=("model", "device", *DEPTH_OPTIONS))

    models = commands.add_parser("models", parents=[_output_options()], help="the models that came with the program")
    models.set_defaults(run=_run("models"), takes=())

    convert = commands.add_parser(
        "convert", parents=[_output_options()], help="turn a published checkpoint into a model directory"
    )
    convert.add_argument("source", type=Path, help="a .pt file of mor, or a published model directory")
    convert.add_argument("target", type=Path, help="the model directory to write; must not exist")
    convert.add_argument("--tokenizer", type=Path, help="directory with vocab.json and merges.txt, or tokenizer.json")
    convert.add_argument("--heads", type=int, help="attention heads, when the checkpoint does not tell")
    convert.set_defaults(run=_run("convert"), takes=())

    export = commands.add_parser("export", help="write a model for another program or runtime")
    formats = export.add_subparsers(title="formats", metavar="FORMAT", required=True)
    onnx = formats.add_parser("onnx", parents=[_output_options()], help="graphs for ONNX Runtime, without PyTorch")
    onnx.add_argument("source", metavar="MODEL", help="a bundled model, or a model directory with its weights")
    onnx.add_argument("--out", type=Path, metavar="DIR", help="a new model directory (default: MODEL itself)")
    onnx.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="of the weights (default fp32)")
    onnx.set_defaults(run=_run("export_onnx"), takes=())
    return parser


def _add_generation_options(command: argparse.ArgumentParser, lines: str) -> None:
    command.add_argument("--input", type=Path, metavar="FILE", help=f"answer every line of a JSON Lines file: {lines}")
    command.add_argument("--batch", type=int, metavar="N", help="lines of --input answered at a time (default 8)")
    command.add_argument(
        "--window",
        choices=("exact", "block"),
        default="exact",
        help="published designs past their context: re-read the window for each token (exact), or drop a block",
    )
    command.add_argument(
        "--draft-depth",
        type=int,
        metavar="N",
        help="draft tokens at depth N, verify them at full depth: same output (in 8 bits up to rounding), other speed",
    )


def _output_options() -> argparse.ArgumentParser:
    # SUPPRESS: the options may stand before or after the command without one resetting the other
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--json", action="store_true", help="JSON Lines: one object per token, then a summary")
    options.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return options


def _common_options() -> argparse.ArgumentParser:
    parents = [_output_options(), _model_options(), _sampling_options(), _depth_options()]
    return argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=parents)


def _model_options(backend: bool = True) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    model = options.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="a bundled model or a model directory")
    if backend:
        model.add_argument("--backend", choices=("auto", "onnx", "torch"), help="what computes (default auto)")
        model.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16"),
            help="what PyTorch computes in (auto: float32, on a GPU bfloat16)",
        )
    model.add_argument("--device", choices=("auto", "cpu", "cuda", "directml", "coreml"), help="where (default auto)")
    return options


def _sampling_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    sampling = options.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest (default 0.8)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0 is off (default)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that sum to P (default 0.95)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="only those at least P times the likeliest")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 repeats less (default 1)")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same reply")
    sampling.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="length of the reply at most (default 256)")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    return options


def _depth_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    depth = options.add_argument_group("depth")
    depth.add_argument("--max-depth", type=int, metavar="N", help="at most N recurrences per token")
    depth.add_argument("--halt-threshold", type=float, metavar="P", help="halt when the halting probability sums to P")
    return options


def _run(name: str, module: str = "rlm_chat.oneshot"):  # type: ignore[no-untyped-def]
    """A command's function, imported only when it runs."""

    def run(options: argparse.Namespace) -> int:
        from importlib import import_module

        return int(getattr(import_module(module), name)(options))

    return run


def _tui(options: argparse.Namespace) -> int:
    if options.json:
        raise UsageError("--json belongs to chat, complete, score and models")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("the chat screen needs a terminal; use `rlm-chat chat` or `rlm-chat complete` in a pipe")
    from rlm_chat.oneshot import depth_fields, engine_fields, sampling_fields
    from rlm_chat.tui import run_tui

    return run_tui(
        getattr(options, "model", None),
        sampling_fields(options),
        depth_fields(options),
        engine_fields(options),
    )
