"""The part of `prepare` that needs no order, on all cores: parse, clean, judge, hash, tokenize, chunk by chunk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from rlm_engine.errors import EngineError, InputError
from rlm_training.contamination import Contamination
from rlm_training.corpus import parse_record
from rlm_training.duplicates import digest, is_held_out, signature
from rlm_training.encoding import Encoder, Encoding
from rlm_training.filters import Rule, clean_document, judge, preset
from rlm_training.readers import Raw

_CHUNK_RECORDS, _CHUNK_BYTES = 256, 2**18
_AHEAD = 3  # chunks waiting for each process: enough to keep it busy, little enough to fit memory


@dataclass(frozen=True)
class Settings:
    """What every worker process is told once."""

    encoding: Encoding
    contamination: Contamination = field(default_factory=Contamination)
    near_duplicates: bool = False
    heldout: float = 0.0
    text_key: str = "text"


@dataclass(frozen=True)
class Judged:
    """One record after the work: why it goes (then nothing more), or its ids and hashes."""

    number: int
    characters: int
    reason: str = ""  # "filtered: ...", "contaminated"
    kind: str = "text"
    digest: bytes = b""
    signature: np.ndarray | None = None  # uint32 [128]
    held_out: bool = False
    encoded: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # ids, mask; two of each for a preference pair

    @property
    def tokens(self) -> int:
        """Of all its parts."""
        return sum(len(ids) for ids, _ in self.encoded)


@dataclass(frozen=True)
class Chunk:
    """Records of one source, with the names of its filter presets. ``source``: as errors name it."""

    source: str
    filters: str
    records: list[tuple[int, Raw]]


def chunks(source: str, filters: str, records: Iterable[tuple[int, Raw]]) -> Iterator[Chunk]:
    """Records in chunks of bounded number and size."""
    held: list[tuple[int, Raw]] = []
    size = 0
    for number, raw in records:
        held.append((number, raw))
        size += len(raw) if isinstance(raw, bytes | str) else sum(len(str(v)) for v in raw.values())
        if len(held) >= _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield Chunk(source, filters, held)
            held, size = [], 0
    if held:
        yield Chunk(source, filters, held)


class Workers:
    """Processes that judge chunks; results come in the order of the chunks. With one, the work is done right here.

    A context manager: at the end, also an abrupt one, the processes are gone.
    """

    def __init__(self, count: int, settings: Settings):
        self._count, self._settings = count, settings
        self._pool: ProcessPoolExecutor | None = None
        self._judge: Judge | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def judged(self, work: Iterator[Chunk]) -> Iterator[list[Judged]]:
        """The results of each chunk. InputError for unreadable records, EngineError when a process dies."""
        if self._count <= 1:
            self._judge = self._judge or Judge(self._settings)
            yield from map(self._judge.chunk, work)
            return
        if self._pool is None:
            # Fresh processes: forking a program with threads (progress bar, tokenizers) can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, _start, (self._settings,))
        waiting: deque[Future[list[Judged]]] = deque()
        try:
            for chunk in work:
                waiting.append(self._pool.submit(_run, chunk))
                if len(waiting) >= _AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise EngineError(
                "a worker process died, perhaps for lack of memory; run again to continue, with fewer --workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


class Judge:
    """Does the work on a chunk."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._encoder = Encoder(settings.encoding)

    def chunk(self, chunk: Chunk) -> list[Judged]:
        """One result per record, in order; InputError names the source and the record that cannot be read."""
        rules = preset(chunk.filters).rules
        return [self._record(number, raw, chunk.source, rules) for number, raw in chunk.records]

    def _record(self, number: int, raw: Raw, source: str, rules: tuple[Rule, ...]) -> Judged:
        settings = self._settings
        where = f"{source}, {'line' if isinstance(raw, bytes) else 'record'} {number}"
        document = clean_document(parse_record(raw, where, settings.text_key))
        content = document.content()
        reason = judge(document, rules)
        if reason is not None:
            return Judged(number, len(content), f"filtered: {reason}")
        if settings.contamination.touches(content):
            return Judged(number, len(content), "contaminated")
        try:
            encoded = tuple(self._encoder.encode(document))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return Judged(
            number,
            len(content),
            kind=document.kind,
            digest=digest(document),
            signature=signature(content) if settings.near_duplicates else None,
            held_out=bool(settings.heldout) and is_held_out(document, settings.heldout),
            encoded=encoded,
        )


_worker: Judge | None = None


def _start(settings: Settings) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; only the parent decides what then happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent killed by force cannot end its workers, and their queue never closes: watch it.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = Judge(settings)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(chunk: Chunk) -> list[Judged]:
    assert _worker is not None
    return _worker.chunk(chunk)
