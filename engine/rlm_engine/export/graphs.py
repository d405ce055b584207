"""Building ONNX graphs by hand: weights in shared files, and the few operations all designs are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rlm_engine.config import ModelConfig
from rlm_engine.errors import ModelError
from rlm_engine.export.external import PICKED
from rlm_engine.export.manifest import weight_file
from rlm_engine.export.quantize import (
    RESIDUAL_LEVELS,
    Storage,
    dequantize_blocks,
    quantize_blocks,
    quantize_residual,
)
from rlm_engine.export.signatures import F32, I32, I64, Port, Signature, cache_width

OPSET, IR_VERSION = 18, 8
CONTRIB = "com.microsoft"  # GroupQueryAttention, RotaryEmbedding, MatMulNBits, GatherBlockQuantized, Gelu, QuickGelu
ALIGNMENT = 4096  # of a tensor in the file: its pages can be mapped
_TYPES = {F32: TensorProto.FLOAT, I64: TensorProto.INT64, I32: TensorProto.INT32}
_ACCURACY_LEVEL = 4  # MatMulNBits: activations in 8 bits too, the fast integer kernels


# Choosing how deep to think is a matter of close decisions and few weights: these stay in float32.
_ALWAYS_FLOAT = ("halt.", "router", "positions.", "step_embedding")


def stays_float(tensor: str) -> bool:
    """Whether a matrix is never quantized: halting head, routers, position and step embeddings."""
    return any(part in tensor for part in _ALWAYS_FLOAT)


class WeightFile:
    """A file of several graphs' matrices; the same bytes are stored once. Its SHA-256 is known when it is closed."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._offsets: dict[bytes, int] = {}

    def add(self, values: np.ndarray) -> int:
        """Store an array (once) and return its offset."""
        raw = np.ascontiguousarray(values).tobytes()
        key = hashlib.sha256(raw).digest()
        if key not in self._offsets:
            self._write(bytes(-self.size % ALIGNMENT))
            self._offsets[key] = self.size
            self._write(raw)
        return self._offsets[key]

    def close(self) -> str:
        """Finish the file; returns its SHA-256."""
        self._file.close()
        return self._digest.hexdigest()

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)
        self.size += len(raw)


