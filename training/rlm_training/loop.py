"""The training loop of every stage and design: a stage brings data and objective, everything else is here.

metrics.jsonl has a line per step: step, loss (nats per token; DPO: its loss), depth and depth_std (over the tokens
that count), depth_histogram (tokens at depth 0, 1, ...), budget, price, lr_scale, grad_norm, tokens, tokens_per_s,
mfu (against the measured matrix-product rate), heldout {source: nats per token} where it was validated, and what the
design and the stage add (ponder, gate_loss, router_loss, computation_loss; accuracy, margin, chosen_loss).
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import ModelConfig
from rlm_engine.errors import InputError, UsageError
from rlm_training import runs, sharding
from rlm_training.act_design import Act
from rlm_training.allocator import release_free_memory
from rlm_training.attention import fast_attention
from rlm_training.averaging import WeightAverage
from rlm_training.compute import training_flops
from rlm_training.designs import Plan
from rlm_training.display import Display, Silent
from rlm_training.distributed import Objective, World, add_up, barrier, gradients_stay, whole_tensors, wrap
from rlm_training.losses import SampledVocabulary
from rlm_training.micro import Micro, Steps
from rlm_training.optim import HybridOptimizer
from rlm_training.recipe import Recipe

MAX_SKIPPED_STEPS = 20  # non-finite or exploding losses in a row before the run is stopped
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its checkpoint."""


