"""Collecting what a decoder returns for the tokens it was fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlm_engine.decoding.interface import Result
from rlm_engine.decoding.sequences import Push
from rlm_engine.errors import ModelError, UsageError
from rlm_engine.trace import TokenTrace


def reported_tokens(pushes: Sequence[Push]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reported tokens of flat pushes: their index in the flat tokens, their rows and their slots."""
    index, rows, slots, offset = [], [], [], 0
    for push in pushes:
        offset += len(push.ids)
        for back in range(push.report, 0, -1):
            index.append(offset - back)
            rows.append(push.row)
            slots.append(push.stop - back)
    return np.array(index, dtype=np.int64), np.array(rows, dtype=np.int64), np.array(slots, dtype=np.int64)


class Report:
    """Logits and traces round by round; `result` puts the rows in order."""

    def __init__(self, report: str):
        if report not in ("all", "last"):
            raise UsageError(f"report must be 'all' or 'last', got {report!r}")
        self.everything = report == "all"
        self._rows: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []
        self._traces: list[TokenTrace] = []

    def add(self, rows: np.ndarray, logits: np.ndarray, traces: Sequence[TokenTrace]) -> None:
        """One round: logits [n, vocabulary] of n tokens. Raises ModelError when one is not finite."""
        if not np.isfinite(logits).all():
            raise ModelError("the model computed a number that is not finite; its weights are damaged or overflow")
        self._rows.append(rows)
        self._logits.append(logits)
        self._traces.extend(traces)

    def result(self, vocab_size: int) -> Result:
        """Everything added, rows in order, each row's tokens in order."""
        if not self._rows:
            return Result(np.zeros((0, vocab_size), dtype=np.float32), [], np.zeros(0, dtype=np.int64))
        if len(self._rows) == 1:
            return Result(self._logits[0], self._traces, self._rows[0])
        rows = np.concatenate(self._rows)
        order = np.argsort(rows, kind="stable")
        return Result(np.concatenate(self._logits)[order], [self._traces[i] for i in order], rows[order])