class Weights:
    """A model's tensors as the graphs take them: checked, float32. ``storage``: how to quantize them, None: not.

    ``files``: where they go, by the name that `weight_file` gives.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], files: Mapping[str, WeightFile], storage: Storage | None = None
    ):
        self._tensors = tensors
        self.storage = storage
        self.files = files
        self.used: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as float32. Raises ModelError when it is missing or has another shape."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"the weights have no tensor {name!r}")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name!r} is {list(tensor.shape)}, the configuration says {list(shape)}")
        self.used.add(name)
        return tensor.astype(np.float32, copy=False)

    def check_all_used(self) -> None:
        """Raise ModelError when a tensor went into no graph."""
        extra = sorted(set(self._tensors) - self.used)
        if extra:
            raise ModelError(f"tensor {extra[0]!r} does not belong to this model")


class GraphBuilder:
    """One graph under construction. Values are referred to by name; operations return the name of their result."""

    def __init__(self, name: str, signature: Signature, weights: Weights):
        self.name, self.signature, self.weights = name, signature, weights
        self._file = weights.files[weight_file(name)]
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Add a node; returns its (first) result."""
        return self._op(kind, inputs, domain, outputs, attributes)[0]

    def _op(
        self, kind: str, inputs: tuple[str, ...], domain: str, outputs: int, attributes: Mapping[str, Any]
    ) -> list[str]:
        self._count += 1
        names = [f"{kind}_{self._count}" + (f".{n}" if n else "") for n in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, name=names[0], domain=domain, **attributes)
        self._nodes.append(node)
        return names

    def constant(self, name: str, values: np.ndarray) -> str:
        """A small tensor, stored in the graph itself."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def vector(self, name: str, size: int) -> str:
        """A bias or gain."""
        return self.constant(name, self.weights.take(name, (size,)))

    def linear(self, x: str, name: str, inputs: int, outputs: int, bias: bool = False) -> str:
        """x [..., inputs] times the matrix `name`.weight [outputs, inputs] transposed, plus `name`.bias."""
        key = f"{name}.weight"
        matrix = self.weights.take(key, (outputs, inputs))
        storage, planes = self._stored(key)
        if not planes:
            out = self.op("MatMul", x, self._external(f"{key}.transposed", matrix.T))
        else:
            stored, scales = quantize_blocks(matrix, storage.matrix_block)
            out = self._quantized_matmul(x, key, inputs, stored, scales)
        if planes > 1:
            second = quantize_blocks(matrix - dequantize_blocks(stored, scales, inputs), storage.matrix_block)
            out = self.op("Add", out, self._quantized_matmul(x, f"{key}.second", inputs, *second))
        return self.op("Add", out, self.vector(f"{name}.bias", outputs)) if bias else out

    def unembed(self, x: str, key: str, vocabulary: int, d: int) -> str:
        """Logits [N, vocabulary] of x [N, d]: the table as `lookup` stores it, so that tied models keep one.

        The likeliest tokens of an 8-bit table get the logits of both its planes: which of them is ahead decides what
        is said, and all the others need not be exact.
        """
        table = self.weights.take(key, (vocabulary, d))
        storage, planes = self._stored(key)
        if not planes:
            return self.op("Gemm", x, self._external(key, table), transB=1)
        rough = self._quantized_matmul(x, key, d, *quantize_blocks(table, storage.table_block))
        if not storage.rescored:
            return rough
        count = self.constant("rescored", np.array([min(storage.rescored, vocabulary)]))
        chosen = self._op("TopK", (rough, count), "", 2, {"axis": -1, "sorted": 0})[1]
        last = self.constant("last_axis", np.array([2]))
        products = self.op("MatMul", self.lookup(chosen, key, vocabulary, d), self.op("Unsqueeze", x, last))
        return self.op("ScatterElements", rough, chosen, self.op("Squeeze", products, last), axis=1)

    def lookup(self, ids: str, key: str, rows: int, d: int) -> str:
        """Rows [..., d] of a table for ids [...]."""
        table = self.weights.take(key, (rows, d))
        storage, planes = self._stored(key)
        if not planes:
            return self.op("Gather", self._external(key, table), ids)
        stored, scales = quantize_blocks(table, storage.table_block)
        steps = self._external(f"{key}{PICKED}.scales", scales)
        out = self._gather(self._external(f"{key}{PICKED}", stored.reshape(rows, -1)), ids, steps, 8)
        if storage.rescored:
            packed = self._external(f"{key}{PICKED}.residual", quantize_residual(table, stored, scales))
            fraction = self.constant("residual_step", np.array(1.0 / RESIDUAL_LEVELS, dtype=np.float32))
            out = self.op("Add", out, self.op("Mul", self._gather(packed, ids, steps, 4), fraction))
        if stored.shape[1] * storage.table_block == d:
            return out
        ends = (np.array([0]), np.array([d]), np.array([-1]))
        return self.op("Slice", out, *(self.constant(f"to_width.{n}", e) for n, e in enumerate(ends)))

    def _stored(self, key: str) -> tuple[Storage, int]:
        """The storage and a matrix's planes of 8 bits; 0 for float32."""
        storage = self.weights.storage
        return (storage, 0 if stays_float(key) else storage.planes(key)) if storage else (Storage(), 0)

    def _gather(self, data: str, ids: str, scales: str, bits: int) -> str:
        assert self.weights.storage is not None
        attributes = {"bits": bits, "block_size": self.weights.storage.table_block, "gather_axis": 0}
        return self.op("GatherBlockQuantized", data, ids, scales, domain=CONTRIB, quantize_axis=1, **attributes)

    def _quantized_matmul(self, x: str, key: str, inputs: int, stored: np.ndarray, scales: np.ndarray) -> str:
        sizes = {"N": len(stored), "K": inputs, "bits": 8, "block_size": stored.shape[2]}
        data, steps = self._external(f"{key}.blocks", stored), self._external(f"{key}.scales", scales.reshape(-1))
        return self.op("MatMulNBits", x, data, steps, domain=CONTRIB, accuracy_level=_ACCURACY_LEVEL, **sizes)

    def _external(self, name: str, values: np.ndarray) -> str:
        """A matrix, stored in the graph's weight file."""
        if name in self._initializers:
            return name
        values = np.ascontiguousarray(values)
        tensor = TensorProto(name=name, dims=values.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = TensorProto.UINT8 if values.dtype == np.uint8 else TensorProto.FLOAT
        place = {
            "location": self._file.path.name,
            "offset": self._file.add(values),
            "length": values.nbytes,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def rms_norm(self, x: str, gain: str | None, size: int, eps: float) -> str:
        """Over the last axis; without a gain where that is None."""
        scale = self.constant(f"ones.{size}", np.ones(size, np.float32)) if gain is None else self.vector(gain, size)
        return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps)

    def layer_norm(self, x: str, name: str, size: int, eps: float) -> str:
        """Over the last axis, with gain and bias."""
        gain, bias = self.vector(f"{name}.weight", size), self.vector(f"{name}.bias", size)
        return self.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=eps)

    def gelu(self, x: str) -> str:
        """The exact (erf) form."""
        return self.op("Gelu", x, domain=CONTRIB)

    def silu(self, x: str) -> str:
        """x times its sigmoid."""
        return self.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a size, -1 stands for the rest."""
        label = "shape." + ".".join(map(str, shape))
        return self.op("Reshape", x, self.constant(label, np.array(shape, dtype=np.int64)))

    def per_head(self, x: str, config: ModelConfig, function: Callable[[str], str]) -> str:
        """Apply a function to x [B, S, d] seen as [B, S, heads, head_dim]."""
        return self.reshape(function(self.reshape(x, 0, 0, config.n_heads, config.head_dim)), 0, 0, config.d_model)

    def rotate(self, x: str, config: ModelConfig) -> str:
        """Rotary positions, half layout, of x [B, S, d]; token (b, s) has row rotary_rows[b, s] of the tables."""
        return self.op(
            "RotaryEmbedding", x, "rotary_rows", "cos", "sin", domain=CONTRIB, num_heads=config.n_heads, interleaved=0
        )

    def attention(self, q: str, k: str, v: str, config: ModelConfig) -> str:
        """Write k and v at the caches' end, attend: q, k, v [B, S, d] -> [B, S, d]. Scores over sqrt(head_dim).

        past and present are bound to the same buffers, so the caches are written in place.
        """
        width = cache_width(config.head_dim)
        if width != config.head_dim:  # zeros change no product
            pads = self.constant("head_pads", np.array([0] * 7 + [width - config.head_dim], dtype=np.int64))
            q, k, v = (
                self.reshape(
                    self.op("Pad", self.reshape(x, 0, 0, config.n_heads, config.head_dim), pads),
                    0, 0, config.n_heads * width,
                )
                for x in (q, k, v)
            )  # fmt: skip
        inputs = (q, k, v, "past_k", "past_v", "last", "total", "", "", "", "bias")
        attributes = {"num_heads": config.n_heads, "kv_num_heads": config.n_heads, "scale": config.head_dim**-0.5}
        out, present_k, present_v = self._op("GroupQueryAttention", inputs, CONTRIB, 3, attributes)
        self.result(present_k, "present_k")
        self.result(present_v, "present_v")
        if width != config.head_dim:
            ends = (np.array([0]), np.array([config.head_dim]), np.array([3]))
            cut = (self.constant(f"head_cut.{n}", e) for n, e in enumerate(ends))
            out = self.op("Slice", self.reshape(out, 0, 0, config.n_heads, width), *cut)
            out = self.reshape(out, 0, 0, config.d_model)
        return self.op("Mul", out, "sighted") if "sighted" in self.signature.plumbing else out

    def select(self, index: str, branches: Sequence[Callable[[], str]]) -> str:
        """The result of the branch with number `index` (a scalar); the others are not computed."""
        return self._select(index, 0, branches)

    def _select(self, index: str, first: int, branches: Sequence[Callable[[], str]]) -> str:
        if first + 1 == len(branches):
            return branches[first]()
        here = self.op("Equal", index, self.constant(f"number.{first}", np.array(first, dtype=np.int64)))
        outer = self._nodes
        graphs: list[onnx.GraphProto] = []
        for build in (branches[first], lambda: self._select(index, first + 1, branches)):
            self._nodes = []
            out = helper.make_tensor_value_info(build(), TensorProto.FLOAT, None)
            graphs.append(helper.make_graph(self._nodes, f"branch.{first}.{len(graphs)}", [], [out]))
        self._nodes = outer
        return self.op("If", here, then_branch=graphs[0], else_branch=graphs[1])

    def result(self, value: str, name: str) -> None:
        """Give a value the name of one of the graph's outputs."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for n, old in enumerate(names):
                    if old == value:
                        names[n] = name

    def model(self) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value_info(port) for port in self.signature.inputs],
            [_value_info(port) for port in self.signature.outputs],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rlm-chat")


def _value_info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, _TYPES[port.type], list(port.shape))
