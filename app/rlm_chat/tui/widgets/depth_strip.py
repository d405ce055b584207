"""The depth of every token as a running strip of bars, newest on the right."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from rlm_chat.tui import palette


class DepthStrip(ScrollView, can_focus=False):
    """One column per token; as many rows of resolution as the widget is high. Scrolls sideways."""

    DEFAULT_CSS = """
    DepthStrip { height: 1; overflow: hidden hidden; }
    """

    def __init__(self, id: str | None = None):
        super().__init__(id=id)
        self._depths: list[float] = []
        self._max_depth = 1

    def start(self, max_depth: int) -> None:
        """Begin an empty strip for a model with this many passes."""
        self._depths = []
        self._max_depth = max_depth
        self.virtual_size = Size(0, self.size.height)
        self.scroll_to(0, animate=False)
        self.refresh()

    def extend(self, depths: list[float]) -> None:
        """Append bars; keeps showing the newest unless the reader scrolled back."""
        follow = self.scroll_offset.x >= self.virtual_size.width - self.size.width
        first = len(self._depths)
        self._depths.extend(depths)
        self.virtual_size = Size(len(self._depths), self.size.height)
        if follow and len(self._depths) > self.size.width:
            self.scroll_to(len(self._depths) - self.size.width, animate=False, force=True)
            self.refresh()
        else:
            self.refresh(Region(first - self.scroll_offset.x, 0, len(depths), self.size.height))

    def on_resize(self) -> None:
        """Keep the newest bars in view."""
        self.virtual_size = Size(len(self._depths), self.size.height)
        self.scroll_to(max(0, len(self._depths) - self.size.width), animate=False, force=True)

    def render_line(self, y: int) -> Strip:
        """One row of the bars in view."""
        left, width, rows = self.scroll_offset.x, self.size.width, self.size.height
        base = self.rich_style
        dark = self.app.current_theme.dark
        segments = []
        for depth in self._depths[left : left + width]:
            bar = palette.column(depth, self._max_depth, rows)[y]
            ink = palette.colour(depth, self._max_depth, "ink", dark)
            segments.append(Segment(bar, base + Style(color=ink)))
        return Strip(segments).adjust_cell_length(width, base)
