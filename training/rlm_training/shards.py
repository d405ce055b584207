"""Tokenized corpora on disk: one memory-mapped shard per source, with document offsets and loss masks.

A prepared folder holds index.json and, per source, NAME.bin (uint16 tokens, every document ended by end-of-text),
NAME.docs.npy (int64 offsets of the documents' starts, plus the end) and, for conversations, NAME.mask.bin
(uint8, 1 where the token is part of a reply and counts in the SFT loss).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.config import ChatFormat
from rlm_engine.errors import InputError
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer
from rlm_training.corpus import Document, find_files, read_documents, source_names

# 90M's published chat format, with the end of text right after the reply, so that every turn ends by itself.
CHAT_TOKENS = ("<|user|>", "<|assistant|>")
CHAT_FORMAT = ChatFormat(
    prefix={"user": "<|user|>\n", "assistant": "<|assistant|>\n"},
    suffix={"user": "\n", "assistant": "<|endoftext|>"},
    stop=("<|endoftext|>", "<|user|>"),
)


@dataclass(frozen=True)
class Source:
    """One source of a prepared folder, memory-mapped."""

    name: str
    tokens: np.ndarray  # uint16 [tokens]
    documents: np.ndarray  # int64 [documents + 1]
    mask: np.ndarray | None  # uint8 [tokens], conversations only


def prepare(paths: list[Path], target: Path, workers: int = 1, progress: bool = False) -> dict[str, Any]:
    """Tokenize files into `target` and return the index. Sources that are already there and complete are kept.

    Raises InputError for unreadable input. A source is complete once it stands in index.json, which is rewritten
    atomically after each, so that an interrupted run continues.
    """
    target.mkdir(parents=True, exist_ok=True)
    index = _read_index(target) if (target / "index.json").exists() else _new_index()
    for name, path in source_names(find_files(paths)).items():
        if name in index["sources"]:
            continue
        documents: Iterable[Document] = read_documents(path)
        if progress:
            from tqdm import tqdm

            documents = tqdm(documents, desc=name, unit=" docs")
        index["sources"][name] = _write_source(name, documents, target, workers)
        temporary = target / "index.json.tmp"
        temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target / "index.json")
    return index


def load_sources(folder: Path) -> dict[str, Source]:
    """Map every source of a prepared folder. Raises InputError when the folder is missing or damaged."""
    index = _read_index(folder)
    sources = {}
    for name, facts in index["sources"].items():
        tokens = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
        documents = np.load(folder / f"{name}.docs.npy")
        if len(tokens) != facts["tokens"] or documents[-1] != len(tokens):
            raise InputError(f"{folder}: source {name} does not match index.json; prepare it again")
        mask_file = folder / f"{name}.mask.bin"
        mask = np.memmap(mask_file, dtype=np.uint8, mode="r") if mask_file.exists() else None
        sources[name] = Source(name, tokens, documents, mask)
    return sources


def _new_index() -> dict[str, Any]:
    return {"tokenizer": "gpt2", "added_tokens": list(CHAT_TOKENS), "sources": {}}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        return index if isinstance(index["sources"], dict) else _new_index()
    except FileNotFoundError:
        raise InputError(f"{folder}: no index.json here; run `rlm-train prepare` first") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder}/index.json is damaged; delete the folder and prepare it again") from None


def _write_source(name: str, documents: Iterable[Document], target: Path, workers: int) -> dict[str, Any]:
    starts, total, digest, any_mask = [0], 0, hashlib.sha256(), False
    with (target / f"{name}.bin").open("wb") as tokens_file, (target / f"{name}.mask.bin").open("wb") as mask_file:
        for ids, mask in _encode_all(documents, workers):
            data = ids.tobytes()
            digest.update(data)
            tokens_file.write(data)
            mask_file.write(mask.tobytes())
            any_mask = any_mask or bool(mask.any())
            total += len(ids)
            starts.append(total)
    if not any_mask:
        (target / f"{name}.mask.bin").unlink()
    if not total:
        raise InputError(f"source {name} holds no document")
    np.save(target / f"{name}.docs.npy", np.asarray(starts, dtype=np.int64))
    return {"documents": len(starts) - 1, "tokens": total, "sha256": digest.hexdigest(), "chat": any_mask}


def _encode_all(documents: Iterable[Document], workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if workers <= 1:
        _start_worker()
        yield from map(_encode, documents)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        yield from pool.map(_encode, documents, chunksize=64)


_tokenizer: Gpt2Tokenizer | None = None


def _start_worker() -> None:
    global _tokenizer
    _tokenizer = Gpt2Tokenizer(added_tokens=CHAT_TOKENS)


def _encode(document: Document) -> tuple[np.ndarray, np.ndarray]:
    assert _tokenizer is not None
    end = _tokenizer.special["<|endoftext|>"]
    if document.messages:
        ids, mask = encode_chat_with_mask(document.messages, _tokenizer, CHAT_FORMAT)
    else:
        ids = _tokenizer.encode(document.text)
        mask = [False] * len(ids)
    if not ids or ids[-1] != end:
        ids, mask = [*ids, end], [*mask, False]
    return np.asarray(ids, dtype=np.uint16), np.asarray(mask, dtype=np.uint8)
