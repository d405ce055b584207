"""Small corpora for the tests of data preparation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = """
river stone cloud garden window morning letter bridge candle forest silver winter market engine harbour
mountain painter kitchen journey feather lantern orchard whisper thunder village compass meadow copper
""".split()  # noqa: SIM905


def sentence(rng: random.Random, words: int = 12) -> str:
    """A sentence of random words."""
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def texts(count: int, seed: int, words: int = 60) -> list[str]:
    """Distinct texts of a few sentences; no two share a run of five words, but by a rare accident."""
    rng = random.Random(seed)
    return [" ".join(sentence(rng) for _ in range(words // 12)) for _ in range(count)]


def conversation(*turns: str) -> dict[str, Any]:
    """A record; user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One JSON line per record; a text becomes {"text": ...}. Compressed when the name says so."""
    lines = [json.dumps({"text": r} if isinstance(r, str) else r) for r in records]
    data = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
