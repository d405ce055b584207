"""The data report of a prepared folder: what became of every document, per source, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlm_training.shards import write_json

OUTCOMES = ("kept", "held out", "duplicate", "near-duplicate", "contaminated")


def write_report(target: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Write report.json of a prepared folder and return it; see `make_report`."""
    report = make_report(index)
    write_json(target / "report.json", report)
    return report


def make_report(index: dict[str, Any]) -> dict[str, Any]:
    """Per source and in total: outcome -> documents, characters, tokens.

    Outcomes are "read" (their sum), `OUTCOMES`, and "filtered: REASON". Filtered and contaminated documents are never
    tokenized; their tokens, and with them those of "read", are estimated from the source's characters per token.
    """
    sources = {name: _source(facts["counts"]) for name, facts in index["sources"].items()}
    total: dict[str, dict[str, int]] = {}
    for outcomes in sources.values():
        for outcome, counts in outcomes.items():
            so_far = total.setdefault(outcome, dict.fromkeys(counts, 0))
            for key, value in counts.items():
                so_far[key] += value
    return {
        "tokenizer": index["tokenizer"],
        "options": index["options"],
        "filters": {name: facts["filters"] for name, facts in index["sources"].items()},
        "sources": sources,
        "total": _ordered(total),
    }


def format_report(report: dict[str, Any]) -> str:
    """A table of documents and tokens per source, then the reasons of what was filtered."""
    columns = ("read", "kept", "held out", "filtered", "duplicate", "near-duplicate", "contaminated")
    rows = [("source", *columns, "tokens kept", "held out")]
    reasons: list[str] = []
    for name, outcomes in (*report["sources"].items(), ("total", report["total"])):
        filtered = {o: c["documents"] for o, c in outcomes.items() if o.startswith("filtered: ")}
        documents = {o: c["documents"] for o, c in outcomes.items()} | {"filtered": sum(filtered.values())}
        tokens = [outcomes.get(o, {"tokens": 0})["tokens"] for o in ("kept", "held out")]
        rows.append((name, *(f"{documents.get(c, 0):,}" for c in columns), *(f"{t:,}" for t in tokens)))
        if filtered:
            largest = sorted(filtered.items(), key=lambda item: (-item[1], item[0]))
            reasons.append(f"{name}: " + ", ".join(f"{o.removeprefix('filtered: ')} {n:,}" for o, n in largest))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, *(["", "filtered documents, by reason:"] if reasons else []), *reasons])


def _source(counts: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    found = {o: {"documents": d, "characters": c, "tokens": t} for o, (d, c, t) in counts.items()}
    tokenized = [c for c in found.values() if c["tokens"]]
    characters = sum(c["characters"] for c in tokenized)
    share = sum(c["tokens"] for c in tokenized) / characters if characters else 0.25
    for outcome, count in found.items():
        if outcome.startswith("filtered: ") or outcome == "contaminated":
            count["tokens"] = round(share * count["characters"])
    keys = ("documents", "characters", "tokens")
    return _ordered({"read": {key: sum(c[key] for c in found.values()) for key in keys}} | found)


def _ordered(outcomes: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    first = [o for o in ("read", *OUTCOMES) if o in outcomes]
    return {o: outcomes[o] for o in (*first, *sorted(set(outcomes) - set(first)))}
