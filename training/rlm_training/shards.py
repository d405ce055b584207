"""Prepared corpora on disk: memory-mapped token shards with document offsets, loss masks and an index.

A prepared folder holds index.json and, per source and shard (NAME-00000, NAME-00001, ...; documents never straddle
shards), three kinds of files:

    NAME-00000.bin        tokens, uint16 or uint32 by vocabulary; every document is ended by end-of-text
    NAME-00000.docs.npy   int64 offsets of the documents' starts within the shard, plus the end
    NAME-00000.mask.bin   uint8, 1 where the token is part of a reply and counts in the loss (conversations, pairs)

A source has a kind: "text"; "chat" (conversations, perhaps texts among them); or "preference" (document 2i is pair
i's prompt with the chosen reply, document 2i+1 the same prompt with the rejected one; see `preferences`).
`prepare` writes these folders; OUT/heldout is a prepared folder of its own.
Version 1 folders (one NAME.bin, NAME.docs.npy, NAME.mask.bin per source, uint16) are read too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rlm_engine.config import ChatFormat
from rlm_engine.errors import InputError

VERSION = 2

# 90M's published chat format, with the end of text right after the reply, so that every turn ends by itself.
CHAT_TOKENS = ("<|user|>", "<|assistant|>")
CHAT_FORMAT = ChatFormat(
    prefix={"user": "<|user|>\n", "assistant": "<|assistant|>\n"},
    suffix={"user": "\n", "assistant": "<|endoftext|>"},
    stop=("<|endoftext|>", "<|user|>"),
)


class Concatenated:
    """One-dimensional arrays read as one, by position or slice. Slices are copied only where they span a border."""

    def __init__(self, parts: list[np.ndarray]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, span: slice | int) -> Any:
        if not isinstance(span, slice):
            span = range(len(self))[span]  # IndexError past the end
            part = int(np.searchsorted(self._ends, span, side="right"))
            return self._parts[part][span - int(self._ends[part])]
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise IndexError("only contiguous slices can be read")
        pieces, part = [], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            offset = int(self._ends[part]) - len(self._parts[part])
            piece = self._parts[part][start - offset : stop - offset]
            pieces.append(piece)
            start, part = start + len(piece), part + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Source:
    """One source of a prepared folder, memory-mapped."""

    name: str
    tokens: np.ndarray | Concatenated  # uint16 or uint32 [tokens]
    documents: np.ndarray  # int64 [documents + 1]
    mask: np.ndarray | Concatenated | None  # uint8 [tokens], conversations and preference pairs only
    kind: str = "text"


def load_sources(folder: Path) -> dict[str, Source]:
    """Map the texts and conversations of a prepared folder; empty sources are left out.

    Raises InputError when the folder is missing, or a file is missing or not of the size in the index.
    """
    return {s.name: s for s in map_sources(folder) if s.kind != "preference"}


def map_sources(folder: Path) -> list[Source]:
    """Map every source that holds a document, preference pairs too; InputError as `load_sources`."""
    return [
        _map_source(folder, name, facts) for name, facts in read_index(folder)["sources"].items() if facts["documents"]
    ]


def verify(folder: Path) -> int:
    """Compare every file with its SHA-256 in the index; returns how many. InputError names the first that differs."""
    index = read_index(folder)
    files: dict[str, dict[str, Any]] = {}
    for name, facts in index["sources"].items():
        for shard in _shards(name, facts):
            files |= shard.get("files") or {shard["tokens_file"]: {"sha256": facts["sha256"]}}
        for shard in facts.get("heldout", []):
            files |= {f"heldout/{file}": known for file, known in shard["files"].items()}
    files |= {file: {"sha256": digest} for file, digest in index.get("tokenizer_files", {}).items()}
    for file, known in files.items():
        path = folder / file
        if not path.is_file():
            raise InputError(f"{path}: missing; prepare the folder again")
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
                raise InputError(
                    f"{path}: damaged (its SHA-256 is not the one in index.json); prepare the folder again"
                )
    return len(files)


def digests(folder: Path) -> dict[str, str]:
    """One SHA-256 per source of a prepared folder, of the index's SHA-256 of its shards: what a run was trained on."""
    result = {}
    for name, facts in read_index(folder)["sources"].items():
        files = [known["sha256"] for shard in _shards(name, facts) for known in shard.get("files", {}).values()]
        result[name] = hashlib.sha256("".join(files or [facts.get("sha256", "")]).encode()).hexdigest()
    return result


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder; InputError when it is missing or damaged."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if isinstance(index["sources"], dict) and index.get("version", 1) in (1, VERSION):
            return dict(index)
    except FileNotFoundError:
        raise InputError(f"{folder}: no index.json here; run `rlm-train prepare` first") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{folder}/index.json is damaged; delete the folder and prepare it again")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that a crash, even of the machine, leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smaller unsigned integer that holds every id."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


