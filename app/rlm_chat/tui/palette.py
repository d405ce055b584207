"""Depth as colour and as glyph: both rise with the number of passes, and either alone is enough to read it.

The colours follow a path through OKLCH (Ottosson 2020) whose lightness rises evenly, so that depth is still readable
in grey (NO_COLOR), and whose hue runs from blue to yellow, the axis that red-green colour blindness leaves intact.
"""

from __future__ import annotations

import math
from functools import lru_cache

RAMP = "▁▂▃▄▅▆▇█"

# (lightness, chroma, hue in degrees) at the shallow and the deep end.
# "ink" colours letters, so every step keeps its distance from the background; "heat" colours the background of letters.
_PATHS = {
    ("ink", True): ((0.58, 0.135, 268.0), (0.93, 0.165, 102.0)),
    ("heat", True): ((0.24, 0.075, 272.0), (0.86, 0.165, 98.0)),
    ("ink", False): ((0.62, 0.150, 75.0), (0.30, 0.140, 275.0)),
    ("heat", False): ((0.97, 0.030, 105.0), (0.50, 0.135, 265.0)),
}


def position(depth: float, max_depth: int) -> float:
    """Where a depth lies between one pass (0) and the model's limit (1)."""
    if max_depth <= 1:
        return 1.0
    return min(1.0, max(0.0, (depth - 1) / (max_depth - 1)))


def glyph(depth: float, max_depth: int) -> str:
    """The bar for a depth: full at the limit, never empty."""
    level = round(depth / max(1, max_depth) * len(RAMP))
    return RAMP[min(len(RAMP), max(1, level)) - 1]


def column(depth: float, max_depth: int, rows: int) -> str:
    """A bar of several rows, top first, one character each; spaces above it."""
    eighths = max(1, round(depth / max(1, max_depth) * 8 * rows))
    bar = ""
    for _ in range(rows):
        part = min(8, eighths)
        bar = (RAMP[part - 1] if part > 0 else " ") + bar
        eighths -= part
    return bar


@lru_cache(maxsize=1024)
def colour(depth: float, max_depth: int, kind: str = "ink", dark: bool = True) -> str:
    """The colour of a depth as "#rrggbb". ``kind``: "ink" for letters, "heat" for what is behind them."""
    (l0, c0, h0), (l1, c1, h1) = _PATHS[kind, dark]
    t = position(depth, max_depth)
    return _oklch_to_hex(l0 + (l1 - l0) * t, c0 + (c1 - c0) * t, h0 + (h1 - h0) * t)


@lru_cache(maxsize=1024)
def contrast(background: str) -> str:
    """Black or white, whichever reads better on ``background`` (WCAG 2 relative luminance)."""
    return "#000000" if luminance(background) > 0.18 else "#ffffff"


def luminance(hex_colour: str) -> float:
    """WCAG 2 relative luminance, 0 (black) to 1 (white)."""
    red, green, blue = (_linear(int(hex_colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _oklch_to_hex(lightness: float, chroma: float, hue: float) -> str:
    """sRGB for an OKLCH colour; chroma is lowered until the colour exists on a screen."""
    while True:
        linear = _oklab_to_linear(lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue)))
        if chroma < 1e-3 or all(-1e-4 <= x <= 1 + 1e-4 for x in linear):
            break
        chroma *= 0.95
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, x)))):02x}" for x in linear)


def _oklab_to_linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """Ottosson's matrices (bottosson.github.io/posts/oklab)."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055


def _linear(x: float) -> float:
    return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
