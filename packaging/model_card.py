"""Write the card of a bundled model from its run and its evaluation; no figure in a card is typed by hand.

rlm-train evaluate base --heldout HELDOUT --tasks TASKS --json evaluation.json
python benchmarks/quantization.py --model base --text HELDOUT/*.jsonl.zst --variants "" --json quantization.json
python packaging/model_card.py base --run training/runs/act-15m training/runs/act-15m-continue \\
    --evaluation evaluation.json --quantization quantization.json
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_engine.generate import BUNDLED, describe_model
from rlm_engine.machine import physical_cores, processor_name
from rlm_training.evaluation_tables import format_evaluation

# Where each source of the training data comes from, and its licence.
SOURCES = {
    "gutenberg_books": ("books of Project Gutenberg", "public domain in the USA"),
    "classic_books": ("classic books in Markdown (mlschmitt)", "public domain"),
    "wikipedia": ("English Wikipedia articles", "CC-BY-SA-3.0 / GFDL"),
    "openstax": ("OpenStax textbooks", "CC-BY-4.0"),
    "pretrain-storybooks": ("African, Asian and Pratham storybooks", "CC-BY"),
    "chat-storybooks": ("African, Asian and Pratham storybooks, told on request", "CC-BY"),
    "authored": ("conversations composed one by one for this project, with a large language model", "CC0-1.0"),
    "phrasings": (
        "questions in many phrasings and their answers, written for this project with a large language model "
        "(`training/conversations`)",
        "CC0-1.0",
    ),
    "ms_personality_chat": ("Microsoft personality chat", "MIT"),
    "chatterbot": ("ChatterBot corpus", "BSD-3-Clause"),
    "wikipedia_qa": ("questions over lead sentences of Wikipedia", "CC-BY-SA-3.0"),
    "wordnet": ("definitions of WordNet 3.0 as questions", "WordNet licence"),
    "multiturn_mix": ("conversations composed of the other sources", "CC-BY-SA-4.0"),
    "topical_chat": ("Topical-Chat (Amazon Alexa)", "CDLA-Sharing-1.0"),
    "chitchat": ("BYU chit-chat data set", "MIT"),
    "classic_tales": ("fables and fairy tales on request", "public domain"),
    "synthetic_basic": ("arithmetic, spelling, alphabetical order, made by a script", "CC0-1.0"),
    "opentriviaqa": ("OpenTriviaQA", "CC-BY-SA-4.0"),
    "openstax_qa": ("glossaries and solved exercises of OpenStax textbooks", "CC-BY-4.0"),
    "chat-factbook": ("questions over the CIA World Factbook", "public domain"),
    "sgd_dialogue": ("Schema-Guided Dialogue as text", "CC-BY-SA-4.0"),
    "docs": ("Rust Book, tldr pages, exercise texts, FOLDOC, Jargon File", "MIT, CC-BY-4.0, GFDL, public domain"),
    "code": ("TheAlgorithms/Python, the standard library of CPython", "MIT, PSF-2.0"),
    "chat-recipes": ("recipes of based.cooking on request", "public domain"),
}
DESIGNS = {
    "act": "ACT design (one shared block, adaptive halting per token)",
    "blend": "rlm-48m design (soft-blended depths)",
    "routed": "rlm-90m design (1, 3 or 5 passes of a recursive layer)",
    "mixture": "mor design (a depth router in every layer)",
}
# What the published model of the design claims, on data of its own.
CLAIMS = {
    "act": "act-110m (110 M parameters, 8.7 billion tokens): perplexity 25.4 on FineWeb, zero-shot accuracy 0.41, the "
    "mean of LAMBADA, HellaSwag, ARC-Easy and Winogrande (chance 0.25); nothing per task.",
    "blend": "rlm-48m (47.9 M parameters): perplexity 46.75 on 5 % of its own, unpublished text.",
    "routed": "rlm-90m (90.7 M parameters): perplexity 17.45 on conversations of HH-RLHF and UltraChat.",
    "mixture": "mor (41.4 M parameters): perplexity 7.9, on the text it was trained on.",
}
# The corpus of the mor tokenizer names files by their folder, too.
OTHER_NAMES = {"storybooks": "pretrain-storybooks", "chat_storybooks": "chat-storybooks"}
UNSEARCHED = "runs/data"  # the corpus before documents of the evaluation sets were taken out


@dataclass(frozen=True)
class Phase:
    """One run of a model's training: its recipe, what the data came to, its metrics."""

    recipe: dict[str, Any]
    data: dict[str, Any]
    metrics: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> Phase:
        """The files a run leaves in its folder."""
        recipe, data = (json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in ("recipe", "data"))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(recipe, data, [json.loads(line) for line in lines])

    @property
    def tokens(self) -> int:
        """Tokens the model was trained on in this run."""
        return sum(step["tokens"] for step in self.metrics)

    @property
    def minutes(self) -> float:
        """Time spent in steps."""
        return sum(step["tokens"] / step["tokens_per_s"] for step in self.metrics) / 60

    def epochs(self) -> dict[str, float]:
        """How often each source was read."""
        if self.recipe["stage"] == "sft":
            return dict(self.data["conversations"])
        read = self.tokens / self.data["stream_tokens"]
        return {name: times * read for name, times in self.data["epochs"].items()}


