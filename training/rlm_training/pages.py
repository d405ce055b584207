"""A report's parts and how they look: as one HTML page (no script, nothing from the network), or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left }
svg { width: 100%; height: auto; max-width: 54rem }
pre { overflow-x: auto; font-size: .85em }
.note { opacity: .75; font-size: .9em }
"""
_STANDALONE = '<svg xmlns="http://www.w3.org/2000/svg"'


@dataclass(frozen=True)
class Heading:
    """``level`` 1 is the page's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Table:
    """Columns, the first aligned left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """An SVG element."""

    title: str
    svg: str


@dataclass(frozen=True)
class Note:
    """A paragraph about what stands above it."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text kept as it is."""

    text: str


Block = Heading | Table | Plot | Note | Code


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page; well-formed XML as well as HTML."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def render_markdown(blocks: Sequence[Block], folder: str) -> tuple[str, dict[str, str]]:
    """The text, and the plots it shows: SVG by file name, in ``folder`` beside the text."""
    parts: list[str] = []
    files: dict[str, str] = {}
    for block in blocks:
        if isinstance(block, Plot):
            name = f"{folder}/{re.sub('[^a-z0-9]+', '-', block.title.lower()).strip('-')}.svg"
            files[name] = block.svg if "xmlns=" in block.svg else block.svg.replace("<svg", _STANDALONE, 1)
            parts.append(f"![{block.title}]({name})")
        else:
            parts.append(_markdown(block))
    return "\n\n".join(parts) + "\n", files


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        case Plot(_, svg):
            return svg
        case Note(text):
            return f'<p class="note">{escape(text)}</p>'
        case Code(text):
            return f"<pre>{escape(text)}</pre>"


def _markdown(block: Heading | Table | Note | Code) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Table(header, rows):
            rules = [":--", *["--:"] * (len(header) - 1)]
            lines = (header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows))
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Note(text):
            return text
        case Code(text):
            return f"```\n{text}\n```"
