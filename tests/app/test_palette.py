"""Depth colours and glyphs: readable by everybody."""

from __future__ import annotations

import itertools

import pytest

from rlm_chat.tui import palette

BACKGROUNDS = {True: "#10141b", False: "#fbfaf7"}

# Linear RGB to what a dichromat sees, severity 1.0 (Machado, Oliveira & Fernandes 2009, table 1).
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))


def linear(colour: str) -> list[float]:
    return [palette._linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]


def lightness(rgb: list[float]) -> float:
    """CIE L*, 0 to 100, of linear RGB."""
    y = max(0.0, 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2])
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def seen(colour: str, matrix: tuple[tuple[float, ...], ...]) -> list[float]:
    rgb = linear(colour)
    return [sum(m * x for m, x in zip(row, rgb, strict=True)) for row in matrix]


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("kind", ["ink", "heat"])
@pytest.mark.parametrize("deepest", [2, 4, 5, 8])
def test_lightness_moves_one_way_in_even_steps(kind: str, dark: bool, deepest: int) -> None:
    levels = [lightness(linear(palette.colour(d, deepest, kind, dark))) for d in range(1, deepest + 1)]
    steps = [b - a for a, b in itertools.pairwise(levels)]
    direction = 1 if dark else -1
    assert all(direction * s > 3 for s in steps), steps
    assert max(map(abs, steps)) < 2.2 * min(map(abs, steps)), steps


@pytest.mark.parametrize("matrix", [DEUTERANOPIA, PROTANOPIA])
@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("kind", ["ink", "heat"])
def test_depths_stay_apart_for_colour_blind_readers(
    matrix: tuple[tuple[float, ...], ...], kind: str, dark: bool
) -> None:
    levels = [lightness(seen(palette.colour(d, 8, kind, dark), matrix)) for d in range(1, 9)]
    direction = 1 if dark else -1
    assert all(direction * (b - a) > 2 for a, b in itertools.pairwise(levels)), levels


@pytest.mark.parametrize("dark", [True, False])
def test_letters_have_contrast(dark: bool) -> None:
    for depth in range(1, 9):
        ink = palette.luminance(palette.colour(depth, 8, "ink", dark))
        ground = palette.luminance(BACKGROUNDS[dark])
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 3.0
        heat = palette.colour(depth, 8, "heat", dark)
        pair = palette.luminance(heat), palette.luminance(palette.contrast(heat))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5


def test_glyphs_tell_all_depths_apart_up_to_eight() -> None:
    for deepest in range(1, 9):
        bars = [palette.glyph(d, deepest) for d in range(1, deepest + 1)]
        assert len(set(bars)) == deepest
        assert bars == sorted(bars)  # the ramp rises with the code points
        assert bars[-1] == "█"


def test_fractional_and_strange_depths_have_a_bar_and_a_colour() -> None:
    assert palette.glyph(0, 8) == "▁"
    assert palette.glyph(99, 8) == "█"
    assert palette.glyph(1.4, 2) == "▆"
    assert palette.colour(0.0, 8) == palette.colour(1.0, 8)
    assert palette.colour(3, 1) == palette.colour(8, 8)


def test_tall_bars_fill_from_below() -> None:
    assert palette.column(8, 8, 3) == "███"
    assert palette.column(4, 8, 3) == " ▄█"
    assert palette.column(1, 8, 3) == "  ▃"
    assert palette.column(0, 8, 2) == " ▁"
