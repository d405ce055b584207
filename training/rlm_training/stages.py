"""A run from recipe to model directory: where the weights start, which stage brings the data, what is written."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlm_engine.checkpoint import read_config, read_model_directory
from rlm_engine.config import ChatFormat, ModelConfig
from rlm_engine.errors import EngineError, UsageError
from rlm_engine.models import build_model
from rlm_engine.models.act import ActModel
from rlm_training import runs
from rlm_training.act_design import Act
from rlm_training.compute import describe, measure_matmul_rate
from rlm_training.designs import Design, published_design
from rlm_training.display import Display, display_for
from rlm_training.distributed import Objective, World, barrier, joined, lost_a_process
from rlm_training.loop import Trainer
from rlm_training.micro import Micro, Steps, TokenSteps
from rlm_training.objectives import PreferenceObjective, TokenObjective
from rlm_training.recipe import Recipe
from rlm_training.shards import Source, digests, load_sources, read_index
from rlm_training.stream import FirstRows, PackedConversations, first_conversations
from rlm_training.unigram import unigram_losses

RATE_SECONDS = 0.3  # for the utilisation shown during a run


@dataclass(frozen=True)
class StageData:
    """What a stage brings. ``facts`` go to data.json.

    ``notes``: what the person should know before it starts. ``token_counts``: of the sources, for the sampled softmax;
    ``seen_counts``: of what the run reads, for the unigram model that held-out losses are compared with.
    """

    data: Steps
    steps: int
    facts: dict[str, Any]
    token_counts: torch.Tensor | None = None
    seen_counts: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


# (recipe, objective, folder of the run, world) -> data
Stage = Callable[[Recipe, Objective, Path, World], StageData]


def train(recipe: Recipe, folder: Path, resume: bool, display: Display | None = None) -> Path:
    """Run a recipe in a folder and write the trained model directory `folder/model`; returns its path.

    Under torchrun every process calls this. Raises UsageError when the folder already holds a run and ``resume`` is
    off, when a resumed run would read other data, or for impossible recipes; `loop.Interrupted` when asked to stop.
    """
    with joined(recipe.train.device) as world:
        try:
            return _train(recipe, folder, resume, world, display)
        except RuntimeError as error:
            if world.size > 1 and lost_a_process(error):
                raise EngineError(
                    "another process of this job failed (its own message says why); start the job again with --resume"
                ) from None
            raise


def _train(recipe: Recipe, folder: Path, resume: bool, world: World, display: Display | None) -> Path:
    if not resume and runs.checkpoints(folder):
        raise UsageError(f"{folder} already holds a run; continue it with --resume or choose another folder")
    if recipe.train.fsdp and world.size == 1:
        raise UsageError("train.fsdp shards over processes: start it with torchrun --nproc-per-node 2 or more")
    recipe.train.slices(world.size)
    if resume:
        _same_data(recipe, folder)
    barrier(world)
    torch.manual_seed(recipe.train.seed)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if recipe.train.compile:
        torch._dynamo.config.recompile_limit = 64  # a compilation per memory length, and one for the frozen trunk
    model = start_model(recipe).to(world.device)
    objective = make_objective(recipe, model)
    stage = stage_of(recipe)(recipe, objective, folder, world)
    config = _export_config(recipe)
    heldout = heldout_micros(recipe, objective.design, world.device)
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
        facts = {"steps": stage.steps, **stage.facts, "sources": digests(Path(recipe.data.prepared))}
        if stage.seen_counts is not None and heldout:
            facts["unigram"] = unigram_losses(stage.seen_counts, heldout)
        (folder / "data.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    display = display or display_for(recipe.name, world.leads)
    rate = measure_matmul_rate(recipe.train.precision, world.device, RATE_SECONDS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for note in (describe(recipe, parameters, stage.steps, rate), *stage.notes):
        display.note(note)
    trainer = Trainer(
        recipe,
        objective,
        stage.data,
        stage.steps,
        folder,
        config,
        world,
        heldout=heldout,
        token_counts=stage.token_counts,
        display=display,
        matmul_rate=rate,
        tokenizer_files=_tokenizer_files(recipe),
    )
    last = trainer.run(resume)
    trainer.export(folder / "model", last)
    return folder / "model"


def stage_of(recipe: Recipe) -> Stage:
    """What brings the data of the recipe's stage."""
    from rlm_training.dpo import dpo
    from rlm_training.pretrain import pretrain
    from rlm_training.sft import sft

    return {"pretrain": pretrain, "sft": sft, "dpo": dpo}[recipe.stage]


def dry_run(recipe: Recipe) -> str:
    """What a recipe would do: parameters, FLOPs per token, expected time at a measured speed. Reads no data."""
    from rlm_training.distributed import choose_device
    from rlm_training.pretrain import step_count

    with torch.device("meta"):
        model = build_model(recipe.model)
    parameters = sum(p.numel() for p in model.parameters())
    rate = measure_matmul_rate(recipe.train.precision, choose_device(recipe.train.device))
    return describe(recipe, parameters, step_count(recipe) if recipe.stage == "pretrain" else None, rate)


def start_model(recipe: Recipe) -> Any:
    """New random weights by the design's own rule, or those of train.init. ModelError when these are unusable."""
    if not recipe.train.init:
        generator = torch.Generator().manual_seed(recipe.train.seed)
        return build_model(recipe.model).initialise(generator)
    _, tensors = read_model_directory(Path(recipe.train.init))
    model = build_model(recipe.model)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    return model


