"""The training loop of every stage: a stage brings its data, everything else is here."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlm_engine.errors import UsageError
from rlm_engine.models.act import ActModel, ActOutput
from rlm_training.losses import SampledVocabulary, head_cross_entropy
from rlm_training.optim import HybridOptimizer
from rlm_training.recipe import Recipe
from rlm_training.runs import Metrics, load_checkpoint, save_checkpoint
from rlm_training.stream import Batch

MAX_SKIPPED_STEPS = 20  # non-finite or exploding losses in a row before the run is stopped


class Batches(Protocol):
    """Data of a stage, addressed by step."""

    def batch(self, step: int, sequence: int) -> Batch: ...


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its checkpoint."""


class Trainer:
    """One run in one folder. Every random choice is a function of (seed, step): a resumed run repeats to the bit."""

    def __init__(
        self,
        recipe: Recipe,
        model: ActModel,
        batches: Batches,
        steps: int,
        folder: Path,
        *,
        token_counts: Tensor | None = None,
        heldout: dict[str, np.ndarray] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.recipe, self.model, self.batches, self.steps, self.folder = recipe, model, batches, steps, folder
        self._heldout, self._report = heldout or {}, report
        train = recipe.train
        frozen = ("embedding.weight",) if train.freeze_embedding else ()
        self.optimizer = HybridOptimizer(model, recipe.optim, frozen)
        self._dense_step: Any = torch.compile(model.dense_step, dynamic=False) if train.compile else None
        self._sampled: SampledVocabulary | None = None
        if train.sampled_vocabulary and token_counts is not None:
            frequent = int(train.sampled_vocabulary * 0.7)
            self._sampled = SampledVocabulary(token_counts, frequent, train.sampled_vocabulary - frequent)
        self._stop = False

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end; returns the last metrics. Raises Interrupted after saving when asked to stop."""
        state = load_checkpoint(self.folder) if resume else None
        start = 0
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        metrics = Metrics(self.folder, start)
        last: dict[str, Any] = {}
        skipped, saved_at = 0, time.monotonic()
        usual_loss = math.inf if state is None else state["usual_loss"]
        with self._signals():
            for step in range(start, self.steps):
                began = time.monotonic()
                values = self._step(step, usual_loss)
                if values is None:
                    skipped += 1
                    if skipped > MAX_SKIPPED_STEPS:
                        raise UsageError(
                            f"{self.folder}: the loss was not finite or exploded {skipped} times in a row at step "
                            f"{step}; resume from the checkpoint with a lower learning rate (--set optim.lr=...)"
                        )
                    continue
                skipped = 0
                usual_loss = values["loss"] if usual_loss == math.inf else 0.98 * usual_loss + 0.02 * values["loss"]
                values["tokens_per_s"] = round(values["tokens"] / (time.monotonic() - began), 1)
                every = self.recipe.train.validate_every
                if self._heldout and every and ((step + 1) % every == 0 or step + 1 == self.steps):
                    values["heldout"] = self._validate()
                metrics.write(values)
                last = values
                if self._report:
                    self._report(values)
                overdue = time.monotonic() - saved_at > 60 * self.recipe.train.checkpoint_minutes
                if overdue or self._stop or step + 1 == self.steps:
                    self._save(step + 1, usual_loss)
                    saved_at = time.monotonic()
                if self._stop and step + 1 < self.steps:
                    raise Interrupted
        return last

    def _step(self, step: int, usual_loss: float) -> dict[str, Any] | None:
        recipe, train = self.recipe, self.recipe.train
        batch = self.batches.batch(step, train.sequence)
        depth = self._depth_budget(step)
        price = recipe.ponder.price_at(step, self.steps)
        weights = torch.from_numpy(batch.weights).flatten()
        with self._autocast():
            output = self._forward(batch, depth)
            loss, losses = self._loss(output, batch, weights, step)
            ponder = output.ponder_cost
            total = loss + price * ponder
        if not torch.isfinite(total) or float(loss.detach()) > 2.0 * usual_loss + 1.0:
            self.optimizer.skip()
            return None
        total.backward()  # type: ignore[no-untyped-call]
        scale = recipe.schedule.scale(step, self.steps)
        norm = self.optimizer.step(scale)
        depths = output.depth.flatten()[weights > 0].float()
        return {
            "step": step,
            "loss": round(float((losses * weights).sum() / weights.sum()), 5),
            "depth": round(float(depths.mean()), 3),
            "depth_std": round(float(depths.std(unbiased=False)), 3),
            "budget": depth,
            "price": round(price, 6),
            "lr_scale": round(scale, 5),
            "grad_norm": round(norm, 4),
            "tokens": batch.inputs.size,
        }

    def _forward(self, batch: Batch, depth: int) -> ActOutput:
        mask = None
        if batch.documents is not None:
            documents = torch.from_numpy(batch.documents)
            mask = (documents[:, :, None] == documents[:, None, :])[:, None]
        return self.model(
            torch.from_numpy(batch.inputs), document_mask=mask, max_steps=depth, dense_step=self._dense_step
        )

    def _loss(self, output: ActOutput, batch: Batch, weights: Tensor, step: int) -> tuple[Tensor, Tensor]:
        targets = torch.from_numpy(batch.targets).flatten()
        hidden = output.hidden.flatten(0, 1)
        table, offset = self.model.embedding.weight, None
        if self._sampled is not None and step < self.recipe.train.full_softmax_from * self.steps:
            generator = torch.Generator().manual_seed(self.recipe.train.seed * 1_000_003 + step)
            ids, targets, offset = self._sampled.draw(targets, generator)
            table = table[ids]
        return head_cross_entropy(
            hidden,
            table,
            targets,
            weights / weights.sum(),
            offset=offset,
            cap=self.model.config.logit_softcap,
            compiled=self.recipe.train.compile,
        )

    def _depth_budget(self, step: int) -> int:
        """Recurrences of this step: the growth schedule, sometimes a random earlier stop."""
        most = self.recipe.ponder.max_steps(step, self.steps)
        rng = np.random.default_rng([self.recipe.train.seed, 3, step])
        if most > 3 and rng.random() < self.recipe.ponder.random_stop:
            return int(rng.integers(3, most))
        return most

    def _validate(self) -> dict[str, float]:
        """Mean loss in nats per held-out domain at the depth of now."""
        result = {}
        with torch.no_grad(), self._autocast():
            for name, rows in self._heldout.items():
                ids = torch.from_numpy(rows)
                output = self.model(ids[:, :-1], max_steps=self.recipe.ponder.max_steps(self.steps - 1, self.steps))
                logits = self.model.head(output.hidden).float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                result[name] = round(float(loss), 4)
        return result

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.train.precision == "bfloat16":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def _save(self, step: int, usual_loss: float) -> None:
        state = {
            "step": step,
            "usual_loss": usual_loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder, state)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save and stop."""

        def stop(*_: object) -> None:
            self._stop = True

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
