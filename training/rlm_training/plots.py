"""Small line plots and depth maps as SVG text: no library, no script, readable with a screen reader and in print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
MAX_POINTS = 400  # a line with more is drawn through the means of neighbouring points
# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
DASHES = ("", "6 3", "2 3")  # a ninth line and beyond begin the colours again, dashed


@dataclass(frozen=True)
class Line:
    """A named line. ``low`` and ``high``: a band around it. ``points``: draw the points, too."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: bool = False


def line_plot(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, y_min: float | None = None, log_y: bool = False
) -> str:
    """An SVG of lines over common axes; non-finite points are left out. Empty text when nothing is left to draw.

    ``y_min``: where the vertical axis begins (default: below the lowest point). ``log_y``: logarithmic, values > 0.
    """
    kept = [line for line in (_thinned(_finite(line, log_y)) for line in lines) if line.x]
    if not kept:
        return ""
    xs = [x for line in kept for x in line.x]
    ys = [y for line in kept for values in (line.y, line.low, line.high) for y in values or ()]
    frame = _Frame(min(xs), max(xs), min(ys) if y_min is None else y_min, max(ys), log_y)
    marks = []
    for number, line in enumerate(kept):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        if line.low is not None and line.high is not None:
            edge = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
            marks.append(f'<polygon points="{frame.path(edge)}" fill="{colour}" fill-opacity="0.18"/>')
        path = frame.path(list(zip(line.x, line.y, strict=True)))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>')
        if line.points or len(line.x) == 1:
            marks += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.8" fill="{colour}"/>'
                for x, y in zip(line.x, line.y, strict=True)
            ]
    legend = [(line.name, COLOURS[i % len(COLOURS)]) for i, line in enumerate(kept)]
    return _svg(title, frame, x_label, y_label, marks, legend if len(legend) > 1 or legend[0][0] else [])


def depth_map(
    title: str, x_label: str, y_label: str, x: Sequence[float], shares: Sequence[Sequence[float]], first: int = 1
) -> str:
    """How often each depth was used over time: ``shares[i][d]`` is the share of depth ``first + d`` at x[i].

    Shares are 0 to 1; a share is drawn as the opacity of its cell. Neighbouring columns are averaged.
    """
    if not x:
        return ""
    deepest = max(len(row) for row in shares)
    size = max(1, math.ceil(len(x) / 120))
    step = (x[-1] - x[0]) / max(1, len(x) - 1) or 1.0
    frame = _Frame(x[0], x[-1] + step, first - 0.5, first + deepest - 0.5, False, whole_y=True, tight=True)
    marks = []
    for start in range(0, len(x), size):
        rows = shares[start : start + size]
        left = frame.x(x[start])
        right = frame.x(x[min(start + size, len(x)) - 1] + step)
        for d in range(deepest):
            share = sum(row[d] if d < len(row) else 0.0 for row in rows) / len(rows)
            if share < 0.002:
                continue
            top, bottom = frame.y(first + d + 0.5), frame.y(first + d - 0.5)
            marks.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left + 0.3:.1f}" height="{bottom - top:.1f}" '
                f'fill="{COLOURS[0]}" fill-opacity="{min(1.0, share):.3f}"/>'
            )
    return _svg(title, frame, x_label, y_label, marks, [])


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, about ``count`` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Maps values to pixels. ``tight``: no air above and below."""

    def __init__(
        self, x0: float, x1: float, y0: float, y1: float, log_y: bool, whole_y: bool = False, tight: bool = False
    ):
        self.log, self.whole_y = log_y, whole_y
        self.x0, self.x1 = x0, x1 if x1 > x0 else x0 + 1.0
        a, b = self._scale(y0), self._scale(y1)
        air = 0.0 if tight else 0.04 * (b - a) or 0.5
        self.y0, self.y1 = a - (air if not tight else 0.0), b + air
        if y0 == 0 and not log_y:
            self.y0 = 0.0  # an axis that begins at nothing begins there

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (self._scale(value) - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def y_ticks(self) -> list[float]:
        if self.whole_y:
            return [float(v) for v in range(math.ceil(self.y0), math.floor(self.y1) + 1)]
        if not self.log:
            return ticks(self.y0, self.y1)
        powers = range(math.floor(self.y0), math.ceil(self.y1) + 1)
        values = [m * 10.0**p for p in powers for m in (1, 2, 3, 5, 7)]
        return [v for v in values if self.y0 <= math.log10(v) <= self.y1]


def _svg(
    title: str, frame: _Frame, x_label: str, y_label: str, marks: Sequence[str], legend: Sequence[tuple[str, str]]
) -> str:
    rows = _legend_rows(legend)
    height = HEIGHT + 18 * len(rows)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"><title>{escape(title)}</title>'
    ]
    for value in frame.y_ticks():
        y = frame.y(value)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(value)}</text>'
        )
    for value in ticks(frame.x0, frame.x1, 8):
        x = frame.x(value)
        parts.append(
            f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="currentColor"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_label(value)}</text>'
        )
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="currentColor"/>')
    parts += marks
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    number = 0
    for row, names in enumerate(rows):
        y = HEIGHT + 18 * row + 6
        for name, x in names:
            colour, dash = legend[number][1], DASHES[number // len(COLOURS) % len(DASHES)]
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            parts.append(
                f'<line x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}" stroke="{colour}" stroke-width="3"{dashed}/>'
                f'<text x="{x + 26}" y="{y + 4}">{escape(name)}</text>'
            )
            number += 1
    return "".join(parts) + "</svg>"


def _legend_rows(legend: Sequence[tuple[str, str]]) -> list[list[tuple[str, int]]]:
    """Names with their left edges, wrapped to the width; letters are taken to be 7 pixels wide."""
    rows: list[list[tuple[str, int]]] = []
    x = WIDTH
    for name, _ in legend:
        width = 42 + 7 * len(name)
        if x + width > WIDTH:
            rows.append([])
            x = LEFT
        rows[-1].append((name, x))
        x += width
    return rows


def _label(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 0.001 else f"{value:.0e}"


def _finite(line: Line, log_y: bool) -> Line:
    keep = [
        i
        for i, (x, y) in enumerate(zip(line.x, line.y, strict=True))
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
    ]
    return _picked(line, keep) if len(keep) < len(line.x) else line


def _picked(line: Line, keep: list[int]) -> Line:
    def pick(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [values[i] for i in keep]

    return Line(line.name, pick(line.x) or [], pick(line.y) or [], pick(line.low), pick(line.high), line.points)


def _thinned(line: Line) -> Line:
    size = math.ceil(len(line.x) / MAX_POINTS)
    if size <= 1:
        return line

    def means(values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        groups = [values[i : i + size] for i in range(0, len(values), size)]
        return [sum(group) / len(group) for group in groups]

    return Line(line.name, means(line.x) or [], means(line.y) or [], means(line.low), means(line.high), line.points)
