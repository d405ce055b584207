"""`rlm-train report`: a run's folder as one HTML page, or as Markdown, with plots and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlm_engine.errors import InputError
from rlm_training.evaluation_tables import number, percent
from rlm_training.pages import Block, Code, Heading, Note, Plot, Table, render_html, render_markdown
from rlm_training.plots import Line, depth_map, line_plot


@dataclass
class RunRecord:
    """What a run's folder says. ``metrics``: one dictionary per logged step, steps rising."""

    name: str
    metrics: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file name

    @property
    def tokens(self) -> list[int]:
        """Tokens trained on after each logged step, counting steps that were not logged like the next one."""
        total, done, previous = 0, [], -1
        for row in self.metrics:
            total += row.get("tokens", 0) * (row["step"] - previous)
            previous = row["step"]
            done.append(total)
        return done


@dataclass(frozen=True)
class TrainingRow:
    """A line of the training table; losses in nats per token."""

    epoch: float
    step: int
    tokens: int
    train_loss: float
    validation_loss: float | None

    @property
    def perplexity(self) -> float | None:
        """exp of the validation loss."""
        return None if self.validation_loss is None else math.exp(self.validation_loss)


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the page (default: report.html in the folder) and return its path. Raises InputError.

    A target ending in .md becomes Markdown, with its plots as SVG files in a folder beside it, named after it.
    """
    run = read_run(folder)
    target = target or folder / "report.html"
    files = {target: html_report(run)}
    if target.suffix == ".md":
        text, plots = render_markdown(blocks_of(run), target.stem)
        files = {target: text, **{target.parent / name: svg for name, svg in plots.items()}}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from None
    return target


def read_run(folder: Path) -> RunRecord:
    """Read metrics.jsonl, recipe.json, data.json and evaluations (any .json with "heldout" or "tasks" results).

    A last line cut off in the middle (the run goes on) is left out. Raises InputError when there are no metrics.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: missing or unreadable; give the folder of a run") from None
    metrics: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            metrics.append(row)
    if not metrics:
        raise InputError(f"{path}: holds no metrics yet")
    run = RunRecord(
        folder.resolve().name, metrics, _read_json(folder / "recipe.json"), _read_json(folder / "data.json")
    )
    for file in sorted(folder.glob("*.json")):
        content = _read_json(file)
        if isinstance(content.get("heldout"), list) or isinstance(content.get("tasks"), dict):
            run.evaluations[file.name] = content
    return run


def training_table(run: RunRecord) -> list[TrainingRow]:
    """One row per epoch, or per tenth of a run of less than two epochs, and one for where the run stands.

    An epoch is as many tokens as the mix would hold if every source were read once (data.json knows how often each
    is read); without data.json the run counts as one. Training loss: mean over the steps since the row before.
    Validation loss: mean over the domains at the last validation since then.
    """
    tokens = run.tokens
    epochs = epochs_of_run(run)
    whole = _planned_steps(run)
    marks = [n / epochs for n in range(1, math.floor(epochs) + 1)] if epochs >= 2 else [n / 10 for n in range(1, 11)]
    rows: list[TrainingRow] = []
    losses: list[float] = []
    validation: float | None = None
    for i, row in enumerate(run.metrics):
        if isinstance(row.get("loss"), (int, float)):
            losses.append(row["loss"])
        if row.get("heldout"):
            validation = _mean(list(row["heldout"].values()))
        share = (row["step"] + 1) / whole
        last = i + 1 == len(run.metrics)
        reached = [mark for mark in marks if mark <= share + 1e-9]
        if (reached or last) and losses:
            rows.append(TrainingRow(share * epochs, row["step"], tokens[i], _mean(losses), validation))
            marks, losses, validation = marks[len(reached) :], [], None
    return rows


def epochs_of_run(run: RunRecord) -> float:
    """How often the whole run reads its data, weighted by the sources' sizes; 1 when data.json does not say."""
    epochs = run.data.get("epochs")
    mix = run.recipe.get("data", {}).get("mix") or {}
    if not isinstance(epochs, dict) or not set(mix) & set(epochs):
        return 1.0
    shares = {name: mix[name] for name in mix if epochs.get(name)}
    total = sum(shares.values())
    # a source read e times at a share w of the stream holds w/e of the stream's tokens
    held = sum(weight / total / epochs[name] for name, weight in shares.items())
    stream, trained = run.data.get("stream_tokens"), run.recipe.get("train", {}).get("tokens")
    part = min(1.0, trained / stream) if stream and trained else 1.0
    return part / held


def html_report(run: RunRecord) -> str:
    """The whole page; well-formed XML as well as HTML."""
    return render_html(run.name, blocks_of(run))


