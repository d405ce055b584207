"""Runs pieces with ONNX Runtime. States are numpy arrays, caches are written in place; nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from rlm_engine.config import ModelConfig
from rlm_engine.decoding.interface import Array, Cache, Placement
from rlm_engine.errors import ModelError
from rlm_engine.export.manifest import FOLDER, check_files, read_manifest, weight_file
from rlm_engine.export.signatures import F32, I32, I64, Port, Signature, cache_width, pieces, signatures
from rlm_engine.machine import physical_cores

OLDEST = (1, 23)  # the first release whose GatherBlockQuantized reads 8-bit tables (verified: 1.22.1 does not)
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
MASKED = np.float32(-1e30)  # finite, so that adding a score cannot overflow; its exponential is exactly 0
# A row that takes no part in a call between rows that do costs a fraction of a call of its own: measured 25 % (15M) to
# 20 % (55M) per row, so that up to this many are cheaper than a second call.
_BRIDGED_ROWS = 3
_SMALL_GRAPH_BYTES = 1 << 21  # below this, waking a second thread costs more than it gains
_DTYPES: dict[str, Any] = {F32: np.float32, I64: np.int64, I32: np.int32}


class OnnxCache:
    """Keys and values of one attention application, [rows, heads, capacity, width], written in place by the graph.

    Heads are as wide as the graph wants them (`cache_width`); the padding stays zero.
    """

    def __init__(self, rows: int, heads: int, capacity: int, head_dim: int):
        self.capacity = capacity
        self.head_dim = head_dim
        self.k = np.zeros((rows, heads, capacity, cache_width(head_dim)), dtype=np.float32)
        self.v = np.zeros_like(self.k)
        self.hidden = np.zeros((rows, capacity), dtype=bool)
        self._any_hidden = False
        # What decoding adds to the scores of a row's slots: MASKED for hidden ones and those before `_first`.
        self._bias = np.zeros((rows, capacity), dtype=np.float32)
        self._first = [0] * rows
        self.steps: dict[tuple[str, int, int], _Step] = {}  # bindings to these buffers, see `OnnxBackend`

    def write(self, where: Placement, k: np.ndarray, v: np.ndarray) -> None:
        if len(where) == 1:
            row, slot = int(where.rows[0]), int(where.slots[0])
            self.k[row, :, slot, : self.head_dim] = k[0]
            self.v[row, :, slot, : self.head_dim] = v[0]
        else:
            self.k[where.rows, :, where.slots, : self.head_dim] = k
            self.v[where.rows, :, where.slots, : self.head_dim] = v
        self.mark(where)

    def mark(self, where: Placement) -> None:
        """Note which of these tokens are hidden."""
        if where.hidden is None and not self._any_hidden:
            return
        for n, (row, slot) in enumerate(zip(where.rows.tolist(), where.slots.tolist(), strict=True)):
            self._set_hidden(row, slot, where.hidden is not None and bool(where.hidden[n]))

    def _set_hidden(self, row: int, slot: int, hidden: bool) -> None:
        self.hidden[row, slot] = hidden
        self._any_hidden = self._any_hidden or hidden
        if slot >= self._first[row]:
            self._bias[row, slot] = MASKED if hidden else 0.0

    def shift(self, row: int, start: int, stop: int) -> None:
        count = stop - start
        for array in (self.k, self.v):
            array[row, :, :count] = array[row, :, start:stop]
        self.hidden[row, :count] = self.hidden[row, start:stop]
        self.hidden[row, count:] = False
        self._first[row] = 0
        self._bias[row] = np.where(self.hidden[row], MASKED, 0.0)

    def hide(self, row: int, slots: np.ndarray) -> None:
        for slot in np.asarray(slots).tolist():
            self._set_hidden(row, slot, True)

    def grow(self, capacity: int) -> None:
        extra = capacity - self.capacity
        self.k, self.v = (np.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))) for a in (self.k, self.v))
        self.hidden, self._bias = (np.pad(a, ((0, 0), (0, extra))) for a in (self.hidden, self._bias))
        self.capacity = capacity
        self.steps.clear()

    def bias(self, row: int, first: int) -> np.ndarray:
        """What is added to the scores of the row's slots [capacity] when slots before `first` are out of sight."""
        before = self._first[row]
        if first > before:
            self._bias[row, before:first] = MASKED
        elif first < before:
            self._bias[row, first:before] = np.where(self.hidden[row, first:before], MASKED, 0.0)
        self._first[row] = first
        return self._bias[row]


