"""Depth speculation: how many drafted tokens are right, and whether drafting makes a model faster.

Only a trained model says anything about acceptance; give one with --model. Greedy output is compared with plain
decoding token by token; sampled output has the same distribution, not the same tokens.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import arguments, chosen_models, interleave, median, random_prompt, start, table

from rlm_engine.generate import Model
from rlm_engine.generation import Speculation
from rlm_engine.sampling import Sampling

PROMPTS = (
    "Once upon a time, in a village by the sea, there lived",
    "The best way to learn a new language is to",
    "Water boils at a lower temperature in the mountains because",
    "She opened the letter slowly, afraid of what it",
)


@dataclass(frozen=True)
class Run:
    """All prompts once: decoded tokens, seconds of decoding (prompts left out), share of drafts that were right."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    accepted: float | None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


def main() -> None:
    """One table per backend: draft depths down, drafted tokens across."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--draft-depths", default="1,2,3,4", metavar="LIST")
    parser.add_argument("--draft-tokens", default="2,3,4,5", metavar="LIST")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    options = start(parser)
    if options.quick:
        options.draft_depths, options.draft_tokens, options.new_tokens = "1,2", "2", 6
    depths = [int(part) for part in options.draft_depths.split(",")]
    lengths = [int(part) for part in options.draft_tokens.split(",")]
    sampling = Sampling(temperature=options.temperature, seed=1, max_tokens=options.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        for label, model in chosen_models(options, Path(folder)).items():
            runs = {"plain": partial(decode, model, sampling, None)}
            for depth in depths:
                for tokens in lengths:
                    runs[f"{depth}x{tokens}"] = partial(decode, model, sampling, Speculation(depth, tokens))
            _report(label, interleave(options.repeats, runs), depths, lengths, sampling.is_greedy)


def decode(model: Model, sampling: Sampling, speculation: Speculation | None) -> Run:
    """Continue every prompt."""
    written, seconds, drafted = [], 0.0, []
    for n, text in enumerate(PROMPTS):
        prompt = text if model.tokenizer is not None else random_prompt(model.config, 12, n)
        generation = model.generate(prompt, sampling, speculation=speculation)
        written.append(tuple(token.id for token in generation))
        seconds += generation.summary.decode_s
        if generation.summary.accepted is not None:
            drafted.append(generation.summary.accepted)
    return Run(tuple(written), seconds, sum(drafted) / len(drafted) if drafted else None)


def _report(label: str, results: dict[str, list[Run]], depths: list[int], lengths: list[int], greedy: bool) -> None:
    plain = median([run.rate for run in results["plain"]])
    print(f"\n{label}: baseline plain decoding {plain:.1f} tokens/s; cells: accepted, speed against the baseline")
    rows = []
    for depth in depths:
        cells = []
        for tokens in lengths:
            found = results[f"{depth}x{tokens}"]
            accepted = found[0].accepted
            share = "-" if accepted is None else f"{accepted:.0%}"
            cells.append(f"{share} {median([run.rate for run in found]) / plain:.2f}x")
        rows.append([f"draft depth {depth}", *cells])
    table(["", *(f"{tokens} tokens" for tokens in lengths)], rows)
    if greedy:
        expected = results["plain"][0].tokens
        same = sum(runs[0].tokens == expected for name, runs in results.items() if name != "plain")
        print(f"same tokens as plain decoding: {same} of {len(results) - 1} settings")


if __name__ == "__main__":
    main()