class ShardWriter:
    """Writes one shard; its files get their names only in `close`, so a crash leaves nothing that looks whole.

    A shard without documents has no files, one without a marked token no mask file.
    """

    def __init__(self, folder: Path, stem: str, dtype: type[np.unsignedinteger[Any]]):
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self.tokens = 0
        self._starts = [0]
        self._any_mask = False
        self._files: dict[str, BinaryIO] = {}
        self._digests = {kind: hashlib.sha256() for kind in ("bin", "mask.bin")}

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """One document: ids [tokens] and uint8 mask [tokens]."""
        if not self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = {kind: self._temporary(kind).open("wb") for kind in self._digests}
        for kind, values, dtype in (("bin", ids, self._dtype), ("mask.bin", mask, np.uint8)):
            data = values.astype(dtype, copy=False).tobytes()
            self._files[kind].write(data)
            self._digests[kind].update(data)
        self.tokens += len(ids)
        self._starts.append(self.tokens)
        self._any_mask = self._any_mask or bool(mask.any())

    def close(self) -> dict[str, Any]:
        """Put the files in place; returns the shard's entry for the index."""
        facts: dict[str, Any] = {"documents": len(self._starts) - 1, "tokens": self.tokens, "files": {}}
        if not self._files:
            return facts
        offsets = io.BytesIO()
        np.save(offsets, np.asarray(self._starts, dtype=np.int64))
        self._files["docs.npy"] = self._temporary("docs.npy").open("wb")
        self._files["docs.npy"].write(offsets.getbuffer())
        self._digests["docs.npy"] = hashlib.sha256(offsets.getbuffer())
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            size_bytes = file.tell()
            file.close()
            if kind == "mask.bin" and not self._any_mask:
                self._temporary(kind).unlink()
                continue
            name = f"{self._stem}.{kind}"
            self._temporary(kind).replace(self._folder / name)
            facts["files"][name] = {"bytes": size_bytes, "sha256": self._digests[kind].hexdigest()}
        self._files = {}
        return facts

    def discard(self) -> None:
        """Leave nothing of a shard that was not closed."""
        for kind, file in self._files.items():
            file.close()
            self._temporary(kind).unlink(missing_ok=True)
        self._files = {}

    def _temporary(self, kind: str) -> Path:
        return self._folder / f"{self._stem}.{kind}.tmp"


def _shards(name: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards of an index entry; a version 1 source is one shard without a suffix."""
    found = facts.get("shards")
    if found is None:
        return [{"tokens": facts["tokens"], "documents": facts["documents"], "tokens_file": f"{name}.bin"}]
    return [
        shard | {"tokens_file": next(f for f in shard["files"] if _is_tokens(f))} for shard in found if shard["files"]
    ]


def _is_tokens(file: str) -> bool:
    return file.endswith(".bin") and not file.endswith(".mask.bin")


def _map_source(folder: Path, name: str, facts: dict[str, Any]) -> Source:
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    documents, total, any_mask = [np.zeros(1, dtype=np.int64)], 0, False
    dtype = np.dtype(facts.get("dtype", "uint16"))
    try:
        for shard in _shards(name, facts):
            stem = shard["tokens_file"].removesuffix(".bin")
            for file, known in shard.get("files", {}).items():
                if (folder / file).stat().st_size != known["bytes"]:
                    raise ValueError
            ids = np.memmap(folder / f"{stem}.bin", dtype=dtype, mode="r")
            offsets = np.load(folder / f"{stem}.docs.npy")
            has_mask = (folder / f"{stem}.mask.bin").exists()
            # A shard of a chat source that holds only texts has no mask file: nothing in it counts.
            mask = np.memmap(folder / f"{stem}.mask.bin", dtype=np.uint8, mode="r") if has_mask else None
            if len(ids) != shard["tokens"] or offsets[-1] != len(ids) or len(offsets) != shard["documents"] + 1:
                raise ValueError
            tokens.append(ids)
            masks.append(np.broadcast_to(np.uint8(0), len(ids)) if mask is None else mask)
            documents.append(offsets[1:] + total)
            total += len(ids)
            any_mask = any_mask or has_mask
    except (OSError, ValueError, IndexError, KeyError, StopIteration):
        raise InputError(f"{folder}: source {name} does not match index.json; prepare it again") from None
    kind = facts.get("kind") or ("chat" if facts.get("chat") else "text")
    mask_of_all = _join(masks) if any_mask else None
    return Source(name, _join(tokens), np.concatenate(documents), mask_of_all, kind)


def _join(parts: list[np.ndarray]) -> np.ndarray | Concatenated:
    return parts[0] if len(parts) == 1 else Concatenated(parts)