@dataclass(frozen=True)
class _Graph:
    name: str
    session: ort.InferenceSession
    signature: Signature

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Run on these buffers; outputs are written where they are."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            _bind_input(binding, name, array)
        for name, array in outputs.items():
            _bind_output(binding, name, array)
        self.run_bound(binding)

    def run_bound(self, binding: ort.IOBinding) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise ModelError(f"{self.name}.onnx: ONNX Runtime failed: {_first_line(error)}") from None


class _Step:
    """One token in each of `count` neighbouring rows of a cache, bound once: decoding runs this again and again."""

    def __init__(self, graph: _Graph, cache: OnnxCache, row: int, count: int):
        self._graph = graph
        self._binding = graph.session.io_binding()
        sizes = {"B": count, "S": 1, "N": count}
        signature = graph.signature
        caches = {"past_k": cache.k[row : row + count], "past_v": cache.v[row : row + count]}
        self._inputs: dict[str, np.ndarray] = {}
        for port in signature.inputs:
            if port.name == "bias":
                continue  # its width follows the sequence: bound for every token
            array = caches.get(port.name)
            if array is None:
                array = _allocate(port, sizes)
                self._inputs[port.name] = array
            _bind_input(self._binding, port.name, array)
        if "rotary_rows" in self._inputs:
            self._inputs["rotary_rows"][:, 0] = np.arange(count)
        if "sighted" in self._inputs:
            self._inputs["sighted"][:] = 1.0
        # flat views of the same memory, as the pieces have them: [count, ...]
        flat = [_flat(self._inputs[port.name], port.shape) for port in signature.inputs[: signature.values]]
        self._values = flat
        self._outputs = []
        for port in signature.outputs:
            array = caches.get(port.name.replace("present", "past"))
            if array is None:
                array = _allocate(port, sizes)
                self._outputs.append(_flat(array, port.shape))
            _bind_output(self._binding, port.name, array)

    def run(
        self,
        values: Sequence[np.ndarray],
        live: np.ndarray | slice,
        slots: np.ndarray,
        bias: np.ndarray,
        sighted: np.ndarray | None,
    ) -> tuple[np.ndarray, ...]:
        """One token in each row; ``values`` are those of the rows ``live``, the other rows compute with what is there.

        ``bias``: contiguous, at least as wide as the highest slot demands. Returns copies [live, ...].
        """
        for buffer, value in zip(self._values, values, strict=True):
            if buffer.ndim:
                buffer[live] = value
            else:
                buffer[...] = value
        total = int(slots.max()) + 1
        self._inputs["last"][:] = slots
        self._inputs["total"][0] = total
        self._binding.bind_input("bias", "cpu", 0, np.float32, (len(slots), 1, 1, total), bias.ctypes.data)
        if sighted is not None:
            self._inputs["sighted"][live, 0, 0] = sighted
        self._graph.run_bound(self._binding)
        if sighted is not None:
            self._inputs["sighted"][:] = 1.0
        if isinstance(live, slice):
            return tuple(output.copy() for output in self._outputs)
        return tuple(output[live] for output in self._outputs)