def blocks_of(run: RunRecord) -> list[Block]:
    """What a report says, in order."""
    blocks: list[Block] = [Heading(1, run.name), _facts(run), *_curves(run), Heading(2, "Training table")]
    rows = [
        (f"{row.epoch:.2f}", f"{row.step + 1:,}", f"{row.tokens:,}", number(row.train_loss, 4),
         number(row.validation_loss, 4), number(row.perplexity))
        for row in training_table(run)
    ]  # fmt: skip
    blocks += [
        Table(("epoch", "step", "tokens", "train loss", "validation loss", "perplexity"), rows),
        Note("Perplexity is exp of the validation loss, the mean over the held-out domains."),
    ]
    for name, evaluation in run.evaluations.items():
        blocks += _evaluation(name, evaluation)
    if run.recipe:
        blocks += [Heading(2, "Recipe"), Code(json.dumps(run.recipe, indent=1, ensure_ascii=False))]
    return blocks


def _facts(run: RunRecord) -> Table:
    last, model, train = run.metrics[-1], run.recipe.get("model", {}), run.recipe.get("train", {})
    speeds = [row["tokens_per_s"] for row in run.metrics if row.get("tokens_per_s")]
    unigram = _unigram(run)
    best = min((_mean(list(row["heldout"].values())) for row in run.metrics if row.get("heldout")), default=None)
    rows = [
        ("recipe", f"{run.recipe.get('name', '-')} ({run.recipe.get('stage', '-')})"),
        (
            "model",
            ", ".join(f"{key} {model[key]}" for key in ("architecture", "d_model", "n_heads", "ffn") if key in model),
        ),
        ("steps", f"{last['step'] + 1:,} of {_planned_steps(run):,}"),
        ("tokens", f"{run.tokens[-1]:,}"),
        ("batch", f"{train['rows']} x {train['sequence']} tokens" if {"rows", "sequence"} <= set(train) else ""),
        ("last training loss", number(last.get("loss"), 4)),
        ("best validation loss", "-" if best is None else f"{best:.4f} (perplexity {math.exp(best):.2f})"),
        ("unigram model's validation loss", "" if unigram is None else f"{unigram:.4f}"),
        ("depth of the last step's tokens", _depths(last.get("depth_histogram"))),
        ("median tokens/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else ""),
    ]
    return Table(("", ""), [row for row in rows if row[1]])


def _unigram(run: RunRecord) -> float | None:
    """Mean over the domains of the unigram model's loss, which data.json has; None without."""
    losses = run.data.get("unigram")
    return _mean(list(losses.values())) if isinstance(losses, dict) and losses else None


def _depths(histogram: Any) -> str:
    """The mean, and how much of it is at either end: whether depth has collapsed or sticks."""
    if not isinstance(histogram, list) or not sum(histogram):
        return ""
    used = [depth for depth, count in enumerate(histogram) if count]
    mean = sum(depth * count for depth, count in enumerate(histogram)) / sum(histogram)
    shares = [percent(histogram[depth] / sum(histogram)) for depth in (used[0], len(histogram) - 1)]
    return f"{mean:.2f} on average; {shares[0]} at {used[0]}, {shares[1]} at {len(histogram) - 1}, the most there is"


def _curves(run: RunRecord) -> list[Block]:
    millions = [tokens / 1e6 for tokens in run.tokens]
    axis = "million tokens"

    def line(key: str, name: str = "", scale: float = 1.0, **options: Any) -> Line:
        found = [
            (x, row[key] * scale) for x, row in zip(millions, run.metrics, strict=True) if _is_number(row.get(key))
        ]
        return Line(name, [x for x, _ in found], [y for _, y in found], **options)

    validated = [(x, row["heldout"]) for x, row in zip(millions, run.metrics, strict=True) if row.get("heldout")]
    at = [x for x, _ in validated]
    mean = Line("validation, mean of domains", at, [_mean(list(v.values())) for _, v in validated], points=True)
    losses = [line("loss", "training"), mean]
    unigram = _unigram(run)
    if unigram is not None:
        losses.append(Line("validation of a unigram model", [millions[0], millions[-1]], [unigram, unigram]))
    names = list(dict.fromkeys(name for _, values in validated for name in values))
    domains = [
        Line(name, [x for x, v in validated if name in v], [v[name] for _, v in validated if name in v], points=True)
        for name in names
    ]
    rate = run.recipe.get("optim", {}).get("lr", 1.0)
    rate_label = "learning rate" if "lr" in run.recipe.get("optim", {}) else "share of the full learning rate"
    plots = [
        ("Loss", line_plot("Loss", axis, "nats per token", losses), _loss_note(run)),
        ("Validation loss by domain", line_plot("Validation loss by domain", axis, "nats per token", domains), ""),
        (
            "Learning rate",
            line_plot("Learning rate", axis, rate_label, [line("lr_scale", scale=rate)], y_min=0.0),
            "",
        ),
        (
            "Depth",
            line_plot("Depth", axis, "recurrences", [_depth_band(run, millions), line("budget", "budget")], y_min=0.0),
            "Band: one standard deviation over tokens. The budget is the most recurrences a step allows.",
        ),
        ("Depth histogram over time", _histogram(run, millions, axis), "Darker: a larger share of the tokens."),
        (
            "Price of depth",
            line_plot("Price of depth", axis, "price per recurrence", [line("price")], y_min=0.0)
            if any(row.get("price") for row in run.metrics)
            else "",
            "",
        ),
        ("Throughput", line_plot("Throughput", axis, "tokens/s", [line("tokens_per_s")], y_min=0.0), ""),
        (
            "Utilisation",
            line_plot("Utilisation", axis, "share of the matmul rate", [line("mfu")], y_min=0.0),
            "",
        ),
        ("Router loss", line_plot("Router loss", axis, "nats", [line("router_loss")]), ""),
        (
            "Gradient norm",
            line_plot("Gradient norm", axis, "norm before clipping", [line("grad_norm")], log_y=True),
            "",
        ),
    ]
    blocks: list[Block] = []
    for title, plot, note in plots:
        if plot:
            blocks += [Heading(2, title), Plot(title, plot), *([Note(note)] if note else [])]
    return blocks


def _loss_note(run: RunRecord) -> str:
    train = run.recipe.get("train", {})
    if not train.get("sampled_vocabulary"):
        return ""
    return (
        f"Until {percent(train.get('full_softmax_from'), 0)} of the run the training loss is a sampled softmax over "
        f"{train['sampled_vocabulary']:,} ids; validation always uses the whole vocabulary."
    )


def _depth_band(run: RunRecord, x: list[float]) -> Line:
    rows = [
        (at, row["depth"], row.get("depth_std") or 0.0)
        for at, row in zip(x, run.metrics, strict=True)
        if _is_number(row.get("depth"))
    ]
    depths = [depth for _, depth, _ in rows]
    low = [depth - std for _, depth, std in rows]
    high = [depth + std for _, depth, std in rows]
    return Line("mean depth", [at for at, _, _ in rows], depths, low, high)


def _histogram(run: RunRecord, x: list[float], axis: str) -> str:
    """From "depth_histogram": token counts by depth, beginning at depth 0."""
    rows = [
        (at, row["depth_histogram"])
        for at, row in zip(x, run.metrics, strict=True)
        if isinstance(row.get("depth_histogram"), list) and sum(row["depth_histogram"])
    ]
    if not rows:
        return ""
    first = min(next(d for d, count in enumerate(counts) if count) for _, counts in rows)
    first = min(first, 1)
    shares = [[count / sum(counts) for count in counts[first:]] for _, counts in rows]
    return depth_map("Depth histogram over time", axis, "depth", [at for at, _ in rows], shares, first)


def _evaluation(name: str, evaluation: dict[str, Any]) -> list[Block]:
    parts: list[Block] = [Heading(2, f"Evaluation: {name}")]
    settings = [one for one in evaluation.get("heldout", []) if isinstance(one, dict) and one.get("macro")]
    depths = sorted((one for one in settings if one.get("max_steps")), key=lambda one: int(one["max_steps"]))
    if depths:
        x = [float(one["max_steps"]) for one in depths]
        lines = [
            Line("exp of mean loss", x, [one["macro"]["perplexity_of_mean_loss"] for one in depths], points=True),
            Line("mean of perplexities", x, [one["macro"]["mean_perplexity"] for one in depths], points=True),
        ]
        plot = line_plot("Perplexity per depth", "depth budget", "macro perplexity", lines, log_y=True)
        parts.append(Plot(f"Perplexity per depth, {name}", plot))
    if settings:
        rows = [
            (one["label"], number(one["macro"]["mean_depth"]), number(one["macro"]["perplexity_of_mean_loss"]),
             number(one["macro"]["mean_perplexity"]), number(one["macro"]["bits_per_byte"], 3))
            for one in settings
        ]  # fmt: skip
        parts.append(Table(("setting", "mean depth", "ppl, exp(mean loss)", "ppl, mean", "bits/byte"), rows))
        rows = [
            (name, f"{v['tokens']:,}", number(v["perplexity"]), number(v["bits_per_byte"], 3), number(v["mean_depth"]))
            for name, v in settings[0]["domains"].items()
        ]  # fmt: skip
        parts.append(Table(("held-out domain", "tokens", "perplexity", "bits/byte", "depth"), rows))
    rows = [
        (task, f"{v['items']:,}", f"{percent(v['acc'])} ± {100 * v['acc_stderr']:.1f}",
         percent(v.get("acc_norm")), percent(v["chance"]))
        for task, v in evaluation.get("tasks", {}).items()
        if "acc" in v
    ]  # fmt: skip
    if rows:
        parts.append(Table(("task", "items", "accuracy", "normalised", "chance"), rows))
    chat = evaluation.get("chat", {})
    modes = [mode for mode in ("greedy", "sampled") if mode in chat]
    if modes:
        keys = (
            "empty",
            "ends_by_itself",
            "format_leaks",
            "distinct_1",
            "distinct_2",
            "repetition_4",
            "repetition_4_per_reply",
        )
        counts = [(key.replace("_", " "), *(percent(chat[mode][key]) for mode in modes)) for key in keys]
        counts.append(("tokens, mean", *(number(chat[mode]["tokens_mean"], 1) for mode in modes)))
        parts.append(Table((f"chat, {chat['prompts']} prompts", *modes), counts))
    return parts


def _planned_steps(run: RunRecord) -> int:
    done = int(run.metrics[-1]["step"]) + 1
    planned = run.data.get("steps")
    return max(done, planned) if isinstance(planned, int) else done


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is missing or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
