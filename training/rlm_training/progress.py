"""Progress bars on a terminal; nothing elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rlm_training.readers import RecordReader


class SourceProgress:
    """How much of a source has been read, documents and tokens per second."""

    def __init__(self, name: str, reader: RecordReader, shown: bool):
        self._reader, self._documents, self._tokens, self._started = reader, 0, 0, time.monotonic()
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            in_bytes = {"total": reader.size_bytes, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
            self._bar = tqdm(desc=name, **(in_bytes if reader.size_bytes else {"unit": " documents"}))

    def __enter__(self) -> SourceProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, documents: int, tokens: int) -> None:
        """So many more documents, with so many tokens, are done."""
        if self._bar is None:
            return
        self._documents += documents
        self._tokens += tokens
        speed = self._tokens / max(1e-9, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{self._documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(self._reader.read_bytes - self._bar.n if self._reader.size_bytes else documents)
