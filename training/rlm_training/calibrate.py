"""What a trained halting head decides by, and how decisively: one factor on its logits, or a head fitted anew.

The factor is a temperature, as classifiers are calibrated with (Guo et al. 2017). Training leaves the head lukewarm:
its gradient is small once a token's probabilities sum to one. Larger factors spread the depths, until halting too early
costs; the largest that costs next to nothing is kept.

Where that spreads them too little, the head can be fitted anew to what it is for: a logistic regression, on the states
of a frozen model, of whether all further recurrences together save less than a price (Ouro's second stage, Zhu et al.
2025, has such a target). The model should be trained a little further afterwards, the head left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlm_engine.checkpoint import read_model_directory, write_model_directory
from rlm_engine.config import ActConfig
from rlm_engine.errors import InputError, UsageError
from rlm_engine.models.act import ActModel
from rlm_engine.models.layers import rms_norm
from rlm_training.losses import token_cross_entropy
from rlm_training.shards import Source, load_sources

FACTORS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0)
TOLERANCE = 0.0025  # nats per token, a quarter of a percent of perplexity
SHARPNESS = 3.0  # of the target in 1 / nats: a single token's saving is noisy, a sharp target would be about its sign
DECAY = 1e-3  # of the fitted weights


@dataclass(frozen=True)
class Passage:
    """Token ids [n + 1] and which of the n predictions count [n]."""

    ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a factor does: nats per token that counts, mean and standard deviation of depth over all tokens."""

    factor: float
    loss: float
    depth: float
    deviation: float


def calibrate_halting(
    source: Path,
    target: Path,
    prepared: Path,
    names: Sequence[str] = (),
    tokens: int = 20_000,
    said: Callable[[Outcome], None] = lambda outcome: None,
    tolerance: float = TOLERANCE,
    price: float | None = None,
    factor: float | None = None,
) -> Outcome:
    """Write the act model `source` with a calibrated halting head to `target`; returns what was chosen.

    ``prepared``: a folder of `rlm-train prepare`, ``names``: of its sources (default all), which give about ``tokens``
    tokens in equal parts; in conversations only replies count. ``said`` hears of every factor. ``tolerance``: nats per
    token that a more decisive head may cost. ``price``: fit the head anew, to stop where all further recurrences save
    less than this many nats. ``factor``: take this one instead of searching.
    Raises UsageError for another design, InputError for unknown sources, ModelError for a damaged model.
    """
    config, tensors = read_model_directory(source)
    if not isinstance(config, ActConfig):
        raise UsageError(f"{source}: {config.architecture} has no halting head to calibrate; give an act model")
    sources = load_sources(prepared)
    unknown = sorted(set(names) - set(sources))
    if unknown:
        raise InputError(f"{prepared}: no source {unknown[0]!r}; there are {', '.join(sources)}")
    chosen = [sources[name] for name in names or sources]
    passages = [p for one in chosen for p in read_passages(one, config, tokens // len(chosen))]
    model = ActModel(config)
    model.load_state_dict({name: torch.from_numpy(t.astype(np.float32)) for name, t in tensors.items()})
    model.eval()
    note = dict(config.provenance)
    if price is not None:
        fit_head(model, passages, price)
        note["halting_price"] = price
    best = choose(model, passages, said, tolerance, FACTORS if factor is None else (factor,))
    written = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("halt.weight", "halt.bias"):
        written[name] *= best.factor
    note["halting_factor"] = best.factor
    write_model_directory(target, replace(config, provenance=note), written)
    return best


def read_passages(source: Source, config: ActConfig, tokens: int) -> Iterator[Passage]:
    """Beginnings of documents from all over a source, each after an end of text, about ``tokens`` in all."""
    documents = len(source.documents) - 1
    typical = max(1, min(config.context_length, len(source.tokens) // documents))
    for number in np.linspace(0, documents - 1, min(documents, math.ceil(tokens / typical))).astype(np.int64):
        start, stop = int(source.documents[number]), int(source.documents[number + 1])
        stop = min(stop, start + config.context_length)
        ids = np.concatenate(([config.eos_token_id], source.tokens[start:stop])).astype(np.int64)
        counts = np.ones(stop - start) if source.mask is None else np.asarray(source.mask[start:stop], dtype=float)
        if counts.any():
            yield Passage(ids, counts)


@torch.no_grad()
def choose(
    model: ActModel,
    passages: Sequence[Passage],
    said: Callable[[Outcome], None] = lambda o: None,
    tolerance: float = TOLERANCE,
    factors: Sequence[float] = FACTORS,
) -> Outcome:
    """The outcome of the largest factor that costs at most ``tolerance`` more than the first. The model stays."""
    weight, bias = model.halt.weight.clone(), model.halt.bias.clone()
    found = []
    try:
        for factor in factors:
            model.halt.weight.copy_(weight * factor)
            model.halt.bias.copy_(bias * factor)
            found.append(_measure(model, passages, factor))
            said(found[-1])
    finally:
        model.halt.weight.copy_(weight)
        model.halt.bias.copy_(bias)
    return [outcome for outcome in found if outcome.loss <= found[0].loss + tolerance][-1]


def fit_head(model: ActModel, passages: Sequence[Passage], price: float) -> None:
    """Fit the halting head, in place: p_n is to say that the recurrences after n save less than ``price`` nats."""
    with torch.no_grad():
        found = [_states_and_losses(model, passage) for passage in passages]
    states = torch.cat([one for one, _ in found], dim=1)  # [recurrences, tokens, d]
    losses = torch.cat([one for _, one in found], dim=1)  # [recurrences, tokens]
    target = torch.sigmoid(SHARPNESS * (price - (losses - losses[-1])))
    # recurrences before min_steps never stop, after the last there is nothing to decide
    deciding = slice(model.config.min_steps - 1, model.config.max_steps - 1)
    weight, bias = model.halt.weight, model.halt.bias
    solver = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        logits = torch.nn.functional.linear(states[deciding], weight, bias).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target[deciding])
        loss = loss + DECAY * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    solver.zero_grad()


def _states_and_losses(model: ActModel, passage: Passage) -> tuple[Tensor, Tensor]:
    """Of every recurrence, with halting left out: normalised states and the loss of stopping there in nats."""
    config, ids = model.config, torch.from_numpy(passage.ids)
    out = model(ids[None, :-1], threshold=math.inf, keep_states=True)
    y, left = torch.zeros_like(out.states[0][0]), torch.ones_like(out.halting[0][0])
    losses = []
    for state, p in zip(out.states, out.halting, strict=True):
        hidden = model.final_norm(y + left[:, None] * state[0])
        losses.append(token_cross_entropy(hidden, model.embedding.weight, ids[1:], cap=config.logit_softcap))
        weight = torch.minimum(p[0], left)
        y, left = y + weight[:, None] * state[0], left - weight
    return rms_norm(torch.cat(out.states), eps=config.norm_eps), torch.stack(losses)


def _measure(model: ActModel, passages: Sequence[Passage], factor: float) -> Outcome:
    total, weights = 0.0, 0.0
    depths: list[Tensor] = []
    for passage in passages:
        ids, counts = torch.from_numpy(passage.ids), torch.from_numpy(passage.counts)
        out = model(ids[None, :-1])
        losses = token_cross_entropy(out.hidden[0], model.embedding.weight, ids[1:], cap=model.config.logit_softcap)
        total += float((losses.double() * counts).sum())
        weights += float(counts.sum())
        depths.append(out.depth[0])
    depth = torch.cat(depths).double()
    return Outcome(factor, total / weights, float(depth.mean()), float(depth.std(correction=0)))
