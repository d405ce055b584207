"""The conversation or document, every token coloured by its depth; drawn line by line (Textual's line API)."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from rlm_chat.engine_client import ReplyToken
from rlm_chat.session import Mode, Turn
from rlm_chat.tui import palette
from rlm_chat.tui.blocks import BY_PERSON, Block, BlockLine, Blocks
from rlm_chat.tui.widgets.bars import figures

READABLE_WIDTH = 100  # longer lines are hard to read


class Transcript(ScrollView, can_focus=True):
    """Shows turns; appending tokens repaints the last lines only. Follows new text while the end is in view."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("[", "screen.depth(-1)", "Less depth", show=False),
        Binding("]", "screen.depth(1)", "More depth", show=False),
    ]
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "transcript--gutter",
        "transcript--title-user",
        "transcript--title-reply",
        "transcript--user",
        "transcript--reply",
        "transcript--foot",
        "transcript--problem",
    }
    DEFAULT_CSS = """
    Transcript { overflow: hidden auto; scrollbar-gutter: stable; }
    """

    view: reactive[str] = reactive("ink")
    following: reactive[bool] = reactive(True)

    class FollowChanged(Message):
        """The end of the text came into view or left it."""

    def __init__(self, id: str | None = None):
        super().__init__(id=id)
        self._blocks = Blocks()
        self._mode = Mode.CHAT
        self._growing: Block | None = None
        self._styles: dict[tuple[str, str, float, int], Style] = {}

    # -- content

    def show(self, mode: Mode, turns: list[Turn]) -> None:
        """Replace everything by these turns."""
        self._mode = mode
        self._blocks = Blocks(self._text_width())
        self._growing = None
        for turn in turns:
            self.begin(turn)
            if turn.role == "assistant":
                self.extend(turn.tokens)
                self.finish(turn)
        self._grown(0, everything=True)
        self.following = True
        self.call_after_refresh(self._to_end)

    def begin(self, turn: Turn) -> None:
        """Add a turn: the person's with its text, the model's empty."""
        first = len(self._blocks)
        if self._mode is Mode.CONTINUE:
            block = next((b for b in self._blocks.blocks if b.kind == "document"), None)
            if block is None:
                block = self._blocks.add("document")
            block.set_foot("")
            block.max_depth = turn.max_depth if turn.role == "assistant" else block.max_depth
            if turn.role == "user":
                block.write(turn.text)
            first = block.start
        elif turn.role == "user":
            block = self._blocks.add("user", "You")
            block.write(turn.text)
        else:
            block = self._blocks.add("reply", turn.model, turn.max_depth)
        self._growing = block
        self._grown(first, everything=self._mode is Mode.CONTINUE)
        if turn.role == "user":
            self.following = True
            self._to_end()

    def extend(self, tokens: list[ReplyToken]) -> None:
        """Append tokens to the model's turn."""
        block = self._growing
        if block is None or not tokens:
            return
        first = block.start + bool(block.title) + len(block.body.lines) - 1
        for token in tokens:
            block.write_token(token.text, token.depth)
        self._grown(first)

    def finish(self, turn: Turn) -> None:
        """Say below the model's turn how it ended."""
        block = self._growing
        if block is None:
            return
        first = block.start + len(block) - 1
        words = [figures(turn)]
        if turn.stopped:
            words.insert(0, "■ stopped")
        if turn.problem:
            words.insert(0, f"× {turn.problem}")
        if turn.summary is not None and turn.summary.dropped_tokens:
            words.append(f"the oldest {turn.summary.dropped_tokens} tokens no longer fit and were not read")
        block.set_foot(" · ".join(words))
        self._grown(first)

    @property
    def text(self) -> str:
        """Everything on the transcript as it would be copied."""
        return self.get_selection(Selection(None, None))[0]

    # -- size and scrolling

    def _text_width(self) -> int:
        return max(10, min(READABLE_WIDTH, self.scrollable_content_region.width - 1))

    def _grown(self, first: int, everything: bool = False) -> None:
        """Lines from ``first`` on have changed."""
        size = Size(self.scrollable_content_region.width, len(self._blocks))
        if size != self.virtual_size:
            self.virtual_size = size
        if everything:
            self.refresh()
        else:
            self.refresh_lines(first, max(1, len(self._blocks) - first))
        if self.following:
            self._to_end()

    def _to_end(self) -> None:
        # Forced: until the scroll bar is laid out Textual takes the widget for one that cannot scroll.
        self.scroll_to(y=self.max_scroll_y, animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Any scrolling decides whether new text is followed."""
        super().watch_scroll_y(old_value, new_value)
        self.following = new_value >= self.max_scroll_y - 0.5

    def watch_following(self) -> None:
        self.post_message(self.FollowChanged())

    def watch_view(self) -> None:
        self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        """Lay the text out again, keeping the end or the same line in view."""
        width = self._text_width()
        if width == self._blocks.width:
            if self.following:
                self._to_end()
            return
        following = self.following
        self._blocks.rewrap(width)
        self._grown(0, everything=True)
        if following:
            self.following = True
            self.call_after_refresh(self._to_end)

    def notify_style_update(self) -> None:
        """A theme changed: colours are computed anew."""
        super().notify_style_update()
        self._styles.clear()

    # -- painting

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        row = y + self.scroll_offset.y
        width = self.size.width
        found = self._blocks.find(row)
        if found is None:
            return Strip.blank(width, self.rich_style)
        block, line = found
        segments = [Segment(line.gutter, self._part_style("gutter" if block.kind == "user" else "reply"))]
        segments += [Segment(text, self._run_style(block, line.part, tag)) for text, tag in line.line.runs]
        strip = Strip(segments)
        selection = self.text_selection
        if selection is not None:
            strip = self._highlight(strip, selection, row, len(line.gutter))
        return strip.adjust_cell_length(width, self.rich_style).apply_offsets(0, row)

    def _run_style(self, block: Block, part: str, tag: int) -> Style:
        if part == "title":
            return self._part_style("title-user" if block.kind == "user" else "title-reply")
        if part == "foot":
            return self._part_style("foot")
        if tag == BY_PERSON:
            return self._part_style("user")
        return self._depth_style(block.depths[tag], block.max_depth)

    def _part_style(self, name: str) -> Style:
        key = (name, "", 0.0, 0)
        if key not in self._styles:
            self._styles[key] = self.get_component_rich_style(f"transcript--{name}")
        return self._styles[key]

    def _depth_style(self, depth: float, max_depth: int) -> Style:
        key = ("depth", self.view, depth, max_depth)
        style = self._styles.get(key)
        if style is None:
            style = self._part_style("reply")
            dark = self.app.current_theme.dark
            colour = palette.colour(depth, max_depth, "heat" if self.view == "heat" else "ink", dark)
            if self.view == "heat":
                style += Style(color=palette.contrast(colour), bgcolor=colour)
            elif self.view == "ink":
                style += Style(color=colour)
            if len(self._styles) > 4096:  # fractional depths are many
                self._styles.clear()
            self._styles[key] = style
        return style

    # -- selecting and copying

    def _highlight(self, strip: Strip, selection: Selection, row: int, gutter: int) -> Strip:
        span = selection.get_span(row)
        if span is None:
            return strip
        length = len(strip.text)
        start, end = max(gutter, span[0]), length if span[1] == -1 else min(length, span[1])
        if start >= end:
            return strip
        cells = [strip.index_to_cell_position(start), strip.index_to_cell_position(end)]
        before, inside, after = strip.crop(0, cells[0]), strip.crop(*cells), strip.crop(cells[1])
        style = self.screen.get_component_rich_style("screen--selection")
        marked = Strip([Segment(s.text, (s.style or Style()) + style) for s in inside])
        return Strip.join([before, marked, after])

    def get_selection(self, selection: Selection) -> tuple[str, str]:
        """The selected text; lines that were only wrapped are joined again, the gutter is left out."""
        first = selection.start.y if selection.start is not None else 0
        last = selection.end.y if selection.end is not None else len(self._blocks) - 1
        parts = []
        for row in range(max(0, first), min(last, len(self._blocks) - 1) + 1):
            found, span = self._blocks.find(row), selection.get_span(row)
            if found is None or span is None:
                continue
            parts.append(_selected(found[1], span, last=row == last, block_end=_ends_part(found[0], row)))
        return "".join(parts), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        """Repaint what is (no longer) selected."""
        self.refresh()


def _selected(line: BlockLine, span: tuple[int, int], *, last: bool, block_end: bool) -> str:
    gutter, text = len(line.gutter), line.line.text
    end = len(text) if span[1] == -1 else max(0, span[1] - gutter)
    piece = text[max(0, span[0] - gutter) : end]
    if last and span[1] != -1:
        return piece
    return piece + (line.line.ending or ("\n" if block_end else ""))


def _ends_part(block: Block, row: int) -> bool:
    """Whether the row is the last of its block's text or foot, where no new line is stored."""
    index = row - block.start
    return block.line(index).part != block.line(index + 1).part
