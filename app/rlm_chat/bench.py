"""`rlm-chat bench`: a model's speed on every backend this installation has, side by side.

Each backend runs in a process of its own, so that memory and loading times are its own and no thread pool disturbs
another one. They take turns, round by round: a machine's speed drifts, and only numbers of one run compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from rlm_engine.errors import EngineError, InputError, ModelError, UsageError
from rlm_engine.sanitize import printable

if TYPE_CHECKING:
    from rlm_engine.measure import Measurement

ERRORS: dict[int, type[EngineError]] = {2: UsageError, 3: ModelError, 4: InputError}
MEMORY_BOUND = 0.6  # from this share of the streaming limit on, reading weights is what takes the time
_LABELS = {"torch": "PyTorch", "onnx": "ONNX"}


def bench(options: argparse.Namespace) -> int:
    """`rlm-chat bench`."""
    if options.child:
        return _child(options)
    from rlm_engine.generate import find_model
    from rlm_engine.machine import load_average, physical_cores, processor_name, streaming_read_limit
    from rlm_engine.measure import VARIANTS, available_variants

    if options.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {options.repeats}")
    name = getattr(options, "model", "chat")
    directory = find_model(name)
    if options.backends is None:
        # where nothing is available, loading says why
        variants = available_variants(directory) or ["torch"]
    else:
        variants = [part.strip() for part in options.backends.split(",") if part.strip()]
        wrong = next((v for v in variants if v not in VARIANTS), None)
        if wrong is not None or not variants or len(set(variants)) < len(variants):
            raise UsageError(f"--backends takes {', '.join(VARIANTS)}, each once; got {options.backends!r}")
    busy = load_average()
    with _Children(options, name, variants) as children:
        limits = []
        for number in range(1, options.repeats + 1):
            for child in children.each(f"round {number} of {options.repeats}"):
                child.ask("round")
            limits.append(streaming_read_limit(repeats=2))
        results = [_measurement(child.ask("result")["result"]) for child in children.each("")]
    limit = statistics.median(limits)
    report = _report(results, limit, busy)
    report["machine"] = {"processor": processor_name(), "cores": physical_cores(), "load_average": busy}
    if options.json:
        print(json.dumps(_rounded(report)))
    else:
        _print_table(results, report)
    return 0


class _Child:
    """One backend's process."""

    def __init__(self, options: argparse.Namespace, name: str, variant: str):
        self.variant = variant
        command = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-P", "-m", "rlm_chat"]
        for option in ("device", "max_depth", "halt_threshold"):
            if hasattr(options, option):
                command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        command += ["bench", "--child", "--model", name, "--backends", variant]
        command += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
        # a session of its own: Ctrl-C reaches this process only, which ends the others
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
        )

    def ask(self, request: str) -> dict[str, Any]:
        """Send a line, "" for none, and wait for the answer. Raises what the child raised."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if request:
            with contextlib.suppress(BrokenPipeError):
                print(request, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # a native library that prints
            if isinstance(answer, dict) and "error" in answer:
                raise ERRORS.get(answer["exit_code"], EngineError)(answer["error"])
            if isinstance(answer, dict):
                return answer
        raise EngineError(f"the process of backend {self.variant!r} ended unexpectedly; --backends can leave it out")

    def end(self) -> None:
        """Kill it; nothing of it is needed any more."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


class _Children:
    """The backends' processes; leaving the context ends them all, also when Ctrl-C is the reason."""

    def __init__(self, options: argparse.Namespace, name: str, variants: list[str]):
        self._options, self._name, self._variants = options, name, variants
        self._children: list[_Child] = []
        self._terminal: IO[str] | None = sys.stderr if sys.stderr.isatty() and not options.json else None

    def __enter__(self) -> _Children:
        try:
            for variant in self._variants:  # one after the other: loading times are measured
                self._say(f"loading {variant}")
                self._children.append(_Child(self._options, self._name, variant))
                self._children[-1].ask("")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.end()
        self._say("")

    def each(self, what: str) -> Iterator[_Child]:
        """The processes in turn."""
        for child in self._children:
            self._say(f"{what}: {child.variant}" if what else "")
            yield child

    def _say(self, text: str) -> None:
        if self._terminal is not None:
            print(f"\r\x1b[K{text}", end="", file=self._terminal, flush=True)


