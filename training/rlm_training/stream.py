"""What a training step reads: a function of (seed, step), so that a run resumes anywhere to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlm_engine.errors import UsageError
from rlm_training.shards import Source

UNIT_TOKENS = 1024  # long documents are cut into units of this size, so that no row stays in one book for ever


@dataclass(frozen=True)
class Batch:
    """inputs, targets int64 [rows, tokens]; weights float32 [rows, tokens]: each target's share in the loss."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    documents: np.ndarray | None = None  # int64 [rows, tokens]: attention stays within equal numbers


class MixedStream:
    """Pretraining data: sources mixed by weight, one contiguous stream per batch row.

    Units (documents, or pieces of long ones) are drawn without replacement within each source's epoch until the
    source has its share of the tokens, then all are shuffled together and laid end to end. ``unit_tokens``: where long
    documents are cut; segment memory wants pieces several times its length.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float],
        tokens: int,
        rows: int,
        seed: int,
        unit_tokens: int = UNIT_TOKENS,
    ):
        missing = sorted(set(weights) - set(sources))
        if missing:
            raise UsageError(
                f"source {missing[0]!r} is not in the prepared data; it holds {', '.join(sorted(sources))}"
            )
        if not weights or any(w <= 0 for w in weights.values()):
            raise UsageError("every source needs a weight above 0")
        self._sources, self._unit_tokens = [sources[name] for name in weights], unit_tokens
        share = np.asarray(list(weights.values()), dtype=np.float64)
        share /= share.sum()
        units = [self._draw(number, int(np.ceil(part * tokens)), seed) for number, part in enumerate(share)]
        order = np.concatenate(units)
        np.random.default_rng([seed, 1]).shuffle(order, axis=0)
        self._units = order  # int64 [units, 3]: source, start, stop
        self._ends = np.cumsum(order[:, 2] - order[:, 1])
        self.rows = rows
        self.row_tokens = int(self._ends[-1]) // rows

    def epochs(self) -> dict[str, float]:
        """How often each source is read in the whole stream."""
        read = np.zeros(len(self._sources))
        np.add.at(read, self._units[:, 0], self._units[:, 2] - self._units[:, 1])
        return {s.name: float(r / len(s.tokens)) for s, r in zip(self._sources, read, strict=True)}

    def batch(self, step: int, sequence: int) -> Batch:
        """Tokens step*sequence.. of every row; targets are the next tokens. UsageError past the end."""
        if (step + 1) * sequence + 1 > self.row_tokens:
            raise UsageError(f"the data stream ends before step {step}; raise data.stream_tokens")
        rows = np.stack([self._read(r * self.row_tokens + step * sequence, sequence + 1) for r in range(self.rows)])
        weights = np.ones((self.rows, sequence), dtype=np.float32)
        return Batch(rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64), weights)

    def _draw(self, number: int, tokens: int, seed: int) -> np.ndarray:
        units = _units(self._sources[number].documents, self._unit_tokens)
        sizes = units[:, 1] - units[:, 0]
        chosen, have, epoch = [], 0, 0
        while have < tokens:
            order = np.random.default_rng([seed, 0, number, epoch]).permutation(len(units))
            cumulative = have + np.cumsum(sizes[order])
            take = order[: int(np.searchsorted(cumulative, tokens)) + 1]
            chosen.append(units[take])
            have = int(cumulative[min(len(take), len(order)) - 1])
            epoch += 1
        drawn = np.concatenate(chosen)
        return np.column_stack((np.full(len(drawn), number), drawn))

    def _read(self, start: int, count: int) -> np.ndarray:
        parts = []
        unit = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0:
            source, first, last = self._units[unit]
            skip = start - (int(self._ends[unit]) - (last - first))
            piece = self._sources[source].tokens[first + skip : min(last, first + skip + count)]
            parts.append(piece)
            start, count, unit = start + len(piece), count - len(piece), unit + 1
        return np.concatenate(parts)


def _units(documents: np.ndarray, unit_tokens: int) -> np.ndarray:
    """Start and stop of every unit, int64 [units, 2]."""
    starts, stops = documents[:-1], documents[1:]
    pieces = np.maximum(1, -(-(stops - starts) // unit_tokens))
    document = np.repeat(np.arange(len(starts)), pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = starts[document] + within * unit_tokens
    return np.column_stack((first, np.minimum(first + unit_tokens, stops[document])))


class PackedConversations:
    """SFT data: whole conversations packed into rows by best fit, each attending only to itself.

    Conversations longer than a row are left out (they would lose their end, and with it the end of the turn).
    ``replay``: a share of the rows of every batch is pretraining text with full loss, against forgetting.
    ``alone``: a row holds one conversation only, for designs whose router decides for a whole row.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        repeats: dict[str, float],
        sequence: int,
        rows: int,
        seed: int,
        replay: MixedStream | None = None,
        alone: bool = False,
    ):
        missing = sorted(set(repeats) - set(sources))
        if missing:
            raise UsageError(
                f"source {missing[0]!r} is not in the prepared data; it holds {', '.join(sorted(sources))}"
            )
        self._sources = [sources[name] for name in repeats]
        for source in self._sources:
            if source.mask is None:
                raise UsageError(f"source {source.name!r} holds no conversations; SFT needs replies to learn from")
        self._replay, self.rows, self.sequence = replay, rows, sequence
        self.left_out: dict[str, int] = {}  # conversations of a source that are longer than a row
        rng = np.random.default_rng([seed, 2])
        items = []
        for number, (source, times) in enumerate(zip(self._sources, repeats.values(), strict=True)):
            fits = np.flatnonzero(np.diff(source.documents) <= sequence + 1)
            whole, part = int(times), times - int(times)
            picks = [fits] * whole + [rng.permutation(fits)[: round(part * len(fits))]]
            chosen = np.concatenate(picks)
            self.left_out[source.name] = len(source.documents) - 1 - len(fits)
            items.append(np.column_stack((np.full(len(chosen), number), chosen)))
        order = np.concatenate(items)
        rng.shuffle(order, axis=0)
        self._packs = [[item] for item in order] if alone else self._pack(order)
        own = rows - (replay.rows if replay is not None else 0)
        self.steps = len(self._packs) // own if own else 0
        self._own = own

    def _length(self, item: np.ndarray) -> int:
        documents = self._sources[item[0]].documents
        return int(documents[item[1] + 1] - documents[item[1]])

    def _pack(self, order: np.ndarray) -> list[list[np.ndarray]]:
        """Best-fit packing within a sliding pool of open rows, so that the shuffled order survives."""
        open_rows: list[tuple[int, list[np.ndarray]]] = []
        done: list[list[np.ndarray]] = []
        for item in order:
            length = self._length(item)
            best = min(
                (i for i, (free, _) in enumerate(open_rows) if free >= length),
                key=lambda i: open_rows[i][0],
                default=None,
            )
            if best is None:
                if len(open_rows) >= 32:
                    fullest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
                    done.append(open_rows.pop(fullest)[1])
                open_rows.append((self.sequence + 1 - length, [item]))
            else:
                free, row = open_rows[best]
                open_rows[best] = (free - length, [*row, item])
        return done + [row for _, row in open_rows]

    def batch(self, step: int, sequence: int) -> Batch:
        """The step-th batch; loss weights are 1 on reply tokens and ends of turn, 0 elsewhere and on padding."""
        if sequence != self.sequence or step >= self.steps:
            raise UsageError(f"there are {self.steps} SFT steps of {self.sequence} tokens, not step {step}")
        inputs = np.zeros((self.rows, sequence + 1), dtype=np.int64)
        weights = np.zeros((self.rows, sequence + 1), dtype=np.float32)
        documents = np.full((self.rows, sequence + 1), -1, dtype=np.int64)
        for row in range(self._own):
            position = 0
            for number, (source, doc) in enumerate(self._packs[step * self._own + row]):
                start, stop = self._sources[source].documents[doc : doc + 2]
                span = slice(position, position + int(stop - start))
                mask = self._sources[source].mask
                assert mask is not None
                inputs[row, span] = self._sources[source].tokens[start:stop]
                weights[row, span] = mask[start:stop]
                weights[row, position] = 0.0  # nothing precedes a conversation's first token
                documents[row, span] = number
                position = span.stop
        if self._replay is not None:
            replayed = self._replay.batch(step, sequence)
            inputs[self._own :, :-1], inputs[self._own :, -1] = replayed.inputs, replayed.targets[:, -1]
            weights[self._own :], documents[self._own :] = 1.0, 0
        return Batch(inputs[:, :-1], inputs[:, 1:], weights[:, 1:], documents[:, :-1])


class FirstRows:
    """Held-out text: the first rows of a source, one batch."""

    def __init__(self, source: Source, sequence: int, most: int):
        self._source, self.rows = source, min(most, len(source.tokens) // (sequence + 1))

    def batch(self, step: int, sequence: int) -> Batch:
        """The rows, every target counting."""
        size = self.rows * (sequence + 1)
        ids = np.asarray(self._source.tokens[:size], dtype=np.int64).reshape(self.rows, sequence + 1)
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((self.rows, sequence), dtype=np.float32))


def first_conversations(source: Source, sequence: int, most: int, alone: bool) -> PackedConversations:
    """Held-out conversations, packed as those of SFT are; ``rows`` is 0 where none fits."""
    packs = PackedConversations({source.name: source}, {source.name: 1.0}, sequence, 1, 0, alone=alone).steps
    return PackedConversations({source.name: source}, {source.name: 1.0}, sequence, min(most, packs), 0, alone=alone)
