"""The one-line widgets around the transcript: the top bar, the depth legend, the status line."""

from __future__ import annotations

from textual import events
from textual.content import Content
from textual.style import Style
from textual.widgets import Static

from rlm_chat.session import Mode, Session, State, Turn
from rlm_chat.tui import palette
from rlm_chat.tui.messages import ModeChosen

MUTED = "$foreground 60%"  # "$text-muted" depends on a background that pieces of content do not know


class TopBar(Static):
    """Name, modes, and what is loaded. Clicking a mode chooses it."""

    _NAME = " rlm-chat  "

    def show(self, session: Session) -> None:
        """Paint the session's mode and model."""
        parts: list[Content | tuple[str, str]] = [(self._NAME, "bold $primary")]
        for mode in session.modes:
            name = mode.capitalize()
            if mode is session.mode:
                parts.append((f"[{name}]", "bold reverse $accent"))
            else:
                parts.append((f" {name} ", MUTED))
            parts.append((" ", ""))
        left = Content.assemble(*parts)
        model = session.model
        about = "no model " if session.state is State.FAILED else "loading … "
        if model is not None:
            about = f"{model.name} · {_millions(model.parameters)} · {model.architecture} · {model.backend} "
        room = self.size.width - left.cell_length
        if len(about) > room and model is not None:
            about = f"{model.name} "
        right = Content.styled(about.rjust(room)[: max(0, room)], MUTED)
        self._spans = _mode_spans(session, len(self._NAME))
        self.update(Content.assemble(left, right))

    _spans: tuple[tuple[int, int, Mode], ...] = ()

    def on_click(self, event: events.Click) -> None:
        """Choose the mode under the pointer."""
        for start, end, mode in self._spans:
            if start <= event.x < end:
                self.post_message(ModeChosen(mode))


class DepthLegend(Static):
    """Which colour and which bar means how many passes; depths beyond the limit are dotted out."""

    def show(self, session: Session) -> None:
        """Paint the legend of the loaded model and the limit in force."""
        deepest = session.model.max_depth if session.model else 0
        if not deepest:
            self.update("")
            return
        levels = list(range(1, deepest + 1))
        if deepest > 10:
            levels = sorted({1, *(round(deepest * k / 8) for k in range(1, 9))})
        dark = self.app.current_theme.dark
        parts: list[tuple[str, str | Style]] = [("passes ", MUTED)]
        for level in levels:
            if level > session.max_steps:
                parts.append((f" {level}·", "dim"))
            else:
                parts.append((f" {level}{palette.glyph(level, deepest)}", palette.colour(level, deepest, "ink", dark)))
        limit = "no limit" if session.max_steps == deepest else f"limit {session.max_steps}"
        legend = Content.assemble(*parts)
        room = self.size.width - legend.cell_length
        if room > len(limit) + 6:
            legend = Content.assemble(legend, Content.styled(f"{limit}".rjust(room), MUTED))
        self.update(legend)


class StatusLine(Static):
    """What the engine is doing, in words and numbers."""

    hint = ""

    def show(self, session: Session) -> None:
        """Paint the session's state; a hint (say, what the next Ctrl+C does) goes first."""
        mark, style, text = _status(session)
        if self.hint:
            mark, style, text = "!", "bold $warning", self.hint
        words = text.split(" · ")
        while len(words) > 1 and len(" · ".join(words)) > self.size.width - 4:
            words.pop()  # rather less than half a number
        line = Content.assemble((f" {mark} ", style), (" · ".join(words), style if self.hint else ""))
        meter = _context(session)
        room = self.size.width - line.cell_length
        if meter and room > len(meter):
            line = Content.assemble(line, (meter.rjust(room), MUTED))
        self.update(line)


def figures(turn: Turn) -> str:
    """A finished reply in numbers."""
    count = len(turn.tokens)
    if not count:
        return "no tokens"
    words = [f"{count} token{'s' if count > 1 else ''}", f"depth {turn.mean_depth:.2f} of {turn.max_depth}"]
    summary = turn.summary
    if summary is not None:
        if summary.decode_s > 0 and count > 1:
            words.append(f"{(count - 1) / summary.decode_s:.1f} tokens/s")
        words.append({"max_tokens": "length limit", "context": "context is full"}.get(summary.stop_reason, ""))
        if summary.seed is not None:
            words.append(f"seed {summary.seed}")
    return " · ".join(w for w in words if w)


def _status(session: Session) -> tuple[str, str, str]:
    if session.state is State.LOADING:
        return "○", "$warning", f"loading {session.models[session.mode]} …"
    if session.state is State.FAILED:
        return "×", "bold $error", "no model · Ctrl+Q quits"
    if session.state is State.PREFILL:
        return "◐", "$accent", "reading the prompt …"
    if session.state is State.DECODE and session.reply is not None:
        reply = session.reply
        rate = session.tokens_per_second
        speed = f" · {rate:.1f} tokens/s" if rate else ""
        return "●", "$accent", f"writing · {len(reply.tokens)} tokens · depth {reply.mean_depth:.2f}{speed}"
    return "●", "$success", session.notice or "ready"


def _context(session: Session) -> str:
    """How much of the context window the last reply left full."""
    turns = session.turns[session.mode]
    summary = turns[-1].summary if turns else None
    if session.model is None or summary is None or summary.prompt_tokens is None:
        return ""
    used = min(summary.prompt_tokens + summary.new_tokens, session.model.context_length)
    return f"context {used}/{session.model.context_length} "


def _mode_spans(session: Session, start: int) -> tuple[tuple[int, int, Mode], ...]:
    spans = []
    for mode in session.modes:
        end = start + len(mode) + 2
        spans.append((start, end, mode))
        start = end + 1
    return tuple(spans)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.0f} M" if parameters >= 10_000_000 else f"{parameters / 1e6:.1f} M"
