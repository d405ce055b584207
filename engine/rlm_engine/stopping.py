"""Stop strings over a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a text that arrives in pieces at the earliest place where any stop string begins.

    However the text is split, what comes out is the same as cutting the whole text: text that may be the beginning of
    a stop string is held back until it is clear, and no part of the stop string is ever returned. When a stop string
    is complete but an earlier, longer one may still be on its way ("c" inside a possible "abcd"), the decision waits.

    Knuth, Morris & Pratt 1977: one number per stop string says how much of it the text ends with, so a character costs
    O(1) per stop string even for hostile ones such as "aaaa...b".
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._borders = [_borders(s) for s in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._found: int | None = None  # where in _held the earliest complete stop string begins
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; returns the text that may be shown now, and True once a stop string was found."""
        if self.hit:
            return "", True
        if not self._stops or not text:
            return text, False
        start = len(self._held)
        self._held += text
        pending = len(self._held)
        for end in range(start, len(self._held)):
            pending = self._advance(self._held[end], end)
            if self._found is not None and pending >= self._found:
                return self._finish(), True
        released = pending if self._found is None else min(pending, self._found)
        safe, self._held = self._held[:released], self._held[released:]
        if self._found is not None:
            self._found -= released
        return safe, False

    def flush(self) -> str:
        """The text ends here: returns what was held back, cut at a complete stop string if there is one (`hit`)."""
        if self._found is not None:
            return self._finish()
        safe, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return safe

    def _advance(self, character: str, end: int) -> int:
        """Match one character, the one at `end` of the held text; returns where the earliest open match begins."""
        pending = end + 1
        for i, stop in enumerate(self._stops):
            length = self._matched[i]
            while length and (length == len(stop) or stop[length] != character):
                length = self._borders[i][length - 1]
            if stop[length] == character:
                length += 1
            self._matched[i] = length
            begin = end + 1 - length
            if length == len(stop):
                self._found = begin if self._found is None else min(self._found, begin)
            elif length:
                pending = min(pending, begin)
        return pending

    def _finish(self) -> str:
        safe, self._held, self._found = self._held[: self._found], "", None
        self.hit = True
        return safe


def _borders(stop: str) -> list[int]:
    """For each prefix of the text, the length of its longest proper prefix that is also its end."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        if stop[i] == stop[length]:
            length += 1
        borders[i] = length
    return borders