class OnnxBackend:
    """Runs the graphs of one model directory's `onnx/` folder. Get one from `open_onnx`."""

    name = "onnx"

    def __init__(self, config: ModelConfig, sessions: Mapping[str, ort.InferenceSession]):
        contract = signatures(config)
        graphs = {name: _Graph(name, session, contract[name]) for name, session in sessions.items()}
        self._pieces = {name: (graphs[piece.graph], piece.step) for name, piece in pieces(config).items()}

    def run(self, piece: str, *inputs: Array) -> tuple[np.ndarray, ...]:
        graph, _ = self._pieces[piece]
        signature = graph.signature
        feeds = _feeds(signature, inputs)
        count = len(inputs[0])
        if "rotary_rows" in signature.plumbing:
            feeds["rotary_rows"] = np.arange(count, dtype=np.int64)[None, :]
        outputs = _outputs(signature, {"N": count})
        graph.run(feeds, outputs)
        return tuple(outputs.values())

    def attend(self, piece: str, x: Array, cache: Cache, where: Placement, *inputs: Array) -> tuple[np.ndarray, ...]:
        assert isinstance(cache, OnnxCache)
        graph, step = self._pieces[piece]
        values = (x, *inputs) if step is None else (x, np.asarray(step), *inputs)
        cache.mark(where)
        if len(where) == 1:
            return _decode(graph, values, cache, where)
        if (where.rows == where.rows[0]).all():
            return _prefill(graph, values, cache, where)
        parts = _parts(where.rows)
        results = []
        for index in parts:
            chosen, placed = _take(graph.signature, values, index), where.take(index)
            one_row = len(index) > 1 and placed.rows[0] == placed.rows[1]
            results.append((_prefill if one_row else _decode)(graph, chosen, cache, placed))
        order = np.argsort(np.concatenate(parts))
        return tuple(np.concatenate(outputs)[order] for outputs in zip(*results, strict=True))

    def new_cache(self, rows: int, heads: int, capacity: int, head_dim: int) -> OnnxCache:
        return OnnxCache(rows, heads, capacity, head_dim)

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else None)

    def numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def concatenate(self, arrays: Sequence[Array]) -> np.ndarray:
        return np.concatenate(list(arrays))


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    """The tokens in groups one call can take: several tokens of one row, or one token in each of some near rows."""
    present, counts = np.unique(rows, return_counts=True)
    parts = [np.flatnonzero(rows == row) for row in present[counts > 1]]
    alone = present[counts == 1]
    for group in np.split(alone, np.flatnonzero(np.diff(alone) > 1 + _BRIDGED_ROWS) + 1):
        if len(group):
            index = np.flatnonzero(np.isin(rows, group))
            parts.append(index[np.argsort(rows[index])])
    return parts


def _decode(graph: _Graph, values: Sequence[Array], cache: OnnxCache, where: Placement) -> tuple[np.ndarray, ...]:
    """One token in each of some rows, straight on the cache. Rows between them run along and leave nothing behind."""
    row = int(where.rows[0])
    count = int(where.rows[-1]) - row + 1
    key = (graph.name, row, count)
    step = cache.steps.get(key)
    if step is None:
        step = cache.steps[key] = _Step(graph, cache, row, count)
    live: np.ndarray | slice = slice(None)
    slots, first = where.slots, where.first
    idle = np.setdiff1d(np.arange(row, row + count), where.rows) if count > len(where) else None
    if count == 1:
        bias = cache.bias(row, int(first[0]))
    else:
        if idle is not None:
            live = where.rows - row
            slots = np.zeros(count, dtype=np.int64)  # the others write and read their first slot alone
            slots[live] = where.slots
        bias = np.zeros((count, int(slots.max()) + 1), dtype=np.float32)
        for here, start in zip(where.rows.tolist(), first.tolist(), strict=True):
            bias[here - row] = cache.bias(here, start)[: bias.shape[1]]
    sighted = None
    if where.hidden is not None and where.hidden.any():
        # A token hidden from itself may see nothing; a softmax over nothing is NaN, so it looks at itself then.
        bias = np.atleast_2d(bias)[:, : int(slots.max()) + 1].copy()
        sighted = np.ones(len(where), dtype=np.float32)
        for n, (here, start, slot) in enumerate(
            zip(where.rows.tolist(), first.tolist(), where.slots.tolist(), strict=True)
        ):
            if (bias[here - row, start : slot + 1] < 0).all():
                sighted[n], bias[here - row, slot] = 0.0, 0.0
    if idle is None:
        return step.run(values, live, slots, bias, sighted)
    kept = cache.k[idle, :, 0], cache.v[idle, :, 0]  # copies
    results = step.run(values, live, slots, bias, sighted)
    cache.k[idle, :, 0], cache.v[idle, :, 0] = kept
    return results


