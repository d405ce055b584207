"""Keeping evaluation texts out of training data: documents that share 13 words in a row with one are left out.

After Brown et al. 2020 (GPT-3, appendix C). Evaluation texts of 8 to 12 words are looked for as a whole; shorter ones
would be found everywhere and are ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlm_engine.errors import InputError
from rlm_training.corpus import Input
from rlm_training.ngrams import gram_hashes, grams_of_lengths, word_hashes
from rlm_training.readers import RecordReader

GRAM_WORDS = 13
SHORTEST_WORDS = 8
_LABELS = re.compile(r"\A\s*(?:Question|Q):|(?:Answer|A):\s*\Z")  # prompts' words, which training text need not have


@dataclass(frozen=True)
class Contamination:
    """The evaluation texts' runs of words: sorted uint64 hashes by length in words."""

    grams: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_files(cls, paths: list[Path]) -> Contamination:
        """Every text anywhere in the records of .jsonl(.zst), .txt and .parquet files; InputError for others."""
        found: dict[int, list[np.ndarray]] = {}
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: no such file to decontaminate against")
            for number, raw in RecordReader(Input(path=path)).records():
                try:
                    record = json.loads(raw) if isinstance(raw, bytes) else raw
                except (ValueError, RecursionError):
                    raise InputError(f"{path}, line {number}: not JSON") from None
                for text in _texts(record):
                    words = word_hashes(_LABELS.sub(" ", text))
                    if len(words) >= SHORTEST_WORDS:
                        length = min(GRAM_WORDS, len(words))
                        found.setdefault(length, []).append(gram_hashes(words, length))
        return cls({length: np.unique(np.concatenate(found[length])) for length in sorted(found)})

    def touches(self, text: str) -> bool:
        """Whether the text shares a run of words with an evaluation text."""
        if not self.grams:
            return False
        for length, grams in grams_of_lengths(word_hashes(text), self.grams).items():
            known = self.grams[length]
            places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            if bool((known[places] == grams).any()):
                return True
        return False

    def fingerprint(self) -> str:
        """Equal for equal evaluation texts; empty without any."""
        digest = hashlib.sha256()
        for known in self.grams.values():
            digest.update(known.tobytes())
        return digest.hexdigest() if self.grams else ""


def _texts(record: object) -> Iterator[str]:
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for value in record.values():
            yield from _texts(value)
    elif isinstance(record, list):
        for value in record:
            yield from _texts(value)
