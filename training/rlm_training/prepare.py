"""Corpus files to shards: read, clean, filter, remove duplicates, split off held-out documents, tokenize.

Everything is a function of the inputs, their order and the options: bytes are the same with any number of processes,
and after any interruption. The unit of work that is kept is a part: one shard of a source, with the held-out
documents among it and the hashes that later documents are compared with. Parts stand in index.json once all their
files do; what was in progress is done again.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.errors import EngineError, InputError, UsageError
from rlm_training.contamination import Contamination
from rlm_training.corpus import Input, find_inputs
from rlm_training.data_report import write_report
from rlm_training.duplicates import NearDuplicates
from rlm_training.encoding import Encoding, choose_encoding
from rlm_training.filters import preset
from rlm_training.progress import SourceProgress
from rlm_training.readers import RecordReader
from rlm_training.shards import VERSION, ShardWriter, read_index, token_dtype, write_json
from rlm_training.workers import Judged, Settings, Workers, chunks

SHARD_TOKENS = 2**26
_SMALL_BYTES = 4 * 2**20  # less input than this is done before worker processes have started


@dataclass(frozen=True)
class PrepareOptions:
    """What decides about the bytes.

    ``filters``, ``max_documents``, ``max_tokens`` are (pattern of source names, value), of which the last that fits
    counts; limits keep a source's first documents, 0 is no limit. ``near_duplicates``: Jaccard similarity of 5-word
    shingles from which on a document is dropped, 0 for never. ``heldout``: share of the documents, by their hash,
    that go to OUT/heldout. ``decontaminate``: evaluation files. ``shard_tokens``: shards are closed before they
    exceed this.
    """

    filters: tuple[tuple[str, str], ...] = ()
    deduplicate: bool = True
    near_duplicates: float = 0.0
    decontaminate: tuple[Path, ...] = ()
    heldout: float = 0.0
    max_documents: tuple[tuple[str, int], ...] = ()
    max_tokens: tuple[tuple[str, int], ...] = ()
    tokenizer: Path | None = None
    chat_format: str = ""
    text_key: str = "text"
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.near_duplicates <= 1:
            raise UsageError(f"near-duplicates: a similarity from 0 (off) to 1, got {self.near_duplicates}")
        if not 0 <= self.heldout < 1:
            raise UsageError(f"heldout: a share of the documents below 1, got {self.heldout}")
        if self.shard_tokens < 1 or any(n < 0 for _, n in (*self.max_documents, *self.max_tokens)):
            raise UsageError("shard-tokens must be positive and limits must not be negative")
        for _, names in self.filters:
            preset(names)


def prepare(
    paths: list[str] | list[Path],
    target: Path,
    options: PrepareOptions | None = None,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Prepare files, folders, patterns and hub datasets into ``target``; returns the index, and writes report.json.

    Sources that are complete are kept, so that files can be added and an interrupted run be finished by the same call.
    ``workers``: processes, 0 for all cores. Raises InputError for unreadable input, UsageError when the folder was
    prepared with other options or from another file of that name.
    """
    options = options or PrepareOptions()
    inputs = find_inputs([str(path) for path in paths])
    encoding = choose_encoding(options.tokenizer, options.chat_format)
    contamination = Contamination.from_files(list(options.decontaminate))
    target.mkdir(parents=True, exist_ok=True)
    index = _open_index(target, encoding, _common(options, contamination))
    _check_sources(index, inputs, options, target)
    settings = Settings(encoding, contamination, bool(options.near_duplicates), options.heldout, options.text_key)
    if not workers:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sum(RecordReader(i).size_bytes if i.path else _SMALL_BYTES for i in inputs.values()) < _SMALL_BYTES:
        workers = 1
    try:
        seen = _Seen(options, target, index)
        with Workers(workers, settings) as pool:
            # A source that was interrupted goes first: the documents kept from it are known to the others.
            for name in sorted(inputs, key=lambda n: n not in index["unfinished"]):
                if name not in index["sources"]:
                    _Preparation(name, inputs[name], target, index, options, seen).run(pool, progress)
    except OSError as error:
        raise EngineError(
            f"{target}: cannot be written ({error.strerror or error}); finished parts are kept, run again to continue"
        ) from None
    write_report(target, index)
    if not any(facts["documents"] for facts in index["sources"].values()):
        raise InputError(f"no document was left to train on; {target / 'report.json'} says why")
    return index


@dataclass
class _Tally:
    """Documents, characters and tokens by outcome, for the data report; filtered documents have no tokens."""

    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, outcome: str, record: Judged) -> None:
        count = self.counts.setdefault(outcome, [0, 0, 0])
        for i, value in enumerate((1, record.characters, record.tokens)):
            count[i] += value

    def of(self, outcome: str) -> list[int]:
        return self.counts.get(outcome, [0, 0, 0])

    def copy(self) -> dict[str, list[int]]:
        return {outcome: list(count) for outcome, count in sorted(self.counts.items())}