def _prefill(graph: _Graph, values: Sequence[Array], cache: OnnxCache, where: Placement) -> tuple[np.ndarray, ...]:
    """Several tokens of one row. Slots with gaps between them run on a copy of the row that has them at its end."""
    row, slots, first = int(where.rows[0]), where.slots, where.first
    count, stop = len(slots), int(slots[-1]) + 1
    if stop - int(slots[0]) == count:
        keys = np.arange(stop)
        k, v = cache.k[row : row + 1], cache.v[row : row + 1]
        scattered = False
    else:
        old = np.setdiff1d(np.arange(int(first.min()), stop), slots, assume_unique=True)
        keys = np.concatenate([old, slots])
        k, v = (np.empty((1, a.shape[1], len(keys), a.shape[3]), dtype=np.float32) for a in (cache.k, cache.v))
        k[0, :, : len(old)], v[0, :, : len(old)] = cache.k[row][:, old], cache.v[row][:, old]
        scattered = True
    visible = (keys <= slots[:, None]) & (keys >= first[:, None]) & ~cache.hidden[row, keys]
    blind = np.flatnonzero(~visible.any(axis=1))
    visible[blind, len(keys) - count + blind] = True  # itself: keeps the softmax finite, its result is zeroed
    feeds = _feeds(graph.signature, values)
    feeds["bias"] = np.where(visible, np.float32(0.0), MASKED)[None, None]
    feeds["last"] = np.array([len(keys) - 1], dtype=np.int32)
    feeds["total"] = np.array([len(keys)], dtype=np.int32)
    feeds["past_k"], feeds["past_v"] = k, v
    plumbing = graph.signature.plumbing
    if "rotary_rows" in plumbing:
        feeds["rotary_rows"] = np.arange(count, dtype=np.int64)[None, :]
    if "sighted" in plumbing:
        feeds["sighted"] = np.ones((1, count, 1), dtype=np.float32)
        feeds["sighted"][0, blind] = 0.0
    outputs = _outputs(graph.signature, {"B": 1, "S": count}, {"present_k": k, "present_v": v})
    graph.run(feeds, outputs)
    if scattered:
        cache.k[row][:, slots], cache.v[row][:, slots] = k[0, :, -count:], v[0, :, -count:]
    shapes = {port.name: port.shape for port in graph.signature.outputs}
    return tuple(_flat(a, shapes[name]) for name, a in outputs.items() if not name.startswith("present"))


def _feeds(signature: Signature, values: Sequence[Array]) -> dict[str, np.ndarray]:
    """A piece's own inputs as its graph takes them: types, and flat tokens as one row."""
    feeds = {}
    for port, value in zip(signature.inputs[: signature.values], values, strict=True):
        array = np.ascontiguousarray(value, dtype=_DTYPES[port.type])
        feeds[port.name] = array[None] if port.shape[:1] == ("B",) else array.reshape(array.shape if port.shape else ())
    return feeds


def _take(signature: Signature, values: Sequence[Array], index: np.ndarray) -> list[Array]:
    """The inputs of some of the tokens."""
    ports = signature.inputs[: signature.values]
    return [value[index] if port.shape else value for port, value in zip(ports, values, strict=True)]


