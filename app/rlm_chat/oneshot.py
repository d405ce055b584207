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

from rlm_chat.cli import SAMPLING_OPTIONS
from rlm_chat.settings import ENGINE_OPTIONS
from rlm_engine.errors import InputError
from rlm_engine.sanitize import PrintableFilter, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlm_engine import Generation, Model

MAX_INPUT_BYTES = 16 * 2**20
# JSON escapes C0 itself; these would act on a terminal that shows the line.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def sampling_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Sampling` that were given on the command line."""
    fields = {name: getattr(options, name) for name in SAMPLING_OPTIONS if hasattr(options, name)}
    if "stop" in fields:
        fields["stop"] = tuple(fields["stop"])
    return fields


def depth_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Depth` that were given on the command line."""
    names = {"max_depth": "max_steps", "halt_threshold": "halt_threshold"}
    return {field: getattr(options, name) for name, field in names.items() if hasattr(options, name)}


def engine_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Backend, device and dtype as far as they were given on the command line."""
    return {name: getattr(options, name) for name in ENGINE_OPTIONS if hasattr(options, name)}


def chat(options: argparse.Namespace) -> int:
    """`rlm-chat chat`: one reply, or a line-by-line conversation at a terminal without a prompt."""
    from rlm_engine import Sampling

    system = [{"role": "system", "content": options.system}] if options.system else []
    if options.input is not None:
        return _answer_file(options, "chat", options.prompt, system)
    prompt = _prompt(options.prompt)
    sampling = Sampling(**sampling_fields(options))
    if prompt is None:
        return _converse(options, sampling, system)
    if not prompt.strip():
        raise InputError("the prompt is empty")
    model = _load(options, "chat")
    messages = [*system, {"role": "user", "content": prompt}]
    _stream(model.chat(messages, sampling, _depth(options), speculation=_speculation(options, model)), options)
    return 0


def complete(options: argparse.Namespace) -> int:
    """`rlm-chat complete`: the continuation of a text."""
    from rlm_engine import Sampling

    if options.input is not None:
        return _answer_file(options, "base", options.text)
    text = _prompt(options.text)
    if text is None:
        raise InputError("nothing to continue; give a text or pipe one in")
    sampling = Sampling(**sampling_fields(options))
    depth = _depth(options)
    if not text:
        raise InputError("the text to continue is empty")
    model = _load(options, "base")
    _stream(model.generate(text, sampling, depth, speculation=_speculation(options, model)), options)
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
        print(f"{'name':14} {'design':9} {'parameters':>12} {'context':>8} {'depth':>6} {'chat':>5}  card")
        for row in rows:
            talks = "yes" if row["chat"] else "no"
            print(
                f"{row['name']:14} {row['architecture']:9} {row['parameters']:>12,} {row['context_length']:>8} "
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
    from rlm_engine.errors import UsageError
    from rlm_engine.export.onnx import export_onnx as export
    from rlm_engine.generate import bundled_models, find_model

    source = find_model(options.source)
    if options.out is None and options.source in bundled_models():
        raise UsageError(f"{options.source} is a bundled model; give --out a new directory for the export")
    manifest = export(source, options.out, options.precision)
    target, found = options.out or source, manifest.verification
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
            f"same likeliest token {found.top1_agreement:.1%}, same greedy text for the first "
            f"{found.greedy_agreement or 0:.0%}"
        )
    return 0


def _answer_file(
    options: argparse.Namespace, default: str, given: str | None, system: list[dict[str, str]] | None = None
) -> int:
    """Every line of --input: a JSON object a line comes out, in input order.

    ``given``: the prompt argument, which there is no place for; ``system``: for conversations without a system message.
    """
    from rlm_engine import Sampling, UsageError

    rows = 8 if options.batch is None else options.batch
    if rows < 1:
        raise UsageError(f"--batch must be at least 1, got {rows}")
    if given is not None:
        raise UsageError("give either a prompt or --input, not both")
    if options.draft_depth is not None:
        raise UsageError("--draft-depth is for a single prompt; leave it out with --input")
    sampling, depth = Sampling(**sampling_fields(options)), _depth(options)
    lines = []
    # only \n ends a line: a JSON text may hold the other line breaks of Unicode
    for number, line in enumerate(_read(options.input).split("\n"), 1):
        if line.strip():
            where = f"{printable(str(options.input))}, line {number}"
            prompt = _continued(line, where) if default == "base" else _conversation(line, where, system or [])
            lines.append((where, prompt))
    if not lines:
        raise InputError(f"{printable(str(options.input))}: holds no prompt")
    model = _load(options, default)
    where = ""

    def prompts() -> Iterator[Any]:
        nonlocal where
        for where, prompt in lines:  # noqa: B007 (read below, should the model refuse this prompt)
            yield prompt

    try:
        completions = model.generate_many(prompts(), sampling, depth, rows=rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    finished: dict[int, Any] = {}
    printed = 0
    for completion in completions:
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


def _continued(line: str, where: str) -> str:
    """The text of a line to continue: a JSON text, {"prompt": text} or {"text": text}."""
    record = _parsed(line, where)
    text = record.get("prompt", record.get("text")) if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise InputError(f'{where}: needs {{"prompt": "..."}}')
    if not text:
        raise InputError(f"{where}: the text to continue is empty")
    return text


def _conversation(line: str, where: str, system: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The messages of a line: as `_continued`, or {"messages": [...]}, whose roles and contents the model checks."""
    record = _parsed(line, where)
    if isinstance(record, dict):
        record = record.get("messages", record.get("prompt", record.get("text")))
    messages = [{"role": "user", "content": record}] if isinstance(record, str) else record
    # numbers would be taken for the ids of tokens
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(
            f'{where}: needs {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}]}}'
        )
    newest = messages[-1].get("content")
    if isinstance(newest, str) and not newest.strip():
        raise InputError(f"{where}: the {'prompt' if isinstance(record, str) else 'last message'} is empty")
    return messages if messages[0].get("role") == "system" else [*system, *messages]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        raise InputError(f"{where}: not JSON") from None


def _speculation(options: argparse.Namespace, model: Model) -> Any:
    """What --draft-depth asks for. UsageError for a depth that is not below the full one, where nothing is drafted."""
    if options.draft_depth is None:
        return None
    from rlm_engine import Speculation, UsageError

    full = min(model.max_depth, getattr(options, "max_depth", model.max_depth))
    if not 1 <= options.draft_depth < full:
        raise UsageError(
            f"--draft-depth must be at least 1 and below the full depth, here {full}; got {options.draft_depth}"
        )
    return Speculation(options.draft_depth)


def _converse(options: argparse.Namespace, sampling: Any, system: list[dict[str, str]]) -> int:
    """A plain conversation, one line a turn: for screen readers, logs and terminals that can do no better."""
    model = _load(options, "chat")
    speculation = _speculation(options, model)
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
        generation = model.chat(messages, sampling, _depth(options), speculation=speculation)
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

    model = load_model(getattr(options, "model", default), **engine_fields(options))
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
