"""From nothing to a first token: the program's start, imports, loading a model, the first token after a prompt."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import act_config, arguments, interleave, median, random_module, start, table, timed, verdict

from rlm_engine.checkpoint import write_model_directory
from rlm_engine.generate import find_model
from rlm_engine.measure import available_variants

# In a fresh interpreter: seconds to import, to load, to the first token of the first and of a second reply.
_FIRST_TOKEN = """
import json, sys, time
begin = time.perf_counter()
from rlm_engine.measure import open_variant, sample_ids
imported = time.perf_counter()
model = open_variant(sys.argv[1], sys.argv[2])
loaded = time.perf_counter()
from rlm_engine import Sampling
ids = sample_ids(model, 32)
stages = [imported - begin, loaded - imported]
for _ in range(2):
    started = time.perf_counter()
    next(iter(model.generate(ids[: model.config.context_length // 2], Sampling(seed=0))), None)
    stages.append(time.perf_counter() - started)
from rlm_engine.machine import resident_bytes
print(json.dumps(stages + [resident_bytes() or 0]))
"""


def main() -> None:
    """Time everything from the outside, in processes of their own."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--model", metavar="NAME", help="default: act of 15 million random weights")
    options = start(parser)
    with tempfile.TemporaryDirectory() as folder:
        name = options.model or _random_directory(Path(folder) / "random", "tiny" if options.quick else "15m")
        _commands(options.repeats)
        _loading(name, options.repeats)


def _random_directory(directory: Path, size: str) -> str:
    config = act_config(size)
    write_model_directory(directory, config, random_module(config).state_dict())
    try:
        from rlm_engine.export.onnx import export_onnx

        export_onnx(directory, precision="int8")
    except ImportError as error:
        print(f"no ONNX export: {error}")
    return str(directory)


def _commands(repeats: int) -> None:
    beside = Path(sys.executable).with_name("rlm-chat")
    program = [str(beside)] if beside.is_file() else [sys.executable, "-m", "rlm_chat"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import rlm_engine": [sys.executable, "-c", "import rlm_engine"],
        "rlm-chat --version": [*program, "--version"],
        "rlm-chat --help": [*program, "--help"],
    }
    runs = {label: partial(timed, partial(_run, command)) for label, command in commands.items()}
    for run in runs.values():
        run()  # the files are in the system's cache from here on
    times = {label: median(seconds) for label, seconds in interleave(repeats, runs).items()}
    base = times["python -c pass"]
    table(
        ["baseline: python -c pass", "seconds", "ratio"],
        [[label, f"{seconds:.3f}", f"{seconds / base:.2f}x"] for label, seconds in times.items()],
    )
    verdict("rlm-chat --version, s", times["rlm-chat --version"], 0.2, at_least=False)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loading(name: str, repeats: int) -> None:
    variants = available_variants(find_model(name))
    runs = {v: partial(_run, [sys.executable, "-c", _FIRST_TOKEN, name, v]) for v in variants}
    rows, warm = [], {}
    for variant, outputs in interleave(repeats, runs).items():
        stages = [median(column) for column in zip(*map(json.loads, outputs), strict=True)]
        warm[variant] = stages[3]
        rows.append([variant, *(f"{s:.3f}" for s in stages[:4]), f"{stages[4] / 1e6:.0f}"])
    print()
    table([name, "import, s", "load_model, s", "first token, s", "warm, s", "memory, MB"], rows)
    for variant, seconds in warm.items():
        against = "" if variant == variants[0] else f" ({seconds / warm[variants[0]]:.2f}x of {variants[0]})"
        verdict(f"{variant}: first token after a prompt of 32, model warm, s{against}", seconds, 0.3, at_least=False)


if __name__ == "__main__":
    main()
