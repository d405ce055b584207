"""DPO data: pairs of a chosen and a rejected reply to one prompt, read batch by batch.

How the DPO stage uses it:

    sources = load_preferences(Path("runs/pairs"))          # made by `rlm-train prepare` from prompt/chosen/rejected
    pairs = PreferenceBatches(sources, sequence=512, rows=8, seed=1, max_length_ratio=1.5)
    for step in range(2 * pairs.steps):                      # two epochs; a batch is a function of (seed, step)
        batch = pairs.batch(step)
        batch.chosen.inputs, batch.chosen.targets            # int64 [rows, sequence], padded on the right with 0
        batch.chosen.weights                                 # float32: 1 on targets of the reply and its end of turn
        batch.chosen.documents                               # int64: 0 on tokens, -1 on padding (the attention mask)
        batch.rejected                                       # the same four; row r answers the same prompt
        batch.pairs                                          # int64 [rows]: numbers of the pairs in 0..pairs.count-1

log p(reply | prompt) of a row is the sum over its targets of weight * log-probability, and its length in tokens, for
length normalisation, is weights.sum(). Earlier replies inside the prompt do not count. `pairs.reply_tokens` has
both lengths of every pair; `batch.pairs` addresses reference log-probabilities computed once beforehand:
`pairs.rows_of(numbers)` gives the batch of any pairs in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlm_engine.errors import InputError, UsageError
from rlm_training.shards import Source, map_sources
from rlm_training.stream import Batch


def load_preferences(folder: Path) -> list[Source]:
    """The preference sources of a prepared folder; InputError when there are none or the folder is damaged."""
    found = [source for source in map_sources(folder) if source.kind == "preference"]
    if not found:
        raise InputError(f"{folder}: no preference pairs here; prepare JSON lines with prompt, chosen and rejected")
    return found


@dataclass(frozen=True)
class PreferenceBatch:
    """Row r of both halves is pair ``pairs[r]``."""

    chosen: Batch
    rejected: Batch
    pairs: np.ndarray  # int64 [rows]


class PreferenceBatches:
    """Every pair once an epoch, in an order of the epoch's own; the last pairs that fill no batch are left out.

    Left out, too, are pairs longer than a row (a cut reply would teach to end badly) and, with ``max_length_ratio``
    (say 1.5), pairs where one reply has more than that many times the other's tokens: DPO learns length from them.
    ``pad_to``: rows are padded to the batch's longest pair, rounded up to a multiple of it (0: always to ``sequence``,
    which torch.compile likes).
    """

    def __init__(
        self,
        sources: list[Source],
        sequence: int,
        rows: int,
        seed: int,
        max_length_ratio: float = 0.0,
        pad_to: int = 0,
    ):
        """Raises UsageError when not even one batch is left."""
        self._sources, self.sequence, self.rows, self._seed, self._pad_to = sources, sequence, rows, seed, pad_to
        found, lengths, total = [], [], 0
        for number, source in enumerate(sources):
            sizes = np.diff(source.documents).reshape(-1, 2)  # [pairs, 2]: chosen, rejected
            replies = _reply_tokens(source).reshape(-1, 2)
            good = (sizes <= sequence + 1).all(axis=1) & (replies > 0).all(axis=1)
            if max_length_ratio:
                good &= replies.max(axis=1) <= max_length_ratio * replies.min(axis=1)
            kept = np.flatnonzero(good)
            found.append(np.column_stack((np.full(len(kept), number), kept)))
            lengths.append(replies[kept])
            total += len(sizes)
        self._pairs = np.concatenate(found)  # int64 [pairs, 2]: source, pair within it
        self.reply_tokens = np.concatenate(lengths)  # int64 [pairs, 2]: chosen, rejected
        self.count = len(self._pairs)
        self.left_out = total - self.count
        self.steps = self.count // rows
        if not self.steps:
            raise UsageError(
                f"{self.count} of {total} preference pairs can be used, fewer than the {rows} rows of a batch; "
                "lower train.rows, or raise train.sequence"
            )

    def batch(self, step: int) -> PreferenceBatch:
        """The step-th batch, for any step >= 0; an epoch has `steps` of them."""
        epoch, within = divmod(step, self.steps)
        order = np.random.default_rng([self._seed, 3, epoch]).permutation(self.count)
        return self.rows_of(order[within * self.rows : (within + 1) * self.rows])

    def rows_of(self, numbers: np.ndarray) -> PreferenceBatch:
        """The batch of these pairs (0 <= number < `count`), a row each."""
        spans = []
        for source, pair in self._pairs[numbers]:
            bounds = self._sources[source].documents[2 * pair : 2 * pair + 3]
            spans.append((self._sources[source], int(bounds[0]), int(bounds[1]), int(bounds[2])))
        width = self.sequence
        if self._pad_to:
            longest = max(max(middle - start, stop - middle) for _, start, middle, stop in spans) - 1
            width = min(width, -(-longest // self._pad_to) * self._pad_to)
        chosen = _rows([(source, start, middle) for source, start, middle, _ in spans], width)
        rejected = _rows([(source, middle, stop) for source, _, middle, stop in spans], width)
        return PreferenceBatch(chosen, rejected, np.asarray(numbers, dtype=np.int64))


def _reply_tokens(source: Source) -> np.ndarray:
    """How many tokens count in each document, int64 [documents]."""
    assert source.mask is not None, "prepare writes a mask for preference pairs"
    counted = np.concatenate(([0], np.cumsum(np.asarray(source.mask), dtype=np.int64)))
    return counted[source.documents[1:]] - counted[source.documents[:-1]]


def _rows(spans: list[tuple[Source, int, int]], width: int) -> Batch:
    ids = np.zeros((len(spans), width + 1), dtype=np.int64)
    weights = np.zeros((len(spans), width + 1), dtype=np.float32)
    documents = np.full((len(spans), width + 1), -1, dtype=np.int64)
    for row, (source, start, stop) in enumerate(spans):
        assert source.mask is not None
        ids[row, : stop - start] = source.tokens[start:stop]
        weights[row, : stop - start] = source.mask[start:stop]
        documents[row, : stop - start] = 0
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], documents[:, :-1])
