"""The transcript as blocks of lines: who wrote it, the wrapped text, what is said below it. No part of Textual."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlm_chat.tui.wrapping import Line, Wrapper

GUTTERS = {"user": "▌ ", "reply": "  ", "document": "  ", "note": "  "}
BY_PERSON = -1  # the tag of text that has no depth


@dataclass(frozen=True)
class BlockLine:
    """A line on the screen. ``part``: "title", "body", "foot" or "blank"."""

    part: str
    gutter: str
    line: Line


class Block:
    """One turn, the whole document, or a note. ``depths[tag]`` is the depth of the token with that tag."""

    def __init__(self, kind: str, width: int, title: str = "", max_depth: int = 1):
        self.kind = kind
        self.title = title
        self.max_depth = max_depth
        self.depths: list[float] = []
        self.start = 0  # its first line in the transcript
        self._pieces: list[tuple[str, int]] = []
        self._foot_text = ""
        self._set_width(width)

    def _set_width(self, width: int) -> None:
        inner = width - len(GUTTERS[self.kind])
        self.body, self.foot = Wrapper(inner), Wrapper(inner)

    def __len__(self) -> int:
        foot = len(self.foot.lines) if self._foot_text else 0
        return bool(self.title) + len(self.body.lines) + foot + 1

    def write(self, text: str) -> None:
        """Append text that has no depth."""
        self._pieces.append((text, BY_PERSON))
        self.body.push(text, BY_PERSON)

    def write_token(self, text: str, depth: float) -> None:
        """Append a token."""
        self.depths.append(depth)
        if text:
            self._pieces.append((text, len(self.depths) - 1))
            self.body.push(text, len(self.depths) - 1)

    def set_foot(self, text: str) -> None:
        """Say something below the text; an empty text removes it."""
        self._foot_text = text
        self.foot = Wrapper(self.foot.width)
        self.foot.push(text, BY_PERSON)

    def rewrap(self, width: int) -> None:
        """Lay the text out for another width."""
        self._set_width(width)
        for text, tag in self._pieces:
            self.body.push(text, tag)
        self.foot.push(self._foot_text, BY_PERSON)

    def line(self, index: int) -> BlockLine:
        """The block's line with this index, counted from its title; past the end it is blank."""
        gutter = GUTTERS[self.kind]
        if self.title:
            if index == 0:
                title = Line([(self.title, BY_PERSON)], ending="\n")
                return BlockLine("title", gutter, title)
            index -= 1
        for part, wrapper in (("body", self.body), ("foot", self.foot if self._foot_text else None)):
            if wrapper is not None:
                if index < len(wrapper.lines):
                    return BlockLine(part, gutter, wrapper.lines[index])
                index -= len(wrapper.lines)
        return BlockLine("blank", "", _BLANK)


_BLANK = Line(ending="\n")


@dataclass
class Blocks:
    """All blocks, one under the other; only the last one grows."""

    width: int = 80
    blocks: list[Block] = field(default_factory=list)

    def __len__(self) -> int:
        """Lines in all; the blank line after the last block is not counted."""
        return self.blocks[-1].start + len(self.blocks[-1]) - 1 if self.blocks else 0

    def add(self, kind: str, title: str = "", max_depth: int = 1) -> Block:
        """Begin a block below the others."""
        block = Block(kind, self.width, title, max_depth)
        if self.blocks:
            block.start = self.blocks[-1].start + len(self.blocks[-1])
        self.blocks.append(block)
        return block

    def rewrap(self, width: int) -> None:
        """Lay everything out for another width."""
        self.width = width
        start = 0
        for block in self.blocks:
            block.rewrap(width)
            block.start = start
            start += len(block)

    def find(self, y: int) -> tuple[Block, BlockLine] | None:
        """The block and line at row ``y``; None outside."""
        if not 0 <= y < len(self):
            return None
        low, high = 0, len(self.blocks)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.blocks[middle].start <= y else (low, middle)
        block = self.blocks[low]
        return block, block.line(y - block.start)
