"""What 8 bits cost: how often the likeliest token stays the same, perplexity, size and speed of several storages.

Every token of the text is predicted by the float32 export and by each 8-bit variant, teacher-forced (all variants read
the same text, in pieces that start afresh). Meaningful for a trained model only, on text it was not trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from common import arguments, interleave, median, start, table, verdict

from rlm_engine.backends.onnx import open_onnx
from rlm_engine.checkpoint import read_model_directory
from rlm_engine.errors import EngineError
from rlm_engine.export.onnx import write_graphs
from rlm_engine.export.quantize import Storage
from rlm_engine.generate import Model, find_model
from rlm_engine.measure import sample_ids
from rlm_engine.sampling import log_softmax
from rlm_engine.tokenizer import load_tokenizer

ATTENTION, VALUES = ("block.wq", "block.wk", "block.wv", "block.wo"), ("block.wv", "block.wo")
VARIANTS = {
    "blocks of 128": Storage(matrix_block=128, rescored=0, double=()),
    "32, one plane": Storage(matrix_block=32, rescored=0, double=()),
    "128, rescored": Storage(matrix_block=128, double=()),
    "64, rescored": Storage(matrix_block=64, double=()),
    "32, rescored": Storage(matrix_block=32, double=()),
    "16, rescored": Storage(matrix_block=16, double=()),
    "16, values two planes": Storage(double=VALUES),
    "16, values and down two planes": Storage(double=(*VALUES, "block.w_down")),
    "table blocks of 64": Storage(table_block=64),
    "table blocks of 32": Storage(table_block=32),
    "32, values two planes": Storage(matrix_block=32, double=VALUES),
    "32, attention float32": Storage(matrix_block=32, double=(), single=ATTENTION),
    "32, values and down two planes": Storage(matrix_block=32, double=(*VALUES, "block.w_down")),
    "32, all two planes": Storage(matrix_block=32),
}
# Weights rounded to 4 bits in blocks of 32 and computed with in float32: the least 4 bits can cost.
FOUR_BITS = {"4-bit block": "block.w", "4-bit block and table": ""}
DEFAULT = "shipped"
TOP1_BUDGET, PERPLEXITY_BUDGET = 0.99, 1.01


@dataclass(frozen=True)
class Predicted:
    """Per token of the text: likeliest next token, its own log-probability (nats), depth."""

    likeliest: np.ndarray
    logprobs: np.ndarray
    depths: np.ndarray


def main() -> None:
    """One table; the first row is the float32 export everything is compared with."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="base", metavar="NAME", help="a bundled model or directory (default base)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=".txt, .jsonl or .jsonl.zst, held out")
    parser.add_argument("--tokens", type=int, default=15_000, metavar="N", help="in all, evenly from the files")
    parser.add_argument("--piece", type=int, default=192, metavar="N", help="tokens per piece")
    parser.add_argument(
        "--variants", default="all", metavar="LIST", help=f"of: {'; '.join((*VARIANTS, *FOUR_BITS))} (default all)"
    )
    parser.add_argument("--one-plane", action="store_true", help="the shipped storage without its second planes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found for the shipped storage")
    options = start(parser)
    if options.quick:
        options.tokens, options.piece = 60, 20
    try:
        directory = find_model(options.model)
        config, tensors = read_model_directory(directory)
        tokenizer = load_tokenizer(config, directory)
    except EngineError as error:
        sys.exit(str(error))
    if tokenizer is None or not options.text:
        sys.exit("give a model with a tokenizer, and --text FILE ...")
    shipped = Storage.for_width(config.d_model)
    if options.one_plane:
        shipped = replace(shipped, rescored=0, double=())
    every: dict[str, Storage | None] = {**VARIANTS, **dict.fromkeys(FOUR_BITS)}
    chosen = every if options.variants == "all" else {n: every[n] for n in _names(options.variants)}
    storages: dict[str, Storage | None] = {"float32": None, DEFAULT: shipped, **chosen}
    pieces = [piece for file in options.text for piece in _pieces(file, tokenizer.encode, options, len(options.text))]
    total = sum(map(len, pieces))
    print(f"model: {options.model}; {total} tokens in {len(pieces)} pieces of {len(options.text)} files")
    print(f"{DEFAULT}: {storages[DEFAULT]}\n")
    with tempfile.TemporaryDirectory() as folder:
        models, sizes = {}, {}
        for number, (label, storage) in enumerate(storages.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            rounded = {n: _in_four_bits(t) if FOUR_BITS.get(label, "-") in n else t for n, t in tensors.items()}
            manifest = write_graphs(place, config, rounded, "int8" if storage else "fp32", storage)
            sizes[label] = sum(file.size_bytes for file in manifest.files.values())
            backend = open_onnx(place, config, threads=options.threads)
            models[label] = Model(label, config, backend, tokenizer, manifest.parameters)
        found = {label: _predict(model, pieces) for label, model in models.items()}
        seconds = interleave(options.repeats, {n: partial(_decode, m, options.quick) for n, m in models.items()})
    reference, rows = found["float32"], []
    for label, predicted in found.items():
        share, margin = _share(predicted.likeliest == reference.likeliest)
        perplexity = float(np.exp((reference.logprobs - predicted.logprobs).mean()))
        rows.append([
            label, f"{share:.2%}", f"+-{margin:.2%}", f"{perplexity:.4f}",
            f"{np.abs(predicted.logprobs - reference.logprobs).mean():.4f}",
            f"{(predicted.depths == reference.depths).mean():.1%}", f"{sizes[label] / 1e6:.1f}",
            f"{median(seconds['float32']) / median(seconds[label]):.2f}x",
        ])  # fmt: skip
    header = ["baseline: float32", "same top-1", "95 %", "perplexity", "|nats|", "same depth", "MB", "decoding speed"]
    table(header, rows)
    share, margin = _share(found[DEFAULT].likeliest == reference.likeliest)
    verdict(f"{DEFAULT}: same top-1", share, TOP1_BUDGET, at_least=True)
    ratio = float(np.exp((reference.logprobs - found[DEFAULT].logprobs).mean()))
    verdict(f"{DEFAULT}: perplexity", ratio, PERPLEXITY_BUDGET, at_least=False)
    if options.json:
        same_depth = float((found[DEFAULT].depths == reference.depths).mean())
        record = {"model": options.model, "storage": asdict(shipped), "tokens": len(reference.likeliest)}
        record |= {"top1": share, "top1_margin": margin, "perplexity_ratio": ratio, "same_depth": same_depth}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(";") if part.strip()]
    unknown = [name for name in names if name not in {**VARIANTS, **FOUR_BITS}]
    if unknown:
        sys.exit(f"no variant {unknown[0]!r}; there are: {'; '.join((*VARIANTS, *FOUR_BITS))}")
    return names


