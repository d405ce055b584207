"""Write the card of a bundled model from its run and its evaluation; no figure in a card is typed by hand.

rlm-train evaluate base --heldout HELDOUT --tasks TASKS --json evaluation.json
python packaging/model_card.py base --run training/runs/act-15m --evaluation evaluation.json
"""

from __future__ import annotations

import argparse
import datetime
import json
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
}


def main() -> int:
    """Write README.md into the bundled model's directory; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="bundled model")
    parser.add_argument("--run", type=Path, required=True, help="folder with recipe.json, data.json and metrics.jsonl")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON of rlm-train evaluate")
    options = parser.parse_args()
    recipe = json.loads((options.run / "recipe.json").read_text(encoding="utf-8"))
    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    card = "\n".join(
        [
            *header(options.name, recipe, [json.loads(line) for line in lines]),
            *data(options.run, recipe),
            *fidelity(options.name),
            *measured(json.loads(options.evaluation.read_text(encoding="utf-8"))),
        ]
    )
    (BUNDLED / options.name / "README.md").write_text(card + "\n", encoding="utf-8")
    return 0


def header(name: str, recipe: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    """What it is, how it was trained, what to expect of it."""
    facts = describe_model(BUNDLED / name)
    tokens = sum(step["tokens"] for step in metrics)
    seconds = sum(step["tokens"] / step["tokens_per_s"] for step in metrics)
    kind = "answers messages" if recipe["stage"] == "sft" else "continues text"
    start = f", starting from the model of `{recipe['train']['init']}`" if recipe["train"].get("init") else ""
    return [
        f"# {name}",
        "",
        f"A recursive language model of the ACT design that {kind}: {facts['parameters']:,} parameters, one shared "
        f"block applied up to {facts['max_depth']} times per token, a window of {facts['context_length']} tokens, "
        "GPT-2's vocabulary and two role tokens. Trained from scratch for rlm-chat.",
        "",
        "**Expect little.** It is the first model that shipped, small and trained for about an hour: simple sentences, "
        "often without sense, facts made up, arithmetic wrong. It is here to show how such a model thinks, and will be "
        "replaced. Do not rely on anything it says.",
        "",
        "## Training",
        "",
        f"`rlm-train {recipe['stage']} --recipe {recipe['name']}`: {tokens:,} tokens in {len(metrics):,} steps"
        f"{start}, {seconds / 60:.0f} minutes of stepping on two CPU cores that also did other work "
        f"({processor_name()}, bfloat16). Loss of the last 50 steps "
        f"{sum(step['loss'] for step in metrics[-50:]) / len(metrics[-50:]):.2f} nats, mean depth "
        f"{sum(step['depth'] for step in metrics[-50:]) / len(metrics[-50:]):.2f}.",
    ]


def data(run: Path, recipe: dict[str, Any]) -> list[str]:
    """The sources with their shares."""
    rows = ["", "## Data", ""]
    if recipe["stage"] == "sft":
        rows += ["Conversations, loss on the replies only, embedding table frozen.", "", "| source | read | licence |"]
        rows += ["|---|---|---|"]
        rows += [
            f"| {SOURCES[name][0]} | {times:g} times | {SOURCES[name][1]} |"
            for name, times in recipe["data"]["conversations"].items()
        ]
        return rows
    planned = json.loads((run / "data.json").read_text(encoding="utf-8"))
    read = recipe["train"]["tokens"] / planned["stream_tokens"]
    share = sum(recipe["data"]["mix"].values())
    rows += ["| source | share | epochs | licence |", "|---|---|---|---|"]
    for name, weight in recipe["data"]["mix"].items():
        epochs = planned["epochs"][name] * read
        rows.append(f"| {SOURCES[name][0]} | {100 * weight / share:.1f} % | {epochs:.2g} | {SOURCES[name][1]} |")
    note = (
        "Held-out documents were split off before training. No evaluation set is among the sources; whether passages "
        "of them occur in the training text was not searched for."
    )
    return [*rows, "", note]


def fidelity(name: str) -> list[str]:
    """What the 8-bit export loses, as measured when it was written."""
    checked = json.loads((BUNDLED / name / "onnx" / "manifest.json").read_text(encoding="utf-8"))["verification"]
    return [
        "",
        "## 8-bit ONNX",
        "",
        f"Compared with {checked['reference']} on {checked['tokens']} tokens when it was exported: same depth "
        f"{100 * checked['depth_agreement']:.1f} %, same likeliest token {100 * checked['top1_agreement']:.1f} %, "
        f"logits differ by at most {checked['logits_max_difference']:.2f}.",
    ]


def measured(evaluation: dict[str, Any]) -> list[str]:
    """The tables of the evaluation, as printed."""
    today = datetime.date.today().isoformat()
    return [
        "",
        "## Evaluation",
        "",
        f"`rlm-train evaluate`, {today}, {processor_name()}, {physical_cores()} cores; PyTorch on the bundled weights. "
        "Samples are small: mind the intervals and standard errors.",
        "",
        "```",
        format_evaluation(evaluation),
        "```",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