class _Seen:
    """All documents kept or held out so far, in any source."""

    def __init__(self, options: PrepareOptions, target: Path, index: dict[str, Any]):
        self._digests: set[bytes] = set()
        self._near = NearDuplicates(options.near_duplicates) if options.near_duplicates else None
        for facts in (*index["sources"].values(), *index["unfinished"].values()):
            for shard in facts["shards"]:
                self._load(target, list(shard["hashes"]))

    def outcome(self, record: Judged, distinct: bool) -> str:
        """ "duplicate", "near-duplicate" or ""."""
        if distinct and record.digest in self._digests:
            return "duplicate"
        if self._near is not None and record.signature in self._near:
            return "near-duplicate"
        return ""

    def add(self, record: Judged) -> None:
        self._digests.add(record.digest)
        if self._near is not None:
            assert record.signature is not None
            self._near.add(record.signature)

    def _load(self, target: Path, files: list[str]) -> None:
        for file in files:
            try:
                known = np.load(target / file)
            except (OSError, ValueError):
                raise InputError(f"{target / file}: missing or damaged; prepare the folder again") from None
            if file.endswith(".digests.npy"):
                self._digests.update(row.tobytes() for row in known)
            elif self._near is not None:
                for signature in known:
                    self._near.add(signature)


class _Preparation:
    """One source on its way to shards."""

    def __init__(
        self, name: str, source: Input, target: Path, index: dict[str, Any], options: PrepareOptions, seen: _Seen
    ):
        self._name, self._source, self._target, self._index, self._seen = name, source, target, index, seen
        self._options = options
        own = _own(name, source, options)
        rules = preset(own["filters"])
        self._filters = own["filters"]
        self._distinct = options.deduplicate or rules.distinct
        limits = [n for n in (own["max_documents"], rules.most) if n]
        self._max_documents = min(limits) if limits else 0
        self._max_tokens = own["max_tokens"]
        self._dtype = token_dtype(index["vocab_size"])
        empty: dict[str, Any] = {"kind": "", "dtype": np.dtype(self._dtype).name, "documents": 0, "tokens": 0}
        start = empty | own | {"shards": [], "heldout": [], "counts": {}, "consumed": 0}
        self._facts: dict[str, Any] = index["unfinished"].get(name, start)
        self._tally = _Tally({k: list(v) for k, v in self._facts["counts"].items()})
        self._consumed = self._facts["consumed"]
        self._open_part()

    def run(self, pool: Workers, progress: bool) -> None:
        reader = RecordReader(self._source)
        work = chunks(str(self._source), self._filters, reader.records(self._consumed))
        try:
            with SourceProgress(self._name, reader, progress) as bar:
                for results in pool.judged(work):
                    if not self._take(results):
                        break
                    bar.update(len(results), sum(r.tokens for r in results))
            self._close_part(last=True)
        finally:
            self._writer.discard()
            self._heldout.discard()

    def _take(self, results: list[Judged]) -> bool:
        for record in results:
            if self._full():
                return False
            outcome = record.reason or self._seen.outcome(record, self._distinct)
            if not outcome:
                outcome = "held out" if record.held_out else "kept"
                self._keep(record)
            self._tally.add(outcome, record)
            self._consumed = record.number
        return not self._full()

    def _full(self) -> bool:
        documents, _, tokens = self._tally.of("kept")
        return bool(self._max_documents and documents >= self._max_documents) or bool(
            self._max_tokens and tokens >= self._max_tokens
        )

    def _keep(self, record: Judged) -> None:
        kind = self._facts["kind"]
        if kind and "preference" in (kind, record.kind) and kind != record.kind:
            raise InputError(f"{self._source}: preference pairs and other records in one file; separate them")
        self._facts["kind"] = record.kind if not kind or record.kind == "chat" else kind
        writer = self._heldout if record.held_out else self._writer
        if writer.tokens and writer.tokens + record.tokens > self._options.shard_tokens:
            self._close_part()
            writer = self._heldout if record.held_out else self._writer
        for ids, mask in record.encoded:
            writer.add(ids, mask)
        self._seen.add(record)
        self._digests.append(record.digest)
        if record.signature is not None:
            self._signatures.append(record.signature)

    def _open_part(self) -> None:
        stem = f"{self._name}-{len(self._facts['shards']):05}"
        self._writer = ShardWriter(self._target, stem, self._dtype)
        self._heldout = ShardWriter(self._target / "heldout", stem, self._dtype)
        self._digests: list[bytes] = []
        self._signatures: list[np.ndarray] = []

    def _close_part(self, last: bool = False) -> None:
        facts = self._facts
        facts["kind"] = facts["kind"] or ("text" if last else "")
        if self._digests:
            hashes = self._write_hashes()
            facts["shards"].append(self._writer.close() | {"hashes": hashes})
            facts["heldout"].append(self._heldout.close())
        facts["counts"], facts["consumed"] = self._tally.copy(), self._consumed
        for key in ("documents", "tokens"):
            facts[key] = sum(shard[key] for shard in facts["shards"])
        self._index["unfinished"].pop(self._name, None)
        self._index["sources" if last else "unfinished"][self._name] = facts
        _write_index(self._target, self._index)
        if not last:
            self._open_part()

    def _write_hashes(self) -> list[str]:
        folder = self._target / "hashes"
        folder.mkdir(exist_ok=True)
        digests = np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, 16)
        arrays = {"digests": digests} | ({"minhash": np.stack(self._signatures)} if self._signatures else {})
        files = []
        for kind, array in arrays.items():
            path = folder / f"{self._name}-{len(self._facts['shards']):05}.{kind}.npy"
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("wb") as file:
                np.save(file, array)
            temporary.replace(path)
            files.append(f"hashes/{path.name}")
        return files


