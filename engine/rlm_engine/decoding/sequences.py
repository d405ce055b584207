"""Which tokens each row holds, which of them are cached, and what must run next when a window slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlm_engine.errors import InputError, UsageError


@dataclass(frozen=True)
class Push:
    """Tokens of one row to run through the model now, at slots slot.. of its cache.

    The last ``report`` of them are asked for. What the cache holds of the row from ``slot`` on is void.
    """

    row: int
    ids: list[int]
    slot: int
    report: int

    @property
    def stop(self) -> int:
        """The slot after the last token."""
        return self.slot + len(self.ids)


class Sequences:
    """The ids of every row and the part of each that is cached.

    ``window``: how many latest tokens the model sees, None for all. When a row outgrows it, "exact" re-forwards the
    latest `window` tokens for every further token, as the published generation loops do; "block" drops the oldest
    quarter and runs the rest once, so that most tokens stay cheap (a deviation: the model then sees between 3/4 and
    all of the window). Either way the visible part depends on the row's length alone, never on how it was fed.
    """

    def __init__(self, rows: int, vocab_size: int, window: int | None, mode: str = "exact"):
        if mode not in ("exact", "block"):
            raise UsageError(f"window must be 'exact' or 'block', got {mode!r}")
        self.window = window
        self.block = 1 if mode == "exact" or window is None else max(1, window // 4)
        self.vocab_size = vocab_size
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self._start = [0] * rows  # position of the token in the row's slot 0
        self._cached = [0] * rows  # slots that hold the row's tokens

    def start(self, length: int) -> int:
        """The first position that is visible to the last of `length` tokens."""
        if self.window is None or length <= self.window:
            return 0
        return -(-(length - self.window) // self.block) * self.block

    def slots_needed(self, tokens: Sequence[Sequence[int]]) -> int:
        """The cache slots a row needs at most when `tokens` are fed. Checks the tokens, changes nothing.

        Raises InputError for ids outside the vocabulary.
        """
        if len(tokens) != len(self.ids):
            raise UsageError(f"tokens for {len(tokens)} rows were given to a decoder of {len(self.ids)}")
        for new in tokens:
            if len(new) and not 0 <= min(new) <= max(new) < self.vocab_size:
                bad = next(i for i in new if not 0 <= i < self.vocab_size)
                raise InputError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        longest = max(len(old) + len(new) for old, new in zip(self.ids, tokens, strict=True))
        return longest if self.window is None else min(longest, self.window)

    def extend(self, tokens: Sequence[Sequence[int]], report_all: bool) -> Iterator[list[Push]]:
        """Append tokens to the rows and yield what to run, round by round, each row at most once a round.

        A round's tokens count as cached once the next round (or the end) is asked for: a round that failed or was
        interrupted runs again with the row's next tokens.
        """
        waiting = []
        for row, new in enumerate(tokens):
            before = len(self.ids[row])
            self.ids[row].extend(int(i) for i in new)
            waiting.append(self._segments(before, len(self.ids[row]), report_all))
        while any(waiting):
            pushes = [self._push(row, *segments.pop(0)) for row, segments in enumerate(waiting) if segments]
            yield pushes
            for push in pushes:
                self._cached[push.row] = push.stop

    def _segments(self, before: int, after: int, report_all: bool) -> list[tuple[int, int]]:
        """(length reached, tokens reported) for each stretch of new tokens that shares one visible start."""
        if before == after:
            return []
        if not report_all or self.window is None:
            return [(after, after - before if report_all else 1)]
        segments = []
        while before < after:
            reached = min(after, self.start(before + 1) + self.window)
            segments.append((reached, reached - before))
            before = reached
        return segments

    def _push(self, row: int, length: int, report: int) -> Push:
        start = self.start(length)
        if start != self._start[row]:
            self._start[row], self._cached[row] = start, 0
        slot = self._cached[row]
        return Push(row, self.ids[row][start + slot : length], slot, report)

    def truncate(self, row: int, length: int) -> bool:
        """Forget the row's tokens from position `length` on; False when it has fewer."""
        if not 0 <= length <= len(self.ids[row]):
            return False
        del self.ids[row][length:]
        # When the visible start moves back, `_push` finds that out and runs the visible tokens again.
        self._cached[row] = max(0, min(self._cached[row], length - self._start[row]))
        return True

    def length(self, row: int) -> int:
        """Tokens fed to the row."""
        return len(self.ids[row])

    def dropped(self, row: int) -> int:
        """Oldest tokens of the row that its last token did not see."""
        return self.start(len(self.ids[row]))
