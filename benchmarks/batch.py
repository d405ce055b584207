"""Many prompts at once: tokens per second of `generate_many` by the number of rows."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from common import arguments, chosen_models, interleave, median, random_prompt, start, table, timed

from rlm_engine.generate import Model
from rlm_engine.sampling import Sampling


def main() -> None:
    """One table per backend."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--rows", default="1,2,4,8,16", metavar="LIST")
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    options = start(parser)
    if options.quick:
        options.rows, options.prompts, options.prompt_tokens, options.new_tokens = "1,2,4", 4, 6, 4
    rows = [int(part) for part in options.rows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        models = chosen_models(options, Path(folder))
        runs = {}
        for label, model in models.items():
            prompts = [random_prompt(model.config, options.prompt_tokens, seed) for seed in range(options.prompts)]
            for count in rows:
                runs[f"{label}|{count}"] = partial(throughput, model, prompts, options.new_tokens, count)
        results = interleave(options.repeats, runs)
        for label in models:
            rates = {count: [rate for rate, _ in results[f"{label}|{count}"]] for count in rows}
            tokens = {results[f"{label}|{count}"][0][1] for count in rows}
            print(f"\n{label}: {options.prompts} prompts of {options.prompt_tokens}, {max(tokens)} new tokens in all")
            if len(tokens) > 1:
                print(f"(rounding ended some replies elsewhere: {min(tokens)} to {max(tokens)} tokens)")
            base = median(rates[rows[0]])
            lines = [
                [str(n), f"{median(r):.1f}", f"{max(r):.1f}", f"{median(r) / base:.2f}x"] for n, r in rates.items()
            ]
            table([f"rows (baseline: {rows[0]})", "tokens/s", "best", "ratio"], lines)


def throughput(model: Model, prompts: list[list[int]], new_tokens: int, rows: int) -> tuple[float, int]:
    """New tokens per second, prompts included in the time, and how many there were."""
    produced = 0

    def run() -> None:
        nonlocal produced
        sampling = Sampling(greedy=True, max_tokens=new_tokens)
        produced = sum(len(done.tokens) for done in model.generate_many(prompts, sampling, rows=rows))

    seconds = timed(run)
    return produced / seconds, produced


if __name__ == "__main__":
    main()