def _common(options: PrepareOptions, contamination: Contamination) -> dict[str, Any]:
    """The options that hold for a whole folder, as index.json has them."""
    return {
        "deduplicate": options.deduplicate,
        "near-duplicates": options.near_duplicates,
        "decontaminate": contamination.fingerprint(),
        "heldout": options.heldout,
        "text-key": options.text_key,
        "shard-tokens": options.shard_tokens,
    }


def _own(name: str, source: Input, options: PrepareOptions) -> dict[str, Any]:
    """The options that hold for one source."""
    return {
        "input": source.fingerprint(),
        "filters": _last_fitting(name, options.filters, "default"),
        "max_documents": _last_fitting(name, options.max_documents, 0),
        "max_tokens": _last_fitting(name, options.max_tokens, 0),
    }


def _last_fitting(name: str, choices: tuple[tuple[str, Any], ...], otherwise: Any) -> Any:
    return next((value for pattern, value in reversed(choices) if fnmatch.fnmatchcase(name, pattern)), otherwise)


def _open_index(target: Path, encoding: Encoding, common: dict[str, Any]) -> dict[str, Any]:
    header = encoding.to_dict() | {"options": common}
    if not (target / "index.json").exists():
        encoding.copy_files(target)
        files = encoding.file_digests()
        return {"version": VERSION, **header, "tokenizer_files": files, "sources": {}, "unfinished": {}}
    index = read_index(target)
    if index.get("version") != VERSION:
        raise UsageError(f"{target} was prepared by an earlier version of rlm-train; choose another --out")
    for name in ("tokenizer", "added_tokens", "vocab_size", "end_of_text", "chat_format"):
        if index[name] != header[name]:
            raise UsageError(f"{target} was prepared with another {name.replace('_', ' ')}; choose another --out")
    if index["tokenizer_files"] != encoding.file_digests():
        raise UsageError(f"{target} was prepared with another tokenizer; choose another --out")
    for name, value in common.items():
        if index["options"].get(name) != value:
            was = f" ({index['options'].get(name)}, now {value})" if name != "decontaminate" else " files"
            raise UsageError(f"{target} was prepared with other --{name}{was}; use the same or choose another --out")
    return index


def _check_sources(index: dict[str, Any], inputs: dict[str, Input], options: PrepareOptions, target: Path) -> None:
    known = index["sources"] | index["unfinished"]
    for name in known.keys() & inputs.keys():
        for key, value in _own(name, inputs[name], options).items():
            was = known[name][key]
            if was == value:
                continue
            if key == "input":
                raise UsageError(f"{inputs[name]}: source {name!r} of {target} was made from another file or version")
            raise UsageError(
                f"{target}: source {name!r} was prepared with {key.replace('_', '-')} {was}, now {value}; "
                "use the same or choose another --out"
            )


def _write_index(target: Path, index: dict[str, Any]) -> None:
    """The held-out folder's index follows from the main one, which is written last: it alone says what is done."""
    heldout = {}
    for name, facts in index["sources"].items():
        shards = [shard for shard in facts["heldout"] if shard["documents"]]
        if shards:
            sums = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
            heldout[name] = {"kind": facts["kind"], "dtype": facts["dtype"], **sums, "shards": shards}
    if heldout:
        for file in index["tokenizer_files"]:
            if not (target / "heldout" / file).exists():
                shutil.copyfile(target / file, target / "heldout" / file)
        write_json(target / "heldout" / "index.json", index | {"sources": heldout, "unfinished": {}})
    write_json(target / "index.json", index)