def main() -> int:
    """Write README.md into the bundled model's directory; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="bundled model")
    parser.add_argument("--run", type=Path, required=True, nargs="+", help="the model's runs, in order; the last named")
    parser.add_argument("--before", type=Path, nargs="*", default=[], help="runs of the model it starts from, in order")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON of rlm-train evaluate")
    parser.add_argument("--quantization", type=Path, required=True, help="JSON of benchmarks/quantization.py")
    options = parser.parse_args()
    before, phases = ([Phase.read(run) for run in runs] for runs in (options.before, options.run))
    evaluation, quantization = (
        json.loads(file.read_text(encoding="utf-8")) for file in (options.evaluation, options.quantization)
    )
    card = "\n".join(
        [
            *header(options.name, before, phases),
            *data(before, phases),
            *fidelity(quantization),
            *targets(evaluation, quantization),
            *measured(options.name, evaluation),
        ]
    )
    (BUNDLED / options.name / "README.md").write_text(card + "\n", encoding="utf-8")
    return 0


def header(name: str, before: list[Phase], phases: list[Phase]) -> list[str]:
    """What it is, how it was trained, what to expect of it."""
    facts = describe_model(BUNDLED / name)
    kind = "answers messages" if phases[-1].recipe["stage"] == "sft" else "continues text"
    tokens = sum(phase.tokens for phase in before + phases)
    minutes = sum(phase.minutes for phase in before + phases)
    return [
        f"# {name}",
        "",
        f"A recursive language model of the {DESIGNS[facts['architecture']]} that {kind}: {facts['parameters']:,} "
        f"parameters, a window of {facts['context_length']} tokens. Trained from scratch for rlm-chat on "
        f"{tokens / 1e6:.1f} million tokens.",
        "",
        f"**Expect little.** Two CPU cores trained it for {minutes / 60:.1f} hours; models that know things read a "
        "thousand to a million times as much. It writes simple sentences, often loses the thread, makes facts up and "
        "cannot calculate. It is here to show how such a model thinks. Do not rely on anything it says.",
        "",
        "## Training",
        "",
        "| run | tokens | steps | minutes | loss at the end | mean depth |",
        "|---|---|---|---|---|---|",
        *(training_row(phase) for phase in before + phases),
        "",
        "Minutes of stepping on two CPU cores (bfloat16) that also did other work; loss in nats per token, mean of the "
        "last 50 steps. Recipes, metrics and commands: `training/runs` in the source tree."
        + calibrated(name, before + phases),
    ]


def calibrated(name: str, phases: list[Phase]) -> str:
    """A sentence about the halting head, where it was calibrated."""
    provenance = json.loads((BUNDLED / name / "config.json").read_text(encoding="utf-8"))["provenance"]
    if "halting_price" in provenance:
        after = next(
            (phase.recipe["name"] for phase in phases if phase.recipe["ponder"].get("fixed_halting")), "the end"
        )
        return (
            f" From {after} on the halting head does not learn: it was fitted to stop where all further recurrences "
            f"together save less than {provenance['halting_price']} nats, its logits times "
            f"{provenance['halting_factor']:g} (`rlm-train calibrate`; `training/runs/README.md` says when)."
        )
    if "halting_factor" not in provenance:
        return ""
    return f" The logits of the halting head were then multiplied by {provenance['halting_factor']} (`calibrate`)."


def training_row(phase: Phase) -> str:
    """One run as a row of the training table."""
    last = phase.metrics[-50:]
    loss, depth = (sum(step[key] for step in last) / len(last) for key in ("loss", "depth"))
    command = f"`rlm-train {phase.recipe['stage']} --recipe {phase.recipe['name']}`"
    return f"| {command} | {phase.tokens:,} | {len(phase.metrics):,} | {phase.minutes:.0f} | {loss:.2f} | {depth:.2f} |"


def data(before: list[Phase], phases: list[Phase]) -> list[str]:
    """The sources: how often each was read in each run, and its licence."""
    everything = before + phases
    rows = ["", "## Data", ""]
    if phases[-1].recipe["stage"] == "sft":
        rows += ["Conversations: loss on the replies only, token table frozen. How often each was read:", ""]
    else:
        rows += ["How often each source was read (epochs):", ""]
    read = [phase.epochs() for phase in phases]
    names = list(dict.fromkeys(name for epochs in read for name in epochs))
    rows += [f"| source | {' | '.join(phase.recipe['name'] for phase in phases)} | licence |"]
    rows += ["|---" * (len(phases) + 2) + "|"]
    for name in names:
        times = " | ".join(f"{epochs[name]:.2g}" if name in epochs else "-" for epochs in read)
        known = f"chat-{name}" if phases[-1].recipe["stage"] == "sft" and f"chat-{name}" in SOURCES else name
        what, licence = SOURCES[OTHER_NAMES.get(known, known.removeprefix("chat_"))]
        rows.append(f"| {what} | {times} | {licence} |")
    note = "Held-out documents were split off before training. "
    unsearched = [phase.recipe["name"] for phase in everything if phase.recipe["data"]["prepared"] == UNSEARCHED]
    note += "Documents that share 13 words in a row with the evaluation sets were left out"
    note += f", but not in {' and '.join(unsearched)}, which had not been searched for them." if unsearched else "."
    return [*rows, "", note]


def fidelity(measured: dict[str, Any]) -> list[str]:
    """What the 8-bit export loses on held-out text."""
    return [
        "",
        "## 8-bit ONNX",
        "",
        f"On {measured['tokens']:,} tokens of held-out text the 8-bit export finds the same token likeliest as float32 "
        f"in {100 * measured['top1']:.2f} % +- {100 * measured['top1_margin']:.2f} (95 %), takes the same depth in "
        f"{100 * measured['same_depth']:.1f} %, and has {measured['perplexity_ratio']:.4f} times the perplexity "
        "(`benchmarks/quantization.py`).",
    ]


def targets(evaluation: dict[str, Any], quantization: dict[str, Any]) -> list[str]:
    """What was aimed at for the bundled ACT models, and what came out."""
    if evaluation["model"]["architecture"] != "act":
        return []
    depth = evaluation["depth"]
    rows = [
        ("mean depth from 2.5 to 7.5", f"{depth['mean']:.2f}", 2.5 <= depth["mean"] <= 7.5),
        ("standard deviation of depth at least 0.7", f"{depth['std']:.2f}", depth["std"] >= 0.7),
    ]
    for label, kind in (("the same depths shuffled", "shuffled"), ("depths drawn evenly around the mean", "uniform")):
        worse = depth["random"][kind]["difference"]
        low, high = worse["ci95"]
        found = f"{worse['nats']:+.4f} nats per token ({low:+.4f} to {high:+.4f})"
        rows.append((f"{label} predict worse", found, worse["nats"] > 0))
    for mode in ("greedy", "sampled") if "chat" in evaluation else ():
        said = evaluation["chat"][mode]
        for label, key, limit in (
            ("replies that do not end by themselves below 10 %", "ends_by_itself", 0.1),
            ("repeated 4-grams below 10 %", "repetition_4", 0.1),
            ("no reply that leaks the chat format", "format_leaks", 1e-9),
        ):
            value = 1 - said[key] if key == "ends_by_itself" else said[key]
            rows.append((f"{mode}: {label}", f"{100 * value:.1f} %", value < limit))
    rows.append(
        ("8 bits: same likeliest token in 99 %", f"{100 * quantization['top1']:.2f} %", quantization["top1"] >= 0.99)
    )
    lines = [f"| {label} | {found} | {'yes' if met else '**no**'} |" for label, found, met in rows]
    return ["", "## Targets", "", "| target | found | met |", "|---|---|---|", *lines]


def measured(name: str, evaluation: dict[str, Any]) -> list[str]:
    """The tables of the evaluation, as printed, and what the published model claims."""
    today = datetime.date.today().isoformat()
    return [
        "",
        "## Evaluation",
        "",
        f"`rlm-train evaluate`, {today}, {processor_name()}, {physical_cores()} cores. Samples are small: mind the "
        "intervals and standard errors. Perplexities of other texts, or tokenizers, do not compare.",
        "",
        "```",
        format_evaluation(evaluation),
        "```",
        "",
        f"For comparison, what its card claims of {CLAIMS[describe_model(BUNDLED / name)['architecture']]}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
