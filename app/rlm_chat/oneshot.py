"""The commands that run once in this process: chat, complete, score, models, convert, export."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_engine.errors import InputError
from rlm_engine.sanitize import PrintableFilter, printable

if TYPE_CHECKING:
    from rlm_engine import Generation, Model

MAX_INPUT_BYTES = 16 * 2**20
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "greedy", "max_tokens", "stop",
)  # fmt: skip
# JSON escapes C0 itself; these would act on a terminal that shows the line.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def sampling_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Sampling` that were given on the command line."""
    fields = {name: getattr(options, name) for name in _SAMPLING if hasattr(options, name)}
    if "stop" in fields:
        fields["stop"] = tuple(fields["stop"])
    return fields


def depth_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Depth` that were given on the command line."""
    names = {"max_depth": "max_steps", "halt_threshold": "halt_threshold"}
    return {field: getattr(options, name) for name, field in names.items() if hasattr(options, name)}


def chat(options: argparse.Namespace) -> int:
    """`rlm-chat chat`: one reply, or a line-by-line conversation at a terminal without a prompt."""
    from rlm_engine import Sampling

    if options.input is not None:
        return _answer_file(options, "chat")
    prompt = _prompt(options.prompt)
    sampling = Sampling(**sampling_fields(options))
    system = [{"role": "system", "content": options.system}] if getattr(options, "system", None) else []
    if prompt is None:
        return _converse(options, sampling, system)
    if not prompt.strip():
        raise InputError("the prompt is empty")
    model = _load(options, "chat")
    messages = [*system, {"role": "user", "content": prompt}]
    _stream(model.chat(messages, sampling, _depth(options), speculation=_speculation(options)), options)
    return 0


def complete(options: argparse.Namespace) -> int:
    """`rlm-chat complete`: the continuation of a text."""
    from rlm_engine import Sampling

    if options.input is not None:
        return _answer_file(options, "base")
    text = _prompt(options.text)
    if text is None:
        raise InputError("nothing to continue; give a text or pipe one in")
    sampling = Sampling(**sampling_fields(options))
    depth = _depth(options)
    if not text:
        raise InputError("the text to continue is empty")
    _stream(_load(options, "base").generate(text, sampling, depth, speculation=_speculation(options)), options)
    return 0


def score(options: argparse.Namespace) -> int:
    """`rlm-chat score`: log-probability and depth of every token of a file."""
    depth = _depth(options)
    text = (
        _decode(sys.stdin.buffer.read(MAX_INPUT_BYTES + 1), "standard input")
        if options.file == "-"
        else _read(Path(options.file))
    )
    model = _load(options, "base")
    scored = model.score(text, depth)
    count = len(scored.logprobs)
    nats = -math.fsum(scored.logprobs)
    # the first token is given, not predicted: its bytes do not count
    predicted = "".join(map(model.token_text, scored.ids[1:])) if model.tokenizer is None else text
    size = len(predicted.encode()) - (len(model.token_text(scored.ids[0]).encode()) if model.tokenizer else 0)
    summary = {
        "type": "summary",
        "tokens": count,
        "nats": round(nats, 4),
        "perplexity": round(scored.perplexity, 4) if count else None,
        "bits_per_byte": round(nats / math.log(2) / size, 4) if count and size else None,
        "mean_depth": round(math.fsum(scored.depths) / count, 4) if count else None,
    }
    if options.json:
        for token, logprob, used in zip(scored.ids[1:], scored.logprobs, scored.depths, strict=True):
            _print_json(
                {"type": "token", "id": token, "text": model.token_text(token), "logprob": round(logprob, 6),
                 "depth": round(used, 4)}
            )  # fmt: skip
        _print_json(summary)
    else:
        for name in ("tokens", "perplexity", "bits_per_byte", "mean_depth"):
            value = summary[name]
            print(f"{name.replace('_', ' '):14} {'-' if value is None else value}")
    return 0


def models(options: argparse.Namespace) -> int:
    """`rlm-chat models`: what came with the program."""
    from rlm_engine.generate import BUNDLED, bundled_models, describe_model

    rows = [describe_model(BUNDLED / name) for name in bundled_models()]
    if options.json:
        for row in rows:
            _print_json(row)
    elif not rows:
        print("no model came with this installation; point --model at a model directory")
    else:
        print(f"{'name':10} {'design':9} {'parameters':>12} {'context':>8} {'depth':>6} {'chat':>5}  card")
        for row in rows:
            talks = "yes" if row["chat"] else "no"
            print(
                f"{row['name']:10} {row['architecture']:9} {row['parameters']:>12,} {row['context_length']:>8} "
                f"{row['max_depth']:>6} {talks:>5}  {row['card'] or '-'}"
            )
    return 0


def convert(options: argparse.Namespace) -> int:
    """`rlm-chat convert`: a published checkpoint as a model directory."""
    from rlm_engine.convert import convert_checkpoint

    config = convert_checkpoint(options.source, options.target, tokenizer=options.tokenizer, heads=options.heads)
    if options.json:
        _print_json({"target": str(options.target), "architecture": config.architecture})
    else:
        print(printable(f"{options.target}: {config.architecture}, tokenizer {config.tokenizer}"))
    return 0


def export_onnx(options: argparse.Namespace) -> int:
    """`rlm-chat export onnx`: a model's `onnx/` folder."""
    from rlm_engine.export.onnx import export_onnx as export

    manifest = export(options.source, options.out, options.precision)
    target, found = options.out or options.source, manifest.verification
    size_bytes = sum(file.size_bytes for file in manifest.files.values())
    if options.json:
        compared = None if found is None else vars(found)
        _print_json({"target": str(target), "precision": manifest.precision, "bytes": size_bytes, "compared": compared})
        return 0
    print(printable(f"{target}: {manifest.precision}, {size_bytes / 1e6:.1f} MB"))
    if found is None:
        print("not compared with PyTorch, which is not installed")
    else:
        print(
            f"compared with {found.reference} on {found.tokens} tokens: logits differ by at most "
            f"{found.logits_max_difference:.2g}, same depth {found.depth_agreement:.1%}, "
            f"same likeliest token {found.top1_agreement:.1%}"
        )
    return 0


def _answer_file(options: argparse.Namespace, default: str) -> int:
    """Every line of --input: a JSON object a line comes out, in input order."""
    from rlm_engine import Sampling, UsageError

    if options.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {options.batch}")
    sampling, depth = Sampling(**sampling_fields(options)), _depth(options)
    prompts = [
        _prompt_of_line(line, f"{options.input}, line {number}", default == "chat")
        for number, line in enumerate(_read(options.input).splitlines(), 1)
        if line.strip()
    ]
    if not prompts:
        raise InputError(f"{printable(str(options.input))}: holds no prompt")
    model = _load(options, default)
    finished: dict[int, Any] = {}
    printed = 0
    for completion in model.generate_many(prompts, sampling, depth, rows=options.batch):
        finished[completion.index] = completion
        while printed in finished:
            done = finished.pop(printed)
            record = {
                "index": done.index,
                "text": done.text,
                "stop_reason": done.stop_reason,
                "prompt_tokens": done.prompt_tokens,
                "new_tokens": len(done.tokens),
                "mean_depth": round(math.fsum(t.depth for t in done.tokens) / max(1, len(done.tokens)), 4),
                "seed": done.seed,
            }
            if options.json:
                record["tokens"] = [token.to_json() for token in done.tokens]
            _print_json(record)
            sys.stdout.flush()
            printed += 1
    return 0


def _prompt_of_line(line: str, where: str, chat: bool) -> Any:
    """A line's prompt: {"prompt": text} (or "text"), or {"messages": [...]}, or a JSON text."""
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{printable(where)}: not JSON") from None
    if isinstance(record, dict):
        record = record.get("messages", record.get("prompt", record.get("text")))
    if isinstance(record, str):
        return [{"role": "user", "content": record}] if chat else record
    if chat and isinstance(record, list) and record:
        return record
    wanted = '"prompt" or "messages"' if chat else '"prompt"'
    raise InputError(f"{printable(where)}: needs {wanted}")


def _speculation(options: argparse.Namespace) -> Any:
    if options.draft_depth is None:
        return None
    from rlm_engine import Speculation

    return Speculation(options.draft_depth)


def _converse(options: argparse.Namespace, sampling: Any, system: list[dict[str, str]]) -> int:
    """A plain conversation, one line a turn: for screen readers, logs and terminals that can do no better."""
    model = _load(options, "chat")
    messages = list(system)
    print("Type a message; Ctrl-C stops a reply, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        generation = model.chat(messages, sampling, _depth(options), speculation=_speculation(options))
        said: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):
            _stream(generation, options, said)
        messages.append({"role": "assistant", "content": "".join(said)})


def _stream(generation: Generation, options: argparse.Namespace, said: list[str] | None = None) -> None:
    """Print tokens as they come; plain text ends with a newline, JSON Lines with a summary."""
    import dataclasses

    visible = PrintableFilter()
    try:
        for token in generation:
            if said is not None:
                said.append(token.text)
            if options.json:
                _print_json({"type": "token", **token.to_json()})
            else:
                sys.stdout.write(visible.push(token.text))
            sys.stdout.flush()
    finally:
        generation.close()
        if not options.json:
            sys.stdout.write("\n")
    if options.json:
        _print_json({"type": "summary", **dataclasses.asdict(generation.summary)})


def _load(options: argparse.Namespace, default: str) -> Model:
    from rlm_engine import load_model

    model = load_model(
        getattr(options, "model", default), getattr(options, "backend", "auto"), getattr(options, "device", "auto")
    )
    model.window = getattr(options, "window", "exact")
    return model


def _depth(options: argparse.Namespace) -> Any:
    from rlm_engine import Depth

    return Depth(**depth_fields(options))


def _prompt(given: str | None) -> str | None:
    """The argument, followed by standard input when that is piped; None when there is neither."""
    if sys.stdin is None or sys.stdin.isatty():
        return given
    piped = _decode(sys.stdin.buffer.read(MAX_INPUT_BYTES + 1), "standard input")
    if given is None:
        return piped.removesuffix("\n")
    return f"{given}\n\n{piped}".rstrip() if piped.strip() else given


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{printable(str(path))}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        return _decode(file.read(MAX_INPUT_BYTES + 1), printable(str(path)))


def _decode(data: bytes, where: str) -> str:
    if len(data) > MAX_INPUT_BYTES:
        raise InputError(f"{where}: more than {MAX_INPUT_BYTES >> 20} MiB; the model could never read that")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise InputError(f"{where}: not text (it holds NUL bytes)")
    return text.replace("\r\n", "\n")


def _print_json(record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False)
    print(_UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", line))
