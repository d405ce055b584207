"""Where an ONNX file wants to read weights from, found without the `onnx` package and before anything opens the file.

Only the protobuf fields that can hold a tensor are followed (onnx.proto3: ModelProto, GraphProto, NodeProto,
AttributeProto, SparseTensorProto, TensorProto); everything else is skipped by its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_MAX_DEPTH = 16  # graphs within graphs; ours nest as deep as a mixture layer has passes
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # fields of TensorProto
PICKED = ".rows"  # in the names of tensors of which a graph reads only the rows that are looked up
# message -> field number -> message it holds
_FOLLOWED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor stored outside of the graph's file. ``location`` is the file's name as the graph gives it."""

    name: str
    location: str
    offset: int
    length: int

    @property
    def is_picked(self) -> bool:
        """Whether only rows of it are read, of a table exported in 8 bits."""
        return PICKED in self.name


def external_tensors(data: bytes) -> list[ExternalTensor]:
    """Every reference to another file in a serialized ONNX model. Raises ValueError when it is not one."""
    return list(_walk(memoryview(data), "model", 0))


def _walk(data: memoryview, message: str, depth: int) -> Iterator[ExternalTensor]:
    if depth > 4 * _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if message == "tensor":
        yield from _tensor(data)
        return
    followed = _FOLLOWED[message]
    for field, value in _fields(data):
        if field in followed and isinstance(value, memoryview):
            yield from _walk(value, followed[field], depth + 1)


def _tensor(data: memoryview) -> Iterator[ExternalTensor]:
    entries: dict[str, str] = {}
    external, name = False, ""
    for field, value in _fields(data):
        if field == _NAME and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8")
        elif field == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {number: bytes(text).decode("utf-8") for number, text in _fields(value) if not isinstance(text, int)}
            if pair.get(1, "") in entries:
                raise ValueError("an external data key occurs twice")
            entries[pair.get(1, "")] = pair.get(2, "")
        elif field == _DATA_LOCATION:
            external = value == 1
    if external or entries:
        offset, length = int(entries.get("offset", "0")), int(entries["length"])
        yield ExternalTensor(name, entries.get("location", ""), offset, length)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of every field: an integer, or the bytes of a length-delimited field."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield field, value
        elif kind in (1, 2, 5):
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, position = _varint(data, position)
            if size > len(data) - position:
                raise ValueError("truncated")
            if kind == 2:
                yield field, data[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number that does not end")