class Trainer:
    """One run in one folder. Every random choice is a function of (seed, step): a resumed run repeats to the bit."""

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        data: Steps,
        steps: int,
        folder: Path,
        config: ModelConfig,
        world: World | None = None,
        *,
        heldout: dict[str, Micro] | None = None,
        token_counts: Tensor | None = None,
        display: Display | None = None,
        matmul_rate: float = 0.0,
        tokenizer_files: Sequence[Path] = (),
    ):
        """``config`` and ``tokenizer_files`` are written with exported models; ``matmul_rate``: FLOP/s, for the
        utilisation (0: not shown)."""
        self.recipe, self.objective, self.steps, self.folder = recipe, objective, steps, folder
        self._tokenizer_files = tokenizer_files
        self._config, self._data, self._heldout = config, data, heldout or {}
        self._world = world or World()
        self._display, self._matmul_rate = display or Silent(), matmul_rate
        train, device = recipe.train, self._world.device
        self._model, self._design = objective.model, objective.design
        if train.freeze_embedding:
            _token_table(self._model).requires_grad_(False)
        slices = train.slices(self._world.size)
        own = slices // self._world.size
        self._slices, self._own = slices, range(self._world.rank * own, (self._world.rank + 1) * own)
        self._wrapped = wrap(objective, self._world, train.fsdp)
        scaler = torch.amp.GradScaler(device.type) if train.precision == "float16" else None
        self._scaler, self.optimizer = scaler, HybridOptimizer(self._model, recipe.optim, scaler)
        self._average = WeightAverage(self._model, train.average) if train.average else None
        self._sampled: SampledVocabulary | None = None
        if train.sampled_vocabulary and token_counts is not None:
            frequent = int(train.sampled_vocabulary * 0.7)
            self._sampled = SampledVocabulary(token_counts, frequent, train.sampled_vocabulary - frequent)
        self._gate_step = recipe.ponder.gate_step(steps) if isinstance(self._design, Act) else steps
        self._frozen = self._stop = False
        self._usual_loss = self._best = math.inf

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end; returns the last metrics. Raises Interrupted after saving when asked to stop."""
        start = self._restore() if resume else 0
        leads = self._world.leads
        metrics = runs.Metrics(self.folder, start, self.recipe.train.tensorboard) if leads else None
        last: dict[str, Any] = {"step": start}
        skipped, saved_at = 0, time.monotonic()
        self._train_mode()
        closed = contextlib.nullcontext() if metrics is None else contextlib.closing(metrics)
        with self._signals(), self._display.running(start, self.steps), closed:
            for step in range(start, self.steps):
                began = time.monotonic()
                overdue = began - saved_at > 60 * self.recipe.train.checkpoint_minutes
                values, (stop, save_now) = self._step(step, [float(self._stop), float(overdue and leads)])
                if values is None:
                    skipped += 1
                    self._display.note(f"step {step}: the loss was not finite or exploded; no update")
                    self._give_up_after(skipped, step)
                else:
                    skipped, last = 0, values
                    self._add_speed(values, time.monotonic() - began)
                    if self._is_validation(step):
                        values["heldout"] = self._validate(values)
                    if metrics is not None:
                        metrics.write(values)
                    self._display.step(values)
                if self._world.size == 1:
                    stop = stop or float(self._stop)  # asked for during the step: nobody else has to agree
                if save_now or stop or step + 1 == self.steps:
                    self._save(step + 1)
                    saved_at = time.monotonic()
                if stop and step + 1 < self.steps:
                    raise Interrupted
        return last

    def export(self, target: Path, last: dict[str, Any]) -> None:
        """Write the model, averaged if the recipe averages, as a model directory; ``last`` metrics go to its config.

        Raises InputError when it cannot be written (disk full); what was there before stays.
        """
        provenance = self._config.provenance | {"last": {k: last[k] for k in ("step", "loss", "depth") if k in last}}
        with self._average.applied() if self._average is not None else contextlib.nullcontext():
            tensors = whole_tensors(self._model)
            if self._world.leads:
                try:
                    write_model_directory(target, replace(self._config, provenance=provenance), tensors)
                    for file in self._tokenizer_files:
                        shutil.copyfile(file, target / file.name)
                except (OSError, SafetensorError) as error:
                    why = runs.write_reason(error, self.folder)
                    raise InputError(f"{target}: could not be written ({why}); make room and run --resume") from None
                finally:
                    barrier(self._world)
            else:
                barrier(self._world)

    def _step(self, step: int, flags: list[float]) -> tuple[dict[str, Any] | None, tuple[float, float]]:
        """One update. Returns what it measured (None when it was left out) and the flags summed over all processes."""
        recipe, world = self.recipe, self._world
        if step >= self._gate_step and not self._frozen:
            self._freeze_trunk()
        plan = self._plan(step)
        micros = self._data.micros(step, self._slices, self._own, world.device)
        statistics = []
        for micro in micros:
            # dropout: the same whatever process computes this slice, whenever
            torch.manual_seed((recipe.train.seed * 1_000_003 + step) * 65_537 + micro.index)
            with gradients_stay(self._wrapped, micro is not micros[-1]):
                with self._autocast():
                    loss, measured = self._wrapped(micro, plan)
                loss = loss * world.size  # DDP and FSDP average over processes; the slices are shares of a sum
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            statistics.append(measured)
        sums, (stop, save) = add_up(statistics, flags, world)
        scale = recipe.schedule.scale(step, self._gate_step) if step < self._gate_step else 1.0
        norm: float | None = None
        if math.isfinite(sums["total"]) and sums["loss"] <= 2.0 * self._usual_loss + 1.0:
            norm = self.optimizer.step(scale, recipe.schedule.beta1(step, self._gate_step))
        if norm is None:
            self.optimizer.skip()
            if isinstance(self._design, Act):
                self._design.segments.clear()  # what a failed step remembered is not worth keeping
            return None, (stop, save)
        if self._average is not None:
            self._average.update()
        usual, loss_now = self._usual_loss, sums["loss"]
        self._usual_loss = loss_now if usual == math.inf else 0.98 * usual + 0.02 * loss_now
        return self._values(plan, sums, scale, norm), (stop, save)

    def _values(self, plan: Plan, sums: dict[str, Any], scale: float, norm: float) -> dict[str, Any]:
        histogram = [int(n) for n in sums.pop("depth_histogram")]
        counted = max(sum(histogram), 1)
        mean = sums.pop("depth") / counted
        variance = max(sums.pop("depth_squared") / counted - mean * mean, 0.0)
        loss = sums.pop("loss")
        sums.pop("total")
        pairs = 2 if self.recipe.stage == "dpo" else 1
        return {
            "step": plan.step,
            "loss": loss,
            "depth": round(mean, 3),
            "depth_std": round(math.sqrt(variance), 3),
            "depth_histogram": histogram,
            "budget": plan.budget or self._design.deepest,
            "price": round(plan.price, 6),
            "lr_scale": round(scale, 5),
            "grad_norm": round(norm, 4),
            "tokens": self.recipe.train.rows * self.recipe.train.sequence * pairs,
            **{name: round(value, 6) for name, value in sums.items()},
        }

    def _add_speed(self, values: dict[str, Any], seconds: float) -> None:
        values["tokens_per_s"] = round(values["tokens"] / seconds, 1)
        if self._matmul_rate:
            act = isinstance(self._design, Act)
            flops = training_flops(
                self.recipe, values["budget"] if act else values["depth"], values["step"], self.steps
            )
            rate = self._matmul_rate * self._world.size
            values["mfu"] = round(flops * values["tokens"] / seconds / rate, 4)

    def _plan(self, step: int) -> Plan:
        vocabulary = self._draw_vocabulary(step)
        if not isinstance(self._design, Act):
            return Plan(step, vocabulary=vocabulary)
        ponder = self.recipe.ponder
        budget, gate = self._depth_budget(step), None
        if step >= self._gate_step:
            budget = ponder.max_steps(step, self.steps)
            rng = np.random.default_rng([self.recipe.train.seed, 4, step])
            gate = int(rng.integers(self._design.model.config.min_steps, budget))
        memory = ponder.memory_tokens(step, self.steps)
        return Plan(step, budget, ponder.price_at(step, self.steps), memory, gate, vocabulary)

    def _depth_budget(self, step: int) -> int:
        """Recurrences of this step: by growth, sometimes a random earlier stop; DPO: all, as its reference."""
        ponder = self.recipe.ponder
        if self.recipe.stage == "dpo":
            return self._design.deepest
        most = ponder.max_steps(step, self.steps)
        rng = np.random.default_rng([self.recipe.train.seed, 3, step])
        if most > 3 and rng.random() < ponder.random_stop:
            return int(rng.integers(3, most))
        return most

    def _draw_vocabulary(self, step: int) -> tuple[Tensor, Tensor, Tensor] | None:
        if self._sampled is None or step >= self.recipe.train.full_softmax_from * self.steps:
            return None
        # the whole batch's targets, so that all its slices compete against the same ids
        everything = self._data.micros(step, self._slices, range(self._slices), torch.device("cpu"))
        targets = torch.cat([micro.targets.flatten() for micro in everything])
        generator = torch.Generator().manual_seed(self.recipe.train.seed * 1_000_003 + step)
        ids, places, offset = self._sampled.draw(targets, generator)
        device = self._world.device
        return ids.to(device), places.to(device), offset.to(device)

    def _train_mode(self) -> None:
        self._model.train(self.recipe.stage != "dpo")  # no dropout there: the reference had none

    def _freeze_trunk(self) -> None:
        assert isinstance(self._design, Act)
        self._design.freeze_trunk()
        self._wrapped = wrap(self.objective, self._world, fsdp=False)  # DDP must learn which gradients will come
        self._frozen = True

    def _is_validation(self, step: int) -> bool:
        every = self.recipe.train.validate_every
        return bool(self._heldout and every and ((step + 1) % every == 0 or step + 1 == self.steps))

    def _validate(self, values: dict[str, Any]) -> dict[str, float]:
        """Mean loss in nats per token of every held-out source, teacher-forced, at the depth of now.

        The weights with the lowest mean so far are kept as a model directory, `best`.
        """
        plan = Plan(self.steps)
        if isinstance(self._design, Act):
            plan = Plan(self.steps, budget=self.recipe.ponder.max_steps(values["step"], self.steps))
        result = {}
        self._model.eval()
        averaged = self._average.applied() if self._average is not None else contextlib.nullcontext()
        with averaged, torch.no_grad(), self._autocast():
            for name, micro in self._heldout.items():
                result[name] = round(float(self.objective(micro, plan)[1]["loss"]), 4)
        self._train_mode()
        mean = sum(result.values()) / len(result)
        if mean < self._best:
            self._best = mean
            try:
                self.export(self.folder / "best", values)
            except InputError as error:  # the run is worth more; its checkpoint will say so if there is no room either
                self._display.note(str(error))
        return result

    def _give_up_after(self, skipped: int, step: int) -> None:
        if skipped > MAX_SKIPPED_STEPS:
            raise UsageError(
                f"{self.folder}: the loss was not finite or exploded {skipped} times in a row up to step {step}; "
                "resume from the checkpoint with a lower learning rate (--resume --set optim.lr=...)"
            )

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = AUTOCAST.get(self.recipe.train.precision)
        cast = contextlib.nullcontext() if dtype is None else torch.autocast(self._world.device.type, dtype)
        with cast, fast_attention():
            yield

    def _save(self, step: int) -> None:
        world, progress = self._world, {"usual_loss": self._usual_loss, "best": self._best}
        if isinstance(self._design, Act):
            runs.save_memories(self.folder, step, world.rank, self._design.state_dict())
        barrier(world)
        average = self._average.state_dict() if self._average is not None else None
        if self.recipe.train.fsdp:
            sharding.save(self.folder, step, progress, self.objective, self.optimizer, average, world)
        elif world.leads:
            state = {"step": step, **progress, "average": average}
            state |= {"model": self._model.state_dict(), "optimizer": self.optimizer.state_dict()}
            runs.save_checkpoint(self.folder, step, state)
        if world.leads:
            runs.prune(self.folder, self.recipe.train.keep)
        release_free_memory()
        barrier(world)

    def _restore(self) -> int:
        """Load the newest checkpoint; returns the step to go on with (0 when there is none)."""
        state: dict[str, Any] | None
        if self.recipe.train.fsdp:
            average = self._average.state_dict() if self._average is not None else None
            state = sharding.load(self.folder, self.objective, self.optimizer, average)
        else:
            state = runs.load_checkpoint(self.folder)
            if state is not None:
                self._model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
        if state is None:
            return 0
        if self._average is not None and state.get("average") is not None:
            self._average.load_state_dict(state["average"])
        self._usual_loss, self._best = state["usual_loss"], state.get("best", math.inf)
        step = int(state["step"])
        if isinstance(self._design, Act):
            self._design.load_state_dict(runs.load_memories(self.folder, step), self._world.device)
        return step

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save and stop; a second SIGINT stops at once."""

        def stop(number: int, _: object) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _token_table(model: torch.nn.Module) -> torch.nn.Parameter:
    """The table of token embeddings: the first embedding of every design."""
    tables = (module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding))
    table = next(tables)
    assert isinstance(table, torch.nn.Parameter)
    return table
