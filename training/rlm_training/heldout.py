"""Held-out text as passages to score: one domain per file, documents cut into windows of the model's context.

Every document starts afresh with the start token in front (not predicted), and so does every further window of a
long document: windows do not overlap and know nothing of each other. Each of the document's tokens is predicted
exactly once; the end-of-text after a plain text is not, since excerpts end anywhere. Conversations are put in the
model's own chat format and all their tokens count, role markers and ends of turn included; bytes are those of the
contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.config import ChatFormat
from rlm_engine.errors import InputError
from rlm_engine.generate import Model
from rlm_engine.tokenizer import Tokenizer
from rlm_training.corpus import Document, Input, find_inputs, parse_record
from rlm_training.readers import RecordReader
from rlm_training.scoring import Passage, start_token
from rlm_training.shards import Source, load_sources, read_index


@dataclass(frozen=True)
class HeldoutDocument:
    """ids int64 [n]; ``size_bytes``: UTF-8 bytes of its text; ``reply``: bool [n], what an assistant wrote."""

    ids: np.ndarray
    size_bytes: int
    reply: np.ndarray | None = None


@dataclass(frozen=True)
class Domain:
    """One source of held-out documents."""

    name: str
    documents: list[HeldoutDocument]


@dataclass(frozen=True)
class Window:
    """A piece of a document. ``size_bytes``: its share of the document's bytes."""

    document: int
    passage: Passage
    size_bytes: float
    reply: np.ndarray | None = None


@dataclass
class Heldout:
    """The domains that were read, and which files were left out and why."""

    domains: list[Domain] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def read_heldout(paths: Sequence[Path], model: Model) -> Heldout:
    """Domains of raw files (.txt, .jsonl, .zst, .parquet), folders of them, or folders made by `rlm-train prepare`.

    Conversations are left out (and reported) when the model has no chat format. Raises InputError when a path is
    missing, unreadable, or was prepared for another tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(f"model {model.name!r} has no tokenizer, so no text can be evaluated")
    found = Heldout()
    raw: list[Path] = []
    for path in paths:
        if (path / "index.json").is_file():
            for name, shard in _prepared(path, model).items():
                _keep(found, name, _from_source(shard, model))
        else:
            raw.append(path)
    if raw:
        for name, source in find_inputs([str(path) for path in raw]).items():
            documents, reason = _encoded(_documents(source), model.tokenizer, model.config.chat_format)
            _keep(found, name, documents, reason)
    if not found.domains:
        raise InputError(
            "no held-out document can be used: " + "; ".join(f"{n}: {r}" for n, r in found.skipped.items())
        )
    return found


def windows_of(domain: Domain, model: Model, max_tokens: int = 0, seed: int = 0) -> list[Window]:
    """The domain's windows; with ``max_tokens`` a seeded random choice of about so many tokens, at least one window.

    The choice is over windows, not documents, so beginnings of documents are not favoured.
    """
    start, size = start_token(model), model.config.context_length
    windows = []
    for number, document in enumerate(domain.documents):
        for begin in range(0, len(document.ids), size):
            targets = document.ids[begin : begin + size]
            inputs = np.concatenate(([start], targets[:-1]))
            share = document.size_bytes * len(targets) / len(document.ids)
            reply = None if document.reply is None else document.reply[begin : begin + size]
            windows.append(Window(number, Passage(inputs, targets), share, reply))
    if not max_tokens or sum(len(w.passage) for w in windows) <= max_tokens:
        return windows
    chosen: list[int] = []
    tokens = 0
    for i in np.random.default_rng(seed).permutation(len(windows)):
        if chosen and tokens + len(windows[i].passage) > max_tokens:
            continue
        chosen.append(int(i))
        tokens += len(windows[i].passage)
    return [windows[i] for i in sorted(chosen)]


def _keep(found: Heldout, name: str, documents: list[HeldoutDocument], reason: str = "") -> None:
    documents = [d for d in documents if len(d.ids)]
    if any(domain.name == name for domain in found.domains):
        raise InputError(f"two held-out sources are called {name!r}; rename one of the files")
    if documents:
        found.domains.append(Domain(name, documents))
    else:
        found.skipped[name] = reason or "it holds no document"


def _documents(source: Input) -> Iterator[tuple[str, Document]]:
    for number, raw in RecordReader(source).records():
        where = f"{source}, record {number}"
        yield where, parse_record(raw, where)


def _encoded(
    documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer, chat_format: ChatFormat | None
) -> tuple[list[HeldoutDocument], str]:
    kept, reason = [], ""
    for where, document in documents:
        if document.kind == "text":
            ids = np.asarray(tokenizer.encode(document.text), dtype=np.int64)
            kept.append(HeldoutDocument(ids, len(document.text.encode())))
        elif chat_format is None:
            reason = "conversations, and the model has no chat format"
        else:
            messages = list(document.messages)
            if document.kind == "preference":  # a preference pair: its preferred conversation
                messages.append({"role": "assistant", "content": document.chosen})
            try:
                encoded, mask = encode_chat_with_mask(messages, tokenizer, chat_format)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            size = sum(len(message["content"].encode()) for message in messages)
            kept.append(HeldoutDocument(np.asarray(encoded, dtype=np.int64), size, np.asarray(mask)))
    return kept, reason


def _prepared(folder: Path, model: Model) -> dict[str, Source]:
    index = read_index(folder)
    config = model.config
    if index.get("tokenizer") != config.tokenizer or list(index.get("added_tokens", [])) != list(config.added_tokens):
        raise InputError(
            f"{folder} was prepared with tokenizer {index.get('tokenizer')!r} and added tokens "
            f"{index.get('added_tokens')}, the model has {config.tokenizer!r} and {list(config.added_tokens)}"
        )
    return load_sources(folder)


def _from_source(source: Source, model: Model) -> list[HeldoutDocument]:
    """Documents of a shard; the bytes are those of the tokens, special ones counting for none."""
    assert model.tokenizer is not None
    special = set(model.tokenizer.special.values())
    length = np.zeros(model.config.vocab_size, dtype=np.int64)
    for token in np.unique(np.asarray(source.tokens)).tolist():
        length[token] = 0 if token in special else len(model.tokenizer.token_bytes(token))
    documents = []
    for begin, end in zip(source.documents[:-1].tolist(), source.documents[1:].tolist(), strict=True):
        ids = np.asarray(source.tokens[begin:end], dtype=np.int64)
        mask = None if source.mask is None else np.asarray(source.mask[begin:end], dtype=bool)
        if mask is not None and not mask.any():
            mask = None
        if mask is None and len(ids) and ids[-1] == model.config.eos_token_id:
            ids = ids[:-1]
        documents.append(HeldoutDocument(ids, int(length[ids].sum()), mask))
    return documents
