"""Hashes of words and of runs of words, the same on every machine: for near-duplicates and decontamination."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing modulo 2**64


def word_hashes(text: str) -> np.ndarray:
    """uint64 [words]: a hash of every word; case and everything between words are ignored."""
    words = _WORD.findall(text.lower())
    return np.fromiter((zlib.crc32(w.encode("utf-8", "replace")) for w in words), dtype=np.uint64, count=len(words))


def gram_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """uint64 [words - length + 1]: a hash of every run of ``length`` words; a shorter text is one run."""
    length = min(length, len(words))
    return grams_of_lengths(words, [length])[length] if length else np.empty(0, dtype=np.uint64)


def grams_of_lengths(words: np.ndarray, lengths: Iterable[int]) -> dict[int, np.ndarray]:
    """For each length up to the number of words, uint64 [words - length + 1]: a hash of every run of so many words."""
    wanted = {n for n in lengths if 0 < n <= len(words)}
    found = {}
    total = np.zeros(len(words), dtype=np.uint64)
    for i in range(max(wanted, default=0)):  # a polynomial in _BASE modulo 2**64, so that order matters
        count = len(words) - i
        total = total[:count] * _BASE + words[i:] + np.uint64(1)
        if i + 1 in wanted:
            found[i + 1] = _mixed(total)
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's last step (Steele et al. 2014): every bit of a value reaches every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
