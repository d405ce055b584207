"""A step's batch, cut into micro-batches: equal slices of its rows, each with its share in the whole batch's loss.

All processes of a run read the same batch (it is a function of the step) and take their own slices of it, so what is
trained on depends neither on the number of processes nor on how many slices a step has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlm_training.preferences import PreferenceBatch
from rlm_training.stream import Batch


@dataclass(frozen=True)
class Micro:
    """A slice of a batch, on the device.

    ``index``: its number among the ``slices`` of the batch. ``inputs``, ``targets`` int64 [rows, tokens].
    ``counts`` float32 [rows, tokens]: the targets' weights; ``scale``: the same divided by their sum over the whole
    batch, so that sum(scale * loss), added up over the slices, is the batch's mean loss. ``real`` float32: 1 / (tokens
    of the whole batch) on tokens, 0 on padding. ``documents``: attention stays within equal numbers (None: one text).
    ``reference``: DPO: the frozen model's log-probabilities [pairs, 2] of the replies; the rows are then all chosen
    replies, followed by the rejected ones.
    """

    index: int
    slices: int
    inputs: Tensor
    targets: Tensor
    counts: Tensor
    scale: Tensor
    real: Tensor
    documents: Tensor | None = None
    reference: Tensor | None = None


class Steps(Protocol):
    """The data of a stage."""

    def micros(self, step: int, slices: int, own: range, device: torch.device) -> list[Micro]:
        """The slices numbered `own` of a step's batch."""
        ...


class TokenStream(Protocol):
    """What pretraining and SFT read: `MixedStream` and `PackedConversations`."""

    def batch(self, step: int, sequence: int) -> Batch: ...


class TokenSteps:
    """Pretraining and SFT batches.

    ``padding``: the id put in place of padding (where ``documents`` is -1), for designs that mask an id of their own.
    ``masked``: whether the design takes document masks.
    """

    def __init__(self, stream: TokenStream, sequence: int, padding: int | None = None, masked: bool = True):
        self._stream, self._sequence, self._padding, self._masked = stream, sequence, padding, masked

    def micros(self, step: int, slices: int, own: range, device: torch.device) -> list[Micro]:
        """See `Steps`."""
        batch = self._stream.batch(step, self._sequence)
        total, real = float(batch.weights.sum(dtype=np.float64)), _real(batch)
        tokens = float(real.sum())
        inputs = batch.inputs if self._padding is None else np.where(real, batch.inputs, self._padding)
        result = []
        for index in own:
            rows = _rows(len(inputs), slices, index)
            documents = batch.documents if self._masked else None
            counts = torch.from_numpy(batch.weights[rows]).to(device)
            result.append(
                Micro(
                    index,
                    slices,
                    torch.from_numpy(np.ascontiguousarray(inputs[rows])).to(device),
                    torch.from_numpy(np.ascontiguousarray(batch.targets[rows])).to(device),
                    counts,
                    (counts.double() / max(total, 1.0)).float(),
                    torch.from_numpy(real[rows].astype(np.float64) / tokens).float().to(device),
                    None if documents is None else torch.from_numpy(documents[rows]).to(device),
                )
            )
        return result


class PairSource(Protocol):
    """What DPO reads: `PreferenceBatches`."""

    def batch(self, step: int) -> PreferenceBatch: ...


class PairSteps:
    """DPO batches. ``reference`` float64 [all pairs, 2]: the frozen model's log-probabilities (chosen, rejected)."""

    def __init__(self, pairs: PairSource, reference: np.ndarray, padding: int | None = None, masked: bool = True):
        self._pairs, self._reference, self._padding, self._masked = pairs, reference, padding, masked

    def micros(self, step: int, slices: int, own: range, device: torch.device) -> list[Micro]:
        """See `Steps`."""
        batch = self._pairs.batch(step)
        return [self._micro(batch, slices, index, device) for index in own]

    def _micro(self, batch: PreferenceBatch, slices: int, index: int, device: torch.device) -> Micro:
        rows = _rows(len(batch.pairs), slices, index)
        reference = torch.from_numpy(self._reference[batch.pairs[rows]]).float().to(device)
        return pair_micro(batch, rows, slices, index, device, reference, self._padding, self._masked)


def pair_micro(
    batch: PreferenceBatch,
    rows: slice,
    slices: int,
    index: int,
    device: torch.device,
    reference: Tensor | None,
    padding: int | None,
    masked: bool,
) -> Micro:
    """The pairs `rows` of a batch as one micro-batch: chosen replies first; only they count in the SFT term."""
    halves = (batch.chosen, batch.rejected)
    real_all = np.concatenate([_real(half) for half in halves])
    real = np.concatenate([_real(half)[rows] for half in halves])
    inputs = np.concatenate([half.inputs[rows] for half in halves])
    if padding is not None:
        inputs = np.where(real, inputs, padding)
    counts = torch.from_numpy(np.concatenate([half.weights[rows] for half in halves]))
    scale = counts.double() / max(float(batch.chosen.weights.sum(dtype=np.float64)), 1.0)
    scale[len(scale) // 2 :] = 0.0
    documents = None
    if masked and batch.chosen.documents is not None and batch.rejected.documents is not None:
        both = np.concatenate((batch.chosen.documents[rows], batch.rejected.documents[rows]))
        documents = torch.from_numpy(both).to(device)
    return Micro(
        index,
        slices,
        torch.from_numpy(inputs).to(device),
        torch.from_numpy(np.concatenate([half.targets[rows] for half in halves])).to(device),
        counts.to(device),
        scale.float().to(device),
        torch.from_numpy(real.astype(np.float64) / float(real_all.sum())).float().to(device),
        documents,
        reference,
    )


def _rows(rows: int, slices: int, index: int) -> slice:
    size = rows // slices
    return slice(index * size, (index + 1) * size)


def _real(batch: Batch) -> np.ndarray:
    """Boolean [rows, tokens]: where there is a token rather than padding."""
    return np.ones(batch.inputs.shape, dtype=bool) if batch.documents is None else batch.documents >= 0