def _outputs(
    signature: Signature, sizes: Mapping[str, int], given: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    outputs = dict(given or {})
    for port in signature.outputs:
        if port.name not in outputs:
            outputs[port.name] = _allocate(port, sizes)
    return outputs


def _allocate(port: Port, sizes: Mapping[str, int]) -> np.ndarray:
    shape = [s if isinstance(s, int) else sizes[s] for s in port.shape]
    return np.zeros(shape, dtype=_DTYPES[port.type])


def _flat(array: np.ndarray, shape: tuple[str | int, ...]) -> np.ndarray:
    """A view with rows and tokens in one axis."""
    return array.reshape(-1, *array.shape[2:]) if shape[:2] == ("B", "S") else array


def _bind_input(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def open_onnx(directory: Path, config: ModelConfig, device: str = "cpu", threads: int | None = None) -> OnnxBackend:
    """The backend of a model directory with an `onnx/` folder; everything in it is checked first.

    ``device``: one of PROVIDERS. ``threads``: default one per physical core. Raises ModelError.
    """
    installed = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if installed < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ModelError(f"onnxruntime {ort.__version__} is too old, {oldest} or newer is needed: pip install -U")
    providers = _providers(device)
    manifest = read_manifest(directory, config)
    sizes = check_files(directory, manifest)
    contract = signatures(config)
    count = threads or physical_cores()
    sessions = {}
    for name, signature in contract.items():
        path = directory / FOLDER / f"{name}.onnx"
        wide = sizes[name] >= _SMALL_GRAPH_BYTES and name != "embed"
        weights = manifest.folder(directory, weight_file(name))
        sessions[name] = _open_session(path, weights, count if wide else 1, providers)
        _check_signature(path, sessions[name], signature)
    return OnnxBackend(config, sessions)


def _providers(device: str) -> list[str]:
    provider = PROVIDERS.get(device)
    available = ort.get_available_providers()
    if provider not in available:
        names = ", ".join(d for d, p in PROVIDERS.items() if p in available)
        raise ModelError(
            f"device {device!r} was asked for, but the installed onnxruntime has only: {names}; "
            "install its build for that device instead of onnxruntime, or use --device cpu"
        )
    assert provider is not None
    return [provider] if device == "cpu" else [provider, PROVIDERS["cpu"]]


def _open_session(path: Path, weights: Path, threads: int, providers: list[str]) -> ort.InferenceSession:
    """``weights``: the folder of the file its weights are in."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions; lines on standard error would tear the screen
    # Every session has its own threads. While they spin after a run they take the next session's core: measured 2.6
    # times slower with one session per piece, and worse beside other work. Sleeping costs 5 % at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base but this one
        raise ModelError(f"{path}: ONNX Runtime refuses it: {_first_line(error)}") from None


def _check_signature(path: Path, session: ort.InferenceSession, signature: Signature) -> None:
    for kind, found, expected in (
        ("input", session.get_inputs(), signature.inputs),
        ("output", session.get_outputs(), signature.outputs),
    ):
        if [port.name for port in found] != [port.name for port in expected]:
            raise ModelError(
                f"{path}: its {kind}s are {', '.join(port.name for port in found) or 'none'}; "
                f"this model's are {', '.join(port.name for port in expected)}"
            )
        for have, want in zip(found, expected, strict=True):
            if have.type != want.type or not _same_shape(have.shape, want.shape):
                raise ModelError(
                    f"{path}: {kind} {have.name!r} is {have.type} {list(have.shape)}, "
                    f"config.json asks for {want.type} {list(want.shape)}"
                )


def _same_shape(found: Sequence[Any], expected: Sequence[str | int]) -> bool:
    """Sizes that are only known when it runs may have any name, but must not be fixed."""
    if len(found) != len(expected):
        return False
    return all(f == e if isinstance(e, int) else not isinstance(f, int) for f, e in zip(found, expected, strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
