"""Conversations written with alternatives: many phrasings of a question beside each other, one file a person can read.

    u: what is the moon | What's the moon? | tell me about the moon
    a: The Moon is a ball of rock that moves around the Earth. | The Moon is a big ball of rock.
    u: does it make its own light | So does it shine by itself?
    a: No. It only reflects the light of the Sun.

Entries are separated by empty lines, alternatives by " | ", lines within a turn by \\n. An entry becomes as many
conversations as its longest list of alternatives has; shorter lists start again. Small models learn a fact from seeing
it asked in several ways, and nobody should have to write the answer each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlm_engine.errors import InputError

Message = dict[str, str]
_ROLES = {"u": "user", "a": "assistant"}


def parse_entries(text: str, where: str) -> Iterator[list[list[str]]]:
    """The entries of a file: per turn, the user's first, its alternatives. InputError names the line of a mistake."""
    entry: list[list[str]] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not line.strip():
            if len(entry) % 2:
                raise InputError(f"{where}, line {number - 1}: an entry ends with what the user says; add its reply")
            if entry:
                yield entry
            entry = []
            continue
        role, colon, rest = line.partition(":")
        wanted = "a" if len(entry) % 2 else "u"
        if not colon or role.strip() != wanted:
            raise InputError(f"{where}, line {number}: expected a line beginning with '{wanted}:'")
        turns = [part.strip().replace("\\n", "\n") for part in rest.split(" | ")]
        if not all(turns):
            raise InputError(f"{where}, line {number}: an alternative is empty")
        entry.append(turns)


def expand(entry: Sequence[Sequence[str]]) -> list[list[Message]]:
    """The conversations of an entry, each alternative in at least one of them."""
    count = max(len(turns) for turns in entry)
    return [
        [
            {"role": _ROLES["a" if place % 2 else "u"], "content": turns[i % len(turns)]}
            for place, turns in enumerate(entry)
        ]
        for i in range(count)
    ]


def compose(files: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write the conversations of all files as JSON lines; returns how many entries and conversations there are.

    Raises InputError for a file that cannot be read or is not of this format; nothing is written then.
    """
    lines, entries = [], 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        for entry in parse_entries(text, str(path)):
            entries += 1
            lines += [
                json.dumps({"messages": messages, "source": path.stem}, ensure_ascii=False) + "\n"
                for messages in expand(entry)
            ]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(out)
    return entries, len(lines)
