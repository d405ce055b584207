"""Time per token against recurrences used: whether halting early really saves the time of what is not computed."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from common import arguments, chosen_models, interleave, median, start, table, verdict

from rlm_engine.decoding.interface import Depth
from rlm_engine.generate import Model
from rlm_engine.measure import fit_line, sample_ids

BUDGET = 0.68  # time at depth 5 of that at depth 8


def main() -> None:
    """One table per backend."""
    parser = arguments(__doc__, repeats=5, model=True)
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens per depth and round")
    options = start(parser)
    if options.quick:
        options.prompt_tokens, options.tokens = 8, 4
    with tempfile.TemporaryDirectory() as folder:
        models = chosen_models(options, Path(folder))
        runs = {}
        for label, model in models.items():
            for depth in range(1, model.max_depth + 1):
                runs[f"{label}|{depth}"] = partial(token_times, model, depth, options.prompt_tokens, options.tokens)
        results = interleave(options.repeats, runs)
        for label, model in models.items():
            _report(label, {d: results[f"{label}|{d}"] for d in range(1, model.max_depth + 1)})


def token_times(model: Model, depth: int, prompt_tokens: int, tokens: int) -> tuple[float, float]:
    """Recurrences per token and median seconds per token under a depth budget."""
    # the threshold keeps tokens from halting before the budget
    forced = Depth(depth, 1.0) if model.config.architecture == "act" else Depth(depth)
    ids = sample_ids(model, prompt_tokens + tokens + 1)
    decoder = model.new_decoder(forced)
    decoder.feed([ids[:prompt_tokens]])
    decoder.feed([ids[prompt_tokens : prompt_tokens + 1]])
    seconds, recurrences = [], 0
    for token in ids[prompt_tokens + 1 :]:
        started = time.perf_counter()
        result = decoder.feed([[token]])
        seconds.append(time.perf_counter() - started)
        recurrences += sum(result.traces[-1].steps)
    return recurrences / tokens, median(seconds)


def _report(label: str, found: dict[int, list[tuple[float, float]]]) -> None:
    deepest = max(found)
    times = {depth: median([s for _, s in rounds]) for depth, rounds in found.items()}
    used = {depth: rounds[0][0] for depth, rounds in found.items()}
    rows = [
        [str(depth), f"{used[depth]:.2f}", f"{1e3 * times[depth]:.3f}", f"{times[depth] / times[deepest]:.3f}"]
        for depth in found
    ]
    print(f"\n{label}")
    table(["depth budget", "recurrences", "ms/token", f"baseline: depth {deepest}"], rows)
    line = fit_line(list(used.values()), list(times.values()))
    if line is not None:
        print(f"least squares: {1e3 * line[1]:.3f} ms + {1e3 * line[0]:.3f} ms per recurrence")
    if used.get(5) != 5 or used.get(8) != 8:
        print("not judged: tokens of this model halt before 5 or 8 recurrences; random weights (--size) do not")
    else:
        verdict(f"{label}: depth 5 against depth 8", times[5] / times[8], BUDGET, at_least=False)


if __name__ == "__main__":
    main()