def _in_four_bits(tensor: np.ndarray, block: int = 32) -> np.ndarray:
    """A matrix rounded to the nearest of 15 values per block of an output's inputs; vectors stay."""
    if tensor.ndim != 2 or tensor.shape[1] % block:
        return tensor
    blocks = tensor.astype(np.float32).reshape(len(tensor), -1, block)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(7.0)
    steps = np.rint(blocks / np.where(scales > 0, scales, np.float32(1.0)))
    return (steps * scales).reshape(tensor.shape)


def _pieces(file: Path, encode, options: argparse.Namespace, files: int) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """The beginnings of a file's documents, until the file has given its part of the tokens."""
    left = options.tokens // files
    for text in _documents(file):
        ids = encode(text[: 8 * options.piece])[: min(options.piece, left)]
        if len(ids) > 1:
            left -= len(ids)
            yield ids
        if left <= 1:
            return


def _documents(file: Path) -> Iterator[str]:
    """Texts of a file: each line's "text" or messages of .jsonl, paragraphs of anything else."""
    if ".jsonl" not in file.name:
        yield from file.read_text(encoding="utf-8").split("\n\n")
        return
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            sys.exit(f"{file}: needs the package zstandard (pip install zstandard)")
        with file.open("rb") as raw:
            lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8").readlines()
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        entry = json.loads(line)
        yield entry.get("text") or "\n".join(message["content"] for message in entry.get("messages", []))


def _predict(model: Model, pieces: list[list[int]]) -> Predicted:
    likeliest, logprobs, depths = [], [], []
    for ids in pieces:
        result = model.new_decoder().feed([ids[:-1]], "all")
        likeliest.append(result.logits.argmax(axis=1))
        logprobs.append(log_softmax(result.logits)[np.arange(len(ids) - 1), ids[1:]])
        depths.append([trace.depth for trace in result.traces])
    return Predicted(np.concatenate(likeliest), np.concatenate(logprobs), np.concatenate(depths))


def _share(same: np.ndarray) -> tuple[float, float]:
    """A share and half the width of its 95 % interval (normal approximation, tokens taken as independent)."""
    share = float(same.mean())
    return share, 1.96 * float(np.sqrt(share * (1 - share) / len(same)))


def _decode(model: Model, quick: bool) -> float:
    """Seconds for tokens one by one after a prompt of 32."""
    ids = sample_ids(model, 36 if quick else 96)
    decoder = model.new_decoder()
    decoder.feed([ids[:32]])
    started = time.perf_counter()
    for token in ids[32:]:
        decoder.feed([[token]])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
