"""Log-probability, depth and entropy of given tokens: the one computation every evaluation builds on.

With the PyTorch backend whole batches go through the dense forward, otherwise (and for the causal numbers of
`mixture`) one passage after the other goes through the decoder. The two agree to rounding; a test holds them to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlm_engine.config import ActConfig, BlendConfig, MixtureConfig
from rlm_engine.decoding.interface import Depth
from rlm_engine.errors import UsageError
from rlm_engine.generate import Model, find_model, load_model
from rlm_engine.sampling import log_softmax

BATCH_TOKENS = 4096  # through the blocks at once
# Tokens whose logits are held at once. Float32: 25 MB, which malloc reuses instead of asking for new pages (measured:
# 1.7 times faster than 1024). Under autocast the head's table is converted anew for every call: more at once.
HEAD_TOKENS = {"float32": 128, "bfloat16": 1024}
DECODER_CHUNK = 256

ROUTINGS = ("causal", "teacher-forced")


@dataclass(frozen=True)
class Passage:
    """Tokens to score: after inputs[i] comes targets[i]. Predictions before ``first`` are not asked for."""

    inputs: np.ndarray  # int64 [n]
    targets: np.ndarray  # int64 [n]
    first: int = 0

    def __len__(self) -> int:
        return len(self.inputs) - self.first


@dataclass(frozen=True)
class Run:
    """How the model is run. ``routing``: whether routers see each token's prefix ("causal", what generation does) or
    the whole passage, its future included ("teacher-forced", as published); act has no router and ignores it.
    """

    depth: Depth = field(default_factory=Depth)
    routing: str = "causal"

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise UsageError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")


@dataclass
class Scores:
    """Of a passage's predictions from ``first`` on, each [predictions].

    ``logprob`` of the target, float64 nats; ``depth`` of the token that predicts it; ``greedy``: whether the target
    has the highest logit; ``entropy`` of the prediction in nats, when asked for.
    """

    logprob: np.ndarray
    depth: np.ndarray
    greedy: np.ndarray
    entropy: np.ndarray | None = None


class Scorer:
    """Scores passages with one model. ``module``: its dense PyTorch module, None to use the decoder throughout.

    ``precision``: "float32" leaves the weights as they are; "bfloat16" runs the dense forward under autocast, several
    times faster where the hardware multiplies bfloat16, and off by about a thousandth of a nat.
    """

    def __init__(self, model: Model, module: Any | None = None, precision: str = "float32"):
        if precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
        if precision == "bfloat16" and module is None:
            raise UsageError("precision 'bfloat16' needs the torch backend")
        self.model, self.module, self.precision = model, module, precision

    def score(
        self,
        passages: Sequence[Passage],
        run: Run | None = None,
        *,
        entropy: bool = False,
        forced_depth: Sequence[np.ndarray] | None = None,
    ) -> list[Scores]:
        """Scores of every passage, in order; a passage's inputs must fit the model's context.

        ``forced_depth``: act on PyTorch only, int64 [len(inputs)] per passage, the recurrence each token stops at.
        Raises UsageError when the model or the backend cannot do what is asked.
        """
        run = run or Run()
        config = self.model.config
        too_long = next((len(p.inputs) for p in passages if len(p.inputs) > config.context_length), None)
        if too_long is not None:
            raise UsageError(f"a passage of {too_long} tokens does not fit the context of {config.context_length}")
        if forced_depth is not None and (self.module is None or not isinstance(config, ActConfig)):
            raise UsageError("forced depths need an 'act' model on the torch backend")
        if run.routing == "teacher-forced" and not isinstance(config, ActConfig) and self.module is None:
            raise UsageError("teacher-forced routing needs the torch backend; a decoder's router sees the prefix only")
        prefix_by_prefix = isinstance(config, MixtureConfig) and run.routing == "causal"
        if self.module is None or prefix_by_prefix:
            return [self._decode(passage, run, entropy) for passage in passages]
        scores: list[Scores | None] = [None] * len(passages)
        # A router that pools over the whole row would see the padding, so its rows must be of one length.
        ragged = isinstance(config, ActConfig) or run.routing == "causal"
        for batch in _batches([len(p.inputs) for p in passages], ragged):
            chosen = [passages[i] for i in batch]
            forced = None if forced_depth is None else [forced_depth[i] for i in batch]
            for i, one in zip(batch, self._dense(chosen, run, entropy, forced), strict=True):
                scores[i] = one
        return [one for one in scores if one is not None]

    def _decode(self, passage: Passage, run: Run, entropy: bool) -> Scores:
        decoder = self.model.new_decoder(run.depth)
        if passage.first:
            decoder.feed([passage.inputs[: passage.first].tolist()])
        logprob, depth, greedy, entropies = [], [], [], []
        for start in range(passage.first, len(passage.inputs), DECODER_CHUNK):
            part = slice(start, start + DECODER_CHUNK)
            result = decoder.feed([passage.inputs[part].tolist()], report="all")
            targets = passage.targets[part]
            logprobs = log_softmax(result.logits)
            logprob.append(logprobs[np.arange(len(targets)), targets])
            greedy.append(result.logits.argmax(axis=-1) == targets)
            depth.append(np.array([trace.depth for trace in result.traces]))
            if entropy:
                entropies.append(_entropy(logprobs))
        return Scores(
            np.concatenate(logprob),
            np.concatenate(depth),
            np.concatenate(greedy),
            np.concatenate(entropies) if entropy else None,
        )

    def _dense(
        self, passages: list[Passage], run: Run, entropy: bool, forced: list[np.ndarray] | None
    ) -> Iterator[Scores]:
        """One batch through the dense forward; rows are padded at their end, which no earlier position sees."""
        import torch

        longest = max(len(p.inputs) for p in passages)
        ids = np.zeros((len(passages), longest), dtype=np.int64)
        wanted = np.zeros(ids.shape, dtype=bool)
        for row, passage in enumerate(passages):
            ids[row, : len(passage.inputs)] = passage.inputs
            wanted[row, passage.first : len(passage.inputs)] = True
        depths = None
        if forced is not None:
            depths = np.ones(ids.shape, dtype=np.int64)
            for row, one in enumerate(forced):
                depths[row, : len(one)] = one
        targets = np.concatenate([p.targets[p.first :] for p in passages])
        assert self.module is not None
        device = next(self.module.parameters()).device
        half = self.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            take = torch.from_numpy(wanted).to(device)
            states, depth = self._forward(torch.from_numpy(ids).to(device), run, depths)
            states, depth = states[take], depth.expand(take.shape)[take]
            parts = []
            size = HEAD_TOKENS[self.precision]
            for start in range(0, len(targets), size):
                part = slice(start, start + size)
                parts.append(self._predictions(states[part], targets[part], entropy))
        logprob, greedy, entropies = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        cuts = np.cumsum([len(p) for p in passages])[:-1]
        arrays = (logprob, depth.cpu().numpy().astype(np.float64), greedy, entropies)
        for one in zip(
            *(np.split(array, cuts) if len(array) else [array] * len(passages) for array in arrays), strict=True
        ):
            yield Scores(one[0], one[1], one[2], one[3] if entropy else None)

    def _forward(self, ids: Any, run: Run, forced: np.ndarray | None) -> tuple[Any, Any]:
        """What `_predictions` reads of every position (act: hidden states, others: logits), and depths."""
        import torch

        config, module, steps = self.model.config, self.module, run.depth.max_steps
        assert module is not None
        if isinstance(config, ActConfig):
            depths = None if forced is None else torch.from_numpy(forced).to(ids.device)
            output = module(ids, max_steps=steps, threshold=run.depth.halt_threshold, forced_depth=depths)
            return output.hidden, output.depth
        if isinstance(config, MixtureConfig):
            output = module(ids, batch="rows", max_steps=steps)
            return output.logits, output.steps.double().mean(dim=1)[:, None]
        routing = "prefix" if run.routing == "causal" else "sequence"
        output = module(ids, routing=routing, max_steps=steps)
        if isinstance(config, BlendConfig):
            p = output.router_probabilities
            count = min(config.max_steps, steps or config.max_steps)
            taken = torch.arange(1, count + 1, dtype=torch.float64, device=ids.device)
            depth = (p[..., 1 : count + 1].double() * taken).sum(-1)
        else:
            depth = output.steps.double()
        return output.logits, depth if depth.dim() == 2 else depth[:, None]

    def _predictions(self, states: Any, targets: np.ndarray, entropy: bool) -> tuple[np.ndarray, ...]:
        """Log-probability [n] of each target, whether it is the argmax, entropy ([0] when not asked for)."""
        import torch

        assert self.module is not None
        logits = self.module.head(states) if isinstance(self.model.config, ActConfig) else states
        logits = logits if logits.dtype == torch.float64 else logits.float()
        wanted = torch.from_numpy(targets).to(logits.device)
        normaliser = torch.logsumexp(logits, dim=-1)
        logprob = (logits.gather(-1, wanted[:, None]).squeeze(-1) - normaliser).double()
        greedy = logits.argmax(-1) == wanted
        entropies = torch.zeros(0)
        if entropy:
            expected = (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
            entropies = (normaliser - expected).double()
        return logprob.cpu().numpy(), greedy.cpu().numpy(), entropies.cpu().numpy()


def load_scorer(name: str, backend: str = "torch", device: str = "auto", precision: str = "float32") -> Scorer:
    """A scorer for a bundled model or a model directory; ``backend`` and ``device`` as for `load_model`."""
    model = load_model(name, backend, device)
    if model.backend_name != "torch":
        return Scorer(model, None, precision)
    from rlm_engine.backends.torch import TorchBackend
    from rlm_engine.checkpoint import read_model_directory
    from rlm_engine.models import module_from

    loaded = model.backend
    assert isinstance(loaded, TorchBackend)
    config, tensors = read_model_directory(find_model(name))
    module = module_from(config, tensors).to(loaded.device)
    model.backend = TorchBackend(module.pieces(), loaded.dtype, loaded.device)  # one copy of the weights
    return Scorer(model, module, precision)


def start_token(model: Model) -> int:
    """What stands in front of a text: the tokenizer's <bos> where it has one, else the end of the text before."""
    special = model.tokenizer.special if model.tokenizer is not None else {}
    return special.get("<bos>", model.config.eos_token_id)


def _batches(lengths: Sequence[int], ragged: bool) -> Iterator[list[int]]:
    """Indices in groups of similar (or, if not ``ragged``, equal) length, each of at most BATCH_TOKENS tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for i in order:
        full = batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS
        if full or (batch and not ragged and lengths[i] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _entropy(logprobs: np.ndarray) -> np.ndarray:
    terms = np.where(np.isfinite(logprobs), np.exp(logprobs) * logprobs, 0.0)
    return -np.asarray(terms.sum(axis=-1))
