"""The JSON of `rlm-train evaluate` as plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_evaluation(result: dict[str, Any]) -> str:
    """All tables of an evaluation, separated by empty lines."""
    model = result["model"]
    parts = [
        f"{model['name']}: {model['architecture']}, {model['parameters']:,} parameters, context "
        f"{model['context_length']}, up to {model['max_depth']} steps, {model['backend']}"
    ]
    if "heldout" in result:
        parts += [_domains(result), _settings(result), _depth(result["depth"])]
        if "random" in result["depth"]:
            parts.append(_random(result["depth"]["random"]))
    if "tasks" in result:
        parts.append(_tasks(result))
    if "chat" in result:
        parts.append(_chat(result["chat"]))
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first aligned left, the others right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join(texts)


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; "-" for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; "-" for none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _range(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{values[0]:,.2f} .. {values[1]:,.2f}"


def _domains(result: dict[str, Any]) -> str:
    full = result["heldout"][0]
    rows = [
        [
            name,
            f"{one['documents']:,}",
            f"{one['tokens']:,}",
            number(one["loss"], 3),
            number(one["perplexity"]),
            _range(one["perplexity_ci95"]),
            number(one["bits_per_byte"], 3),
            number(one["mean_depth"]),
            number(one.get("reply_perplexity")),
        ]
        for name, one in full["domains"].items()
    ]
    macro = full["macro"]
    rows += [
        ["macro: exp(mean loss)", "", f"{macro['tokens']:,}", number(macro["loss"], 3),
         number(macro["perplexity_of_mean_loss"]), _range(macro["perplexity_of_mean_loss_ci95"]),
         number(macro["bits_per_byte"], 3), number(macro["mean_depth"]), ""],
        ["macro: mean perplexity", "", "", "", number(macro["mean_perplexity"]), _range(macro["mean_perplexity_ci95"]),
         "", "", ""],
    ]  # fmt: skip
    header = ("held-out text", "documents", "tokens", "loss", "perplexity", "95 %", "bits/byte", "depth", "replies ppl")
    text = table(header, rows)
    for name, reason in result.get("skipped", {}).items():
        text += f"\nleft out: {name} ({reason})"
    return text


def _settings(result: dict[str, Any]) -> str:
    names = list(result["heldout"][0]["domains"])
    rows = []
    for one in result["heldout"]:
        macro = one["macro"]
        each = [number(one["domains"][name]["perplexity"]) for name in names]
        rows.append(
            [one["label"], number(macro["mean_depth"]), number(macro["perplexity_of_mean_loss"]),
             number(macro["mean_perplexity"]), number(macro["bits_per_byte"], 3), *each]
        )  # fmt: skip
    return table(("setting", "depth", "ppl exp(mean)", "ppl mean", "bits/byte", *names), rows)


def _depth(depth: dict[str, Any]) -> str:
    rows = [
        [name, number(one["mean"]), number(one["std"]), _histogram(one["histogram"])]
        for name, one in {"all tokens": depth, **depth["domains"]}.items()
    ]
    lines = [table(("depth", "mean", "std", "share of tokens"), rows)]
    for what in ("surprisal", "entropy"):
        values = depth[what]
        lines.append(
            f"correlation with {what}: Pearson {number(values['pearson'], 3)}, Spearman {number(values['spearman'], 3)}"
        )
    return "\n".join(lines)


def _histogram(histogram: dict[str, Any]) -> str:
    total = sum(histogram["counts"])
    if "depths" in histogram:
        pairs = zip(histogram["depths"], histogram["counts"], strict=True)
        return "  ".join(f"{depth}: {100 * count / total:.1f} %" for depth, count in pairs)
    return f"{histogram['edges'][0]:.2f} .. {histogram['edges'][-1]:.2f}"


def _random(random: dict[str, Any]) -> str:
    shuffled, uniform = random["shuffled"], random["uniform"]
    rows = [["learned", number(random["mean_depth"]), number(random["learned"]["perplexity"]), "", ""]]
    for label, one, mean in (
        ("learned, shuffled over tokens", shuffled, random["mean_depth"]),
        ("uniform", uniform, uniform["mean_depth"]),
    ):
        difference = one["difference"]
        ends = difference["ci95"]
        spread = "-" if ends is None else f"{ends[0]:+.4f} .. {ends[1]:+.4f}"
        rows.append([label, number(mean), number(one["perplexity"]), f"{difference['nats']:+.4f}", spread])
    return table(("depth at equal mean", "depth", "perplexity, all tokens", "nats/token worse", "95 %"), rows)


def _tasks(result: dict[str, Any]) -> str:
    rows, texts = [], []
    for name, one in result["tasks"].items():
        if one["kind"] == "text":
            texts.append(
                f"{name}: perplexity {number(one['perplexity'])} per token, {number(one['word_perplexity'])} per word, "
                f"{number(one['bits_per_byte'], 3)} bits per byte ({one['items']} documents)"
            )
            continue
        normalised = _with_error(one, "acc_norm") if "acc_norm" in one else "-"
        extra = f"perplexity {number(one['perplexity'])}" if "perplexity" in one else ""
        rows.append(
            [name, one["kind"], f"{one['items']:,}", _with_error(one, "acc"), normalised, percent(one["chance"]), extra]
        )
    macro = result["tasks_macro"]
    if macro is not None:
        rows.append(["mean of tasks", "", "", _with_error(macro, "acc"), "", percent(macro["chance"]), ""])
    parts = [table(("task", "kind", "items", "accuracy", "normalised", "chance", ""), rows)] if rows else []
    return "\n".join(parts + texts)


def _with_error(one: dict[str, Any], key: str) -> str:
    return f"{percent(one[key])} ± {100 * one[f'{key}_stderr']:.1f}"


def _chat(chat: dict[str, Any]) -> str:
    modes = [(mode, chat[mode]) for mode in ("greedy", "sampled") if mode in chat]
    facts: list[tuple[str, str]] = [
        ("empty", "percent"), ("ends_by_itself", "percent"), ("format_leaks", "percent"), ("tokens_mean", "number"),
        ("tokens_median", "number"), ("distinct_1", "percent"), ("distinct_2", "percent"), ("repetition_4", "percent"),
        ("repetition_4_per_reply", "percent"),
        ("different_replies", "count"), ("mean_depth", "number"),
    ]  # fmt: skip
    write = {"percent": percent, "number": lambda v: number(v, 1), "count": lambda v: f"{v:,}"}
    rows = [[key.replace("_", " "), *(write[kind](values[key]) for _, values in modes)] for key, kind in facts]
    header = (f"chat, {chat['prompts']} prompts", *(f"{mode} ({values['replies']})" for mode, values in modes))
    return table(header, rows) + f"\nseeds of the sampled replies: {', '.join(map(str, chat['seeds']))}"
