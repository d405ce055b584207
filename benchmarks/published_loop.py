"""The published generate loops, which keep no cache, against this engine's decoding.

The loop is rebuilt from our dense modules and random weights at full size from the published configuration: a fair
stand-in, because the operations are the same (a full forward of all tokens for every token, the head over all
positions, greedy choice).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    arguments,
    backends_of,
    greedy,
    interleave,
    median,
    random_module,
    random_prompt,
    start,
    table,
    verdict,
)

from rlm_engine.config import BlendConfig, RoutedConfig

FULL_SIZE: dict[str, BlendConfig | RoutedConfig] = {
    "rlm-48m": BlendConfig(
        vocab_size=50_257, d_model=512, n_heads=8, eos_token_id=50_256, context_length=256, tokenizer="none",
        n_layers=6, max_steps=2,
    ),
    "rlm-90m": RoutedConfig(
        vocab_size=50_259, d_model=560, n_heads=8, eos_token_id=50_256, context_length=512, tokenizer="none",
        n_layers=8, ffn=2240, pad_token_id=50_256,
    ),
}  # fmt: skip
BUDGET = 10.0  # times the published loop, float32, same weights


def main() -> None:
    """Run the comparison for both models."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--models", default="rlm-48m,rlm-90m", metavar="LIST")
    options = start(parser)
    if options.quick:
        options.prompt_tokens, options.new_tokens = 8, 12
    for name in options.models.split(","):
        config = FULL_SIZE[name]
        if options.quick:
            changes: dict[str, Any] = {"vocab_size": 97, "d_model": 16, "n_heads": 2, "eos_token_id": 0, "n_layers": 2}
            if isinstance(config, RoutedConfig):
                changes |= {"ffn": 32, "pad_token_id": 0}
            config = replace(config, **changes)
        with tempfile.TemporaryDirectory() as folder:
            _compare(name, config, Path(folder), options)


def published_loop(module: Any, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens and seconds of the loop as published: every token is a forward of everything before it."""
    import torch

    config, ids = module.config, list(prompt)
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(count):
            # rlm-48m crops to its positions, rlm-90m never crops
            window = ids[-config.context_length :] if isinstance(config, BlendConfig) else ids
            logits = module(torch.tensor([window])).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :], time.perf_counter() - started


def _compare(name: str, config: BlendConfig | RoutedConfig, folder: Path, options: Any) -> None:
    module = random_module(config)
    parameters = sum(p.numel() for p in module.parameters())
    models = backends_of(module, config, folder, ("torch", "onnx"), options.threads)
    prompt, count = random_prompt(config, options.prompt_tokens), options.new_tokens
    print(
        f"{name}: {parameters:,} parameters, random; prompt {len(prompt)} + {count} tokens, rounds: {options.repeats}"
    )

    def cached(label: str) -> tuple[list[int], float]:
        tokens, first, rest = greedy(models[label], prompt, count)
        return tokens, first + rest

    runs = {"published loop": partial(published_loop, module, prompt, count)}
    runs |= {f"cached, {label}": partial(cached, label) for label in models}
    for label in models:
        greedy(models[label], prompt, 3)  # warm
    results = interleave(options.repeats, runs)
    expected, _ = results["published loop"][0]
    slow = median([seconds for _, seconds in results["published loop"]])
    rows, ratios = [], {}
    for label, found in results.items():
        seconds = median([s for _, s in found])
        ratios[label] = slow / seconds
        same = sum(a == b for a, b in zip(found[0][0], expected, strict=True))
        best = count / min(s for _, s in found)
        rows.append([label, f"{count / seconds:.1f}", f"{best:.1f}", f"{ratios[label]:.2f}x", f"{same}/{count}"])
    table(["baseline: published loop", "tokens/s", "best", "ratio", "same tokens"], rows)
    fp32 = max(ratio for label, ratio in ratios.items() if label.endswith("fp32"))
    verdict(f"{name}, best float32 backend against the published loop", fp32, BUDGET, at_least=True)
    print(flush=True)


if __name__ == "__main__":
    main()
