"""Reading training text: .txt, .jsonl and .jsonl.zst files with plain texts or chat messages."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlm_engine.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")


@dataclass(frozen=True)
class Document:
    """One training document: a plain text, or a conversation (then ``text`` is empty)."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    chosen: str = ""
    rejected: str = ""


def source_name(path: Path) -> str:
    """The name of a file's source: its file name without the suffixes."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    raise InputError(f"{path}: only {', '.join(SUFFIXES)} files can be read")


def source_names(files: list[Path]) -> dict[str, Path]:
    """A name for every file: its stem, with the folder's name in front where two files share a stem."""
    stems = [source_name(path) for path in files]
    names: dict[str, Path] = {}
    for path, stem in zip(files, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}-{stem}"
        if name in names:
            raise InputError(f"{path} and {names[name]} would both be source {name!r}; rename one")
        names[name] = path
    return names


def find_files(paths: list[Path]) -> list[Path]:
    """The corpus files among paths; folders are searched. InputError when a path is missing or nothing is found."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif path.is_file():
            source_name(path)
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not found:
        raise InputError(f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, paths))}")
    return found


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file. A .txt file is split at blank lines between two newlines ("\\n\\n\\n").

    A JSON line holds {"text": ...} or {"messages": [{"role", "content"}, ...]}. InputError names file and line.
    """
    if path.name.endswith(".txt"):
        for text in path.read_text(encoding="utf-8").split("\n\n\n"):
            if text.strip():
                yield Document(text=text.strip())
        return
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise InputError(f"{path}, line {number}: not JSON") from None
            yield _document(record, f"{path}, line {number}")


def _document(record: object, where: str) -> Document:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return Document(text=record["text"])
        messages = record.get("messages", record.get("prompt"))
        if isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
            return Document(messages=turns, chosen=record.get("chosen", ""), rejected=record.get("rejected", ""))
    raise InputError(f'{where}: needs "text" or "messages" with role and content')


def _open(path: Path) -> io.TextIOBase:
    if path.name.endswith(".zst"):
        import zstandard

        raw = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
        return io.TextIOWrapper(raw, encoding="utf-8")
    return path.open(encoding="utf-8")