def _child(options: argparse.Namespace) -> int:
    """One backend: load, then a round for every line "round" until "result" or the end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows sends Ctrl-C to all processes of the terminal
    started = time.perf_counter()
    import dataclasses

    from rlm_chat.oneshot import depth_fields
    from rlm_engine import Depth
    from rlm_engine.generate import find_model
    from rlm_engine.measure import Meter, open_variant

    try:
        depth = Depth(**depth_fields(options))
        model = open_variant(options.model, options.backends, getattr(options, "device", "auto"))
        load_s = time.perf_counter() - started
        meter = Meter(model, options.prompt_tokens, options.new_tokens, depth, find_model(options.model))
        meter.warm_up()
        print(json.dumps({"ready": model.backend_name}), flush=True)
        for line in sys.stdin:
            if line.strip() == "round":
                meter.round()
                print(json.dumps({"round": True}), flush=True)
            elif line.strip() == "result":
                print(json.dumps({"result": dataclasses.asdict(meter.result(load_s))}), flush=True)
    except EngineError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
        return error.exit_code
    return 0


def _measurement(record: dict[str, Any]) -> Measurement:
    from rlm_engine.measure import DepthPoint, Measurement

    points = tuple(DepthPoint(**point) for point in record.pop("depth_points"))
    return Measurement(depth_points=points, **record)


def _report(results: list[Measurement], limit: float, busy: float | None) -> dict[str, Any]:
    """What --json prints, the machine left out."""
    import dataclasses

    from rlm_engine.machine import physical_cores
    from rlm_engine.measure import with_streaming

    results[:] = [with_streaming(result, limit) for result in results]
    first = results[0]
    rows = [
        dataclasses.asdict(r) | {"decode_ratio": r.decode_tokens_per_s / first.decode_tokens_per_s} for r in results
    ]
    return {
        "baseline": _label(first),
        "streaming_read_bytes_per_s": limit,
        "results": rows,
        "notes": _notes(results, busy, physical_cores()),
    }


def _notes(results: list[Measurement], busy: float | None, cores: int) -> list[str]:
    """What limits the speed, in words."""
    fastest = max(results, key=lambda r: r.decode_tokens_per_s)
    notes = []
    if fastest.streaming_share is not None and fastest.weight_bytes is not None:
        megabytes = f"{fastest.weight_bytes / 1e6:.3g} MB of weights for every token"
        share = f"{fastest.streaming_share:.0%} of what this machine's memory gives"
        if fastest.streaming_share >= MEMORY_BOUND:
            notes.append(
                f"{_label(fastest)} is limited by memory: it reads {megabytes}, {share}. "
                "Fewer recurrences (--max-depth) or smaller weights (8 bits) are what makes it faster."
            )
        else:
            notes.append(
                f"{_label(fastest)} is not limited by memory alone: it reads {megabytes}, {share}. "
                "The rest is arithmetic, the fixed cost of a token, or other programs."
            )
    if fastest.recurrence_s is not None and fastest.fixed_s is not None:
        part = 1 - fastest.fixed_s * fastest.decode_tokens_per_s
        if part > 0:
            notes.append(f"{part:.0%} of a token's time are its recurrences, the part that a smaller depth saves.")
    if busy is not None and busy > 0.5 * cores:
        notes.append(
            f"The machine was busy before this began (load {busy:.1f} on {cores} cores): all speeds here are too low."
        )
    return notes


def _label(result: Measurement) -> str:
    where = "" if result.device == "cpu" else f" {result.device}"
    return f"{_LABELS.get(result.backend, result.backend)} {result.precision}{where}"


def _print_table(results: list[Measurement], report: dict[str, Any]) -> None:
    first, machine = results[0], report["machine"]
    print(
        printable(
            f"{first.model}: {first.architecture}, {first.parameters:,} parameters; a prompt of {first.prompt_tokens} "
            f"tokens, then {first.new_tokens} one by one; rounds: {first.rounds}, taken in turns"
        )
    )
    limit = report["streaming_read_bytes_per_s"] / 1e9
    print(f"{printable(machine['processor'])}, {machine['cores']} cores, reads {limit:.1f} GB/s from memory\n")
    lines = [
        ("", [_label(r) for r in results]),
        ("decode, tokens/s", [_number(r.decode_tokens_per_s) for r in results]),
        ("  best round", [_number(r.decode_tokens_per_s_best) for r in results]),
        (f"  against {_label(first)}", [f"{row['decode_ratio']:.2f}x" for row in report["results"]]),
        ("prompt, tokens/s", [_number(r.prefill_tokens_per_s) for r in results]),
        ("  first token, ms", [_number(r.prefill_s, 1e3) for r in results]),
        ("mean depth", [_number(r.mean_depth) for r in results]),
        ("one recurrence, ms", [_number(r.recurrence_s, 1e3) for r in results]),
        ("rest of a token, ms", [_number(r.fixed_s, 1e3) for r in results]),
        ("choosing a token, ms", [_number(r.sampling_s, 1e3) for r in results]),
        ("weights per token, MB", [_number(r.weight_bytes, 1e-6) for r in results]),
        ("reads, GB/s", [_number(r.read_bytes_per_s, 1e-9) for r in results]),
        ("  of the memory's limit", [_percent(r.streaming_share) for r in results]),
        ("loading, s", [_number(r.load_s) for r in results]),
        ("memory, MB", [_number(r.resident_bytes, 1e-6) for r in results]),
        ("  at its peak", [_number(r.peak_resident_bytes, 1e-6) for r in results]),
    ]
    left = max(len(title) for title, _ in lines)
    width = max(10, *(len(cell) for _, cells in lines for cell in cells))
    for title, cells in lines:
        print(f"{title:{left}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    for note in report["notes"]:
        print(f"\n{note}")


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    scaled = value * unit
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _rounded(value: Any) -> Any:
    """Six significant digits are more than a clock gives."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