def make_objective(recipe: Recipe, model: Any) -> Objective:
    """Model and recipe as something to minimise."""
    train = recipe.train
    design: Design
    if isinstance(model, ActModel):
        design = Act(model, recipe.ponder, train.compile, train.recompute, train.skip_halted)
    else:
        design = published_design(model, recipe.router, train.compile, train.recompute)
    if recipe.stage == "dpo":
        return PreferenceObjective(design, recipe.dpo)
    return TokenObjective(design, train.compile)


def prepared_sources(recipe: Recipe, folder: Path) -> dict[str, Source]:
    """The sources of a prepared folder. UsageError when its tokenizer is not the model's."""
    index, model = read_index(folder), recipe.model
    added = list(model.added_tokens)
    if index["tokenizer"] != model.tokenizer or index["added_tokens"][: len(added)] != added:
        raise UsageError(
            f"{folder} was prepared with tokenizer {index['tokenizer']!r} {index['added_tokens']}, the model has "
            f"{model.tokenizer!r} {added}"
        )
    return load_sources(folder)


def check_ids(sources: list[Source], recipe: Recipe) -> torch.Tensor:
    """How often each id occurs in the sources, int64 [vocabulary]. UsageError when one is outside the vocabulary."""
    size = recipe.model.vocab_size
    counts = np.zeros(size, dtype=np.int64)
    for source in sources:
        found = np.bincount(np.asarray(source.tokens), minlength=size)
        if len(found) > size:
            raise UsageError(
                f"source {source.name!r} holds token {len(found) - 1}, beyond the model's vocabulary of {size}; leave "
                "it out of data.mix, or give the model the tokenizer the data was prepared with"
            )
        counts += found
    return torch.from_numpy(counts)


def heldout_micros(recipe: Recipe, design: Design, device: torch.device) -> dict[str, Micro]:
    """The first rows of every held-out source, read as the stage reads its data.

    After pretraining conversations are packed and masked like those of SFT, and only their reply tokens count.
    """
    if not recipe.data.heldout:
        return {}
    sequence, most, found = recipe.train.sequence, recipe.data.validation_rows, {}
    sources = prepared_sources(recipe, Path(recipe.data.heldout))
    files = [
        read_index(Path(folder)).get("tokenizer_files", {}) for folder in (recipe.data.prepared, recipe.data.heldout)
    ]
    if files[0] != files[1]:
        raise UsageError(
            f"{recipe.data.heldout} was prepared with another {next(iter(files[0] or files[1]))} than "
            f"{recipe.data.prepared}; prepare both with the same --tokenizer"
        )
    for name, source in sources.items():
        check_ids([source], recipe)
        stream: FirstRows | PackedConversations = FirstRows(source, sequence, most)
        if recipe.stage != "pretrain" and source.mask is not None:
            stream = first_conversations(source, sequence, most, alone=not design.masked)
        if stream.rows:
            found[name] = TokenSteps(stream, sequence, design.padding, design.masked).micros(0, 1, range(1), device)[0]
    return found


def _same_data(recipe: Recipe, folder: Path) -> None:
    """Refuse to resume with settings under which the steps already done would have read something else."""
    path = folder / "recipe.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(recipe.to_dict()))
    keys: dict[str, tuple[str, ...]] = {"data": ("mix", "stream_tokens", "conversations", "replay", "epochs")}
    keys |= {"train": ("sequence", "rows", "seed"), "dpo": ("max_length_ratio",)}
    for section, names in keys.items():
        for name in names:
            if name in old.get(section, {}) and old[section][name] != new[section][name]:
                raise UsageError(
                    f"{folder} was started with {section}.{name} = {old[section][name]!r}; "
                    f"a resumed run cannot change it to {new[section][name]!r}"
                )
    if old["model"] != new["model"]:
        raise UsageError(f"{folder} was started with another [model]; a resumed run cannot change it")
    facts = folder / "data.json"
    known = json.loads(facts.read_text(encoding="utf-8")).get("sources", {}) if facts.exists() else {}
    used = {**recipe.data.mix, **recipe.data.conversations} or known
    now = digests(Path(recipe.data.prepared))
    for name in used:
        if name in known and known[name] != now.get(name):
            raise UsageError(
                f"{recipe.data.prepared}: source {name!r} is not what {folder} was started with; a resumed run must "
                "read the same tokens"
            )


def _export_config(recipe: Recipe) -> ModelConfig:
    index = read_index(Path(recipe.data.prepared))
    form = index.get("chat_format")
    chat_format = ChatFormat.from_dict(form, "index.json") if form else recipe.model.chat_format
    if not set(index["added_tokens"]) <= set(recipe.model.added_tokens):
        chat_format = recipe.model.chat_format  # a model without the role tokens cannot follow the data's format
    provenance = {
        "trained_with": "rlm-train",
        "recipe": recipe.name,
        "stage": recipe.stage,
        "date": datetime.date.today().isoformat(),
    }
    if recipe.train.init:
        provenance["started_from"] = recipe.train.init
        started = read_config(Path(recipe.train.init)).get("provenance") or {}  # what `calibrate` did stays true
        provenance |= {key: started[key] for key in ("halting_price", "halting_factor") if key in started}
    return dataclasses.replace(recipe.model, chat_format=chat_format, provenance=provenance)


def _tokenizer_files(recipe: Recipe) -> list[Path]:
    """The tokenizer the data was prepared with, to go with the model; none for GPT-2's."""
    prepared = Path(recipe.data.prepared)
    return [prepared / name for name in read_index(prepared).get("tokenizer_files", {})]
