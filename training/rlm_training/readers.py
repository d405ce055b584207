"""Reading corpus files record by record, any size, with the position for a progress bar and for resuming."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from typing import Any

from rlm_engine.errors import InputError, UsageError
from rlm_training.corpus import Input

Raw = bytes | str | dict[str, Any]  # a JSON line, a text, a row of a table
_BLOCK_BYTES = 128 * 1024
_END_OF_TEXT = "<|endoftext|>"


class RecordReader:
    """The records of one input in file order, each with its number (the line of a .jsonl, else counted from 1)."""

    def __init__(self, source: Input):
        self.source = source
        self.size_bytes = source.path.stat().st_size if source.path is not None else 0  # 0: unknown
        self.read_bytes = 0

    def records(self, skip: int = 0) -> Iterator[tuple[int, Raw]]:
        """Records with a number above ``skip``. InputError for unreadable files, UsageError for a missing extra."""
        name = self.source.path.name if self.source.path is not None else ""
        if self.source.hub is not None:
            found: Iterator[tuple[int, Raw]] = enumerate(self._hub_rows(skip), skip + 1)
        elif name.endswith(".parquet"):
            found = enumerate(self._parquet_rows(), 1)
        elif name.endswith(".txt"):
            found = enumerate(self._texts(), 1)
        else:
            found = ((number, line) for number, line in enumerate(self._lines(), 1) if line.strip())
        try:
            for number, raw in found:
                if number > skip:
                    yield number, raw
        except OSError as error:
            raise InputError(f"{self.source}: cannot be read ({error.strerror or error})") from None

    def _texts(self) -> Iterator[str]:
        """A .txt file holds documents separated by two empty lines or more, or by a line <|endoftext|>."""
        document: list[str] = []
        empty = 0
        try:
            for line in self._lines():
                text = line.removesuffix(b"\r").decode("utf-8")
                empty = 0 if text else empty + 1
                if text.strip() == _END_OF_TEXT or empty == 2:
                    if any(document):
                        yield "\n".join(document).strip()
                    document = []
                else:
                    document.append(text)
        except UnicodeDecodeError:
            raise InputError(f"{self.source}: not UTF-8 text") from None
        if any(document):
            yield "\n".join(document).strip()

    def _lines(self) -> Iterator[bytes]:
        lines = self._split()
        for first in itertools.islice(lines, 1):
            yield first.removeprefix(codecs.BOM_UTF8)
        yield from lines

    def _split(self) -> Iterator[bytes]:
        rest = b""
        for block in self._blocks():
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        assert self.source.path is not None
        with self.source.path.open("rb") as file:
            blocks = iter(lambda: file.read(_BLOCK_BYTES), b"")
            yield from self._decompressed(blocks) if self.source.path.name.endswith(".zst") else self._counted(blocks)

    def _counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.read_bytes += len(block)
            yield block

    def _decompressed(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Any number of frames (pzstd writes several); the library's reader stops silently in a cut or second one."""
        try:
            import zstandard
        except ImportError:
            raise UsageError(f"{self.source}: reading .zst needs zstandard: pip install 'rlm-chat[train]'") from None
        frame = None
        try:
            for block in self._counted(blocks):
                rest = block
                while rest:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(rest)
                    rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise InputError(f"{self.source}: damaged zstd data ({error})") from None
        if frame is not None:
            raise InputError(f"{self.source}: the file ends in the middle; copy it again")

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(
                f"{self.source}: reading .parquet needs pyarrow: pip install 'rlm-chat[parquet]'"
            ) from None
        try:
            table = pyarrow.parquet.ParquetFile(self.source.path)
            rows = max(1, table.metadata.num_rows)
            done = 0
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
                done += batch.num_rows
                self.read_bytes = self.size_bytes * done // rows
        except pyarrow.ArrowException as error:
            raise InputError(f"{self.source}: damaged parquet file ({str(error).splitlines()[0]})") from None

    def _hub_rows(self, skip: int) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise UsageError(
                f"{self.source}: reading from the hub needs datasets: pip install 'rlm-chat[hub]'"
            ) from None
        assert self.source.hub is not None
        name, config, split = self.source.hub
        try:
            rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
            yield from rows.skip(skip) if skip else rows
        except (OSError, ValueError) as error:  # not found, no network; unknown configuration or split
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.source}: cannot be read from the hub ({reason})") from None
