"""What training text is made of: documents, and the files, folders and hub datasets they come from.

A document is a plain text, a conversation, or a preference pair. Records are JSON objects (lines, parquet rows, rows
of a hub dataset) with one of:

    {"text": "..."}                                                     the key can be chosen
    {"messages": [{"role": "user", "content": "..."}, ...]}             or "conversations" with from/value
    {"prompt": "..." or [messages], "chosen": "..." or [messages], "rejected": ...}
"""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_engine.errors import InputError, UsageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
HUB_PREFIX = "hf:"
_SPLITS = ("train", "test", "validation", "dev", "val")
_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant"}
_EDGE_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """A text; or ``messages`` (a conversation); or ``messages`` (the prompt) with a chosen and a rejected reply."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    chosen: str = ""
    rejected: str = ""
    kind: str = "text"  # "text", "chat" or "preference"

    def content(self) -> str:
        """All that people or models wrote in it, a line break between turns; what filters look at."""
        if self.kind == "text":
            return self.text
        replies = [self.chosen, self.rejected] if self.kind == "preference" else []
        return "\n".join([*(m["content"] for m in self.messages), *replies])


@dataclass(frozen=True)
class Input:
    """One source: a file, or a dataset of the Hugging Face hub as (name, configuration or "", split)."""

    path: Path | None = None
    hub: tuple[str, str, str] | None = None

    def __str__(self) -> str:
        if self.hub is None:
            return str(self.path)
        name, config, split = self.hub
        # as it may be typed: with no configuration, only a split of a usual name can follow the dataset's name
        between = [config] if config or not _is_split(split) else []
        return HUB_PREFIX + ":".join((name, *between, split))

    def fingerprint(self) -> str:
        """Changes when the file does: its size and a hash of its first and last MiB. Hub data have only their name."""
        if self.hub is not None:
            return HUB_PREFIX + ":".join(self.hub)
        assert self.path is not None
        size = self.path.stat().st_size
        digest = hashlib.blake2b(digest_size=8)
        with self.path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
        return f"{size}-{digest.hexdigest()}"


def find_inputs(arguments: list[str]) -> dict[str, Input]:
    """The sources named by files, folders (searched), glob patterns and hf:NAME[:CONFIG][:SPLIT], by source name.

    A source is named after its file's stem, with the folder's name in front where two files share a stem. InputError
    when something is missing, cannot be read here, or two sources get one name.
    """
    found: list[Input] = []
    for argument in arguments:
        if argument.startswith(HUB_PREFIX):
            found.append(Input(hub=_hub(argument)))
        else:
            found += [Input(path=path) for path in _files(argument)]
    if not found:
        raise InputError(f"no {', '.join(SUFFIXES)} file in {', '.join(arguments) or 'nothing'}")
    unique = list(dict.fromkeys(found))
    stems = [_stem(i) for i in unique]
    names: dict[str, Input] = {}
    for source, stem in zip(unique, stems, strict=True):
        shared = stems.count(stem) > 1 and source.path is not None
        name = f"{source.path.resolve().parent.name}-{stem}" if shared and source.path else stem
        if name in names:
            raise InputError(f"{source} and {names[name]} would both be source {name!r}; rename one")
        names[name] = source
    return names


def parse_record(raw: bytes | str | dict[str, Any], where: str, text_key: str = "text") -> Document:
    """The document in a JSON line (bytes), a plain text (str) or a row (dict); InputError names ``where``."""
    if isinstance(raw, str):
        return Document(text=raw)
    if isinstance(raw, dict):
        return _document(raw, where, text_key)
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON") from None
    return _document(record, where, text_key)


def _files(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if path.is_file():
        return [path]
    if glob.has_magic(argument):
        matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207 (may be absolute)
        if matches:
            return [p for p in matches if p.is_file()]
        raise InputError(f"{argument}: matches no file")
    raise InputError(f"{argument}: no such file or folder")


def _stem(source: Input) -> str:
    if source.hub is not None:
        name, config, split = source.hub
        parts = [name.replace("/", "-"), config, "" if split == "train" else "".join(c for c in split if c.isalnum())]
        return "-".join(part for part in parts if part)
    assert source.path is not None
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if source.path.name.endswith(suffix):
            return source.path.name.removesuffix(suffix)
    raise InputError(f"{source.path}: only {', '.join(SUFFIXES)} files can be read")


def _hub(argument: str) -> tuple[str, str, str]:
    name, *rest = argument.removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"{argument}: expected hf:NAME, hf:NAME:CONFIG, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    if len(rest) == 1 and _is_split(rest[0]):
        rest.insert(0, "")
    config, split = (*rest, "", "")[:2]
    return name, config, split or "train"


def _is_split(text: str) -> bool:
    return text.partition("[")[0] in _SPLITS


def _document(record: object, where: str, text_key: str) -> Document:
    if isinstance(record, dict):
        if isinstance(record.get(text_key), str):
            return Document(text=record[text_key])
        if record.get("chosen") is not None and record.get("rejected") is not None:
            return _pair(record, where)
        for key in ("messages", "conversations"):
            if isinstance(record.get(key), list):
                return Document(messages=_messages(record[key], where), kind="chat")
    raise InputError(f'{where}: needs "{text_key}", "messages", or "prompt" with "chosen" and "rejected"')


def _messages(data: object, where: str) -> tuple[dict[str, str], ...]:
    turns = []
    for entry in data if isinstance(data, list) else [None]:
        if not isinstance(entry, dict):
            raise InputError(f"{where}: a message must be an object with role and content")
        role = entry.get("role", entry.get("from"))
        content = entry.get("content", entry.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: a message needs role and content, both texts")
        turns.append({"role": _SHARE_GPT_ROLES.get(role, role), "content": content})
    return tuple(turns)


def _pair(record: dict[str, Any], where: str) -> Document:
    """Replies may be texts, or whole conversations that repeat the prompt and end in the reply."""
    prompt = record.get("prompt")
    prompts = []
    if prompt is not None:
        prompts.append(({"role": "user", "content": prompt},) if isinstance(prompt, str) else _messages(prompt, where))
    replies = []
    for key in ("chosen", "rejected"):
        reply = record[key]
        if isinstance(reply, list):
            turns = _messages(reply, where)
            if not turns or turns[-1]["role"] != "assistant":
                raise InputError(f"{where}: {key} does not end in an assistant message")
            if len(turns) > 1:
                prompts.append(turns[:-1])
            reply = turns[-1]["content"]
        if not isinstance(reply, str):
            raise InputError(f"{where}: {key} must be a text or a list of messages")
        replies.append(reply)
    # A "prompt" beside full conversations often holds only the last question; the conversations know more.
    together = prompts[-2:] if len(prompts) > 1 and isinstance(record["rejected"], list) else prompts
    if not together or any(p != together[0] for p in together):
        together = [()]  # no common prompt: the structure filter counts it out
    return Document(messages=together[0], chosen=replies[0], rejected=replies[1], kind="preference")
