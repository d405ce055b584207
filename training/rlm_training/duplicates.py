"""Exact duplicates by a hash of the normalised text, near-duplicates by MinHash and banding."""

from __future__ import annotations

import hashlib
import zlib
from functools import cache

import numpy as np

from rlm_training.corpus import Document
from rlm_training.ngrams import gram_hashes, word_hashes

SHINGLE_WORDS = 5
PERMUTATIONS = 128
_CHUNK = 4096  # shingles hashed at once: 128 x 4096 x 8 bytes = 4 MiB


def normalised(text: str) -> str:
    """Lower case, runs of white space as one space."""
    return " ".join(text.lower().split())


def digest(document: Document) -> bytes:
    """16 bytes that are equal for documents that differ only in case and white space."""
    if document.kind == "text":
        parts = [normalised(document.text)]
    else:
        parts = [f"{m['role']}\0{normalised(m['content'])}" for m in document.messages]
        parts += [normalised(document.chosen), normalised(document.rejected)]
    return hashlib.blake2b("\1".join(parts).encode("utf-8", "replace"), digest_size=16).digest()


def is_held_out(document: Document, share: float) -> bool:
    """Whether the document belongs to the held-out part: a function of its text alone, whatever the order of files.

    A preference pair follows its prompt, so that no prompt is on both sides.
    """
    if document.kind == "preference":
        document = Document(messages=document.messages, kind="chat")
    draw = hashlib.blake2b(digest(document), digest_size=8, person=b"held out").digest()
    return int.from_bytes(draw, "big") < share * 2**64


@cache
def _multipliers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(20_240_229)
    odd = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd[:, None], rng.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64)[:, None]


def signature(text: str) -> np.ndarray:
    """MinHash (Broder 1997) of the set of 5-word shingles, uint32 [128].

    The share of equal entries of two signatures estimates the sets' Jaccard similarity, standard error <= 0.045.
    The permutations are multiply-shift hashes (Dietzfelbinger 1996) of 32-bit shingle hashes.
    """
    shingles = gram_hashes(word_hashes(text), SHINGLE_WORDS) >> np.uint64(32)
    if not len(shingles):  # no word at all: alike only when equal
        shingles = np.asarray([zlib.crc32(normalised(text).encode("utf-8", "replace"))], dtype=np.uint64)
    factors, offsets = _multipliers()
    smallest = np.full(PERMUTATIONS, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        hashed = factors * shingles[None, start : start + _CHUNK] + offsets
        smallest = np.minimum(smallest, hashed.min(axis=1))
    return (smallest >> np.uint64(32)).astype(np.uint32)


def bands_for(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows find pairs of similarity >= ``threshold`` (Leskovec et al. 2014, section 3.4).

    A pair of similarity s meets in a band with probability 1 - (1 - s^rows)^bands. Missing pairs above the threshold
    weighs 9 times as much as meeting below it: a meeting costs only one comparison of signatures.
    """
    s = np.linspace(0, 1, 1001)
    best, best_cost = (1, PERMUTATIONS), np.inf
    for rows in range(1, PERMUTATIONS + 1):
        bands = PERMUTATIONS // rows
        meets = 1 - (1 - s**rows) ** bands
        cost = 0.1 * meets[s < threshold].sum() + 0.9 * (1 - meets[s >= threshold]).sum()
        if cost < best_cost:
            best, best_cost = (bands, rows), cost
    return best


class NearDuplicates:
    """The documents kept so far, by signature. About 1.5 kB of memory each."""

    def __init__(self, threshold: float):
        """``threshold``: estimated Jaccard similarity from which on two documents count as the same, 0 < t <= 1."""
        self.threshold = threshold
        self._bands, self._rows = bands_for(threshold)
        self._signatures = np.empty((1024, PERMUTATIONS), dtype=np.uint32)
        self._count = 0
        self._first: dict[int, int] = {}  # band hash -> document; a second dictionary saves a list for each of them
        self._more: dict[int, list[int]] = {}

    def __contains__(self, signature: object) -> bool:
        assert isinstance(signature, np.ndarray)
        candidates: set[int] = set()
        for key in self._keys(signature):
            if key in self._first:
                candidates.add(self._first[key])
                candidates.update(self._more.get(key, ()))
        if not candidates:
            return False
        alike = (self._signatures[sorted(candidates)] == signature).mean(axis=1)
        return bool((alike >= self.threshold).any())

    def add(self, signature: np.ndarray) -> None:
        """Remember a document, uint32 [128]."""
        if self._count == len(self._signatures):
            self._signatures = np.concatenate((self._signatures, np.empty_like(self._signatures)))
        self._signatures[self._count] = signature
        for key in self._keys(signature):
            if self._first.setdefault(key, self._count) != self._count:
                self._more.setdefault(key, []).append(self._count)
        self._count += 1

    def _keys(self, signature: np.ndarray) -> list[int]:
        return [
            hash((band, signature[band * self._rows : (band + 1) * self._rows].tobytes()))
            for band in range(self._bands)
        ]
