"""Wraps a growing text into lines of limited width; appending touches only the last line.

No part of Textual here. Widths are terminal cells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rich.cells import cell_len, get_character_cell_size

# Breaks are allowed at spaces and around East Asian wide characters, which are written without spaces.
_WIDE = "\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6"
_WIDE += "\U00020000-\U0003fffd"
_PARTS = re.compile(f"\n|[ \t]+|[{_WIDE}]|[^ \t\n{_WIDE}]+")
_WIDE_CHARACTER = re.compile(f"[{_WIDE}]")
TAB = "    "


@dataclass
class Line:
    """One line on the screen: runs of (text, tag). ``ending``: what of the text follows it but is not shown."""

    runs: list[tuple[str, int]] = field(default_factory=list)
    width: int = 0
    ending: str = ""
    # The first run of the word at the end of the line, which may still grow and move to the next line.
    word: int = 0
    word_width: int = 0

    @property
    def text(self) -> str:
        """What is visible."""
        return "".join(text for text, _ in self.runs)

    def add(self, text: str, width: int, tag: int, *, breakable: bool) -> None:
        """Append a part that fits; ``breakable`` says that the line may be broken after it."""
        if self.runs and self.runs[-1][1] == tag and (breakable or len(self.runs) > self.word):
            self.runs[-1] = (self.runs[-1][0] + text, tag)
        else:
            self.runs.append((text, tag))
        self.width += width
        if breakable:
            self.word, self.word_width = len(self.runs), 0
        else:
            self.word_width += width


class Wrapper:
    """Lines of at most ``width`` cells. ``tag`` is the caller's number for a piece of text (say, its token)."""

    def __init__(self, width: int):
        self.width = max(2, width)
        self.lines: list[Line] = [Line()]

    def push(self, text: str, tag: int) -> int:
        """Append a piece; returns the index of the first line that changed."""
        first = len(self.lines) - 1
        for part in _PARTS.findall(text):
            if part == "\n":
                self.lines[-1].ending += "\n"
                self.lines.append(Line())
            elif part[0] in " \t":
                self._space(part.replace("\t", TAB), tag)
            else:
                self._word(part, tag)
        return first

    @property
    def text(self) -> str:
        """Everything that was pushed (tabs as spaces)."""
        return "".join(line.text + line.ending for line in self.lines)

    def _space(self, spaces: str, tag: int) -> None:
        line = self.lines[-1]
        fitting = max(0, min(len(spaces), self.width - line.width)) if not line.ending else 0
        if fitting:
            line.add(spaces[:fitting], fitting, tag, breakable=True)
        if fitting < len(spaces):
            line.ending += spaces[fitting:]  # hangs over the edge; the next word begins a new line

    def _word(self, word: str, tag: int) -> None:
        breakable = bool(_WIDE_CHARACTER.match(word))
        width = cell_len(word)
        line = self.lines[-1]
        if line.ending or (breakable and line.width + width > self.width):
            line = self._new_line()
        if line.width + width > self.width and line.word > 0:
            line = self._move_word()
        if line.width + width <= self.width:
            line.add(word, width, tag, breakable=breakable)
            return
        # Longer than a whole line: it is cut.
        for character in word:
            size = get_character_cell_size(character)
            if line.width + size > self.width:
                line = self._new_line()
            line.add(character, size, tag, breakable=False)

    def _new_line(self) -> Line:
        self.lines.append(Line())
        return self.lines[-1]

    def _move_word(self) -> Line:
        """Break the line before its last, unfinished word."""
        line = self.lines[-1]
        moved = Line(runs=line.runs[line.word :], width=line.word_width, word_width=line.word_width)
        del line.runs[line.word :]
        line.width -= line.word_width
        line.word_width = 0
        self.lines.append(moved)
        return moved
