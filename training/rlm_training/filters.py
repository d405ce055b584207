"""Unicode clean-up, and quality filters under the names that `rlm-train prepare --filter` takes.

A rule looks at a document and says why it must go, or nothing. `PRESETS` are rules in order; the first that speaks is
the reason in the data report. Length, words and letters are those of everything written in a document, without role
marks; rules about conversations let plain texts pass.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rlm_engine.errors import UsageError
from rlm_training.corpus import Document

Rule = Callable[[Document, str], str | None]  # (document, its content) -> the reason to leave it out

# Dropped: controls other than newline and tab, bidirectional overrides (no one types them, and the terminal removes
# them from replies), byte-order marks, noncharacters. Surrogates cannot be UTF-8.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
_URL = re.compile(r"https?://|www\.", re.IGNORECASE)
_CLOSERS = "\"'”’»)]}*_"
_ENDS = (".", "!", "?", "…", ":", ";", "。", "！", "？")


def clean(text: str) -> str:
    """The text in Unicode NFC, with "\\n" as the only line break, and without what is no text (see above)."""
    text = _BREAKS.sub("\n", text)
    text = _SURROGATE.sub("\ufffd", _DROPPED.sub("", text))
    return unicodedata.normalize("NFC", text).strip("\n")


def clean_document(document: Document) -> Document:
    """`clean` on every text of a document; the contents of turns lose their outer white space, as typed turns do."""
    return dataclasses.replace(
        document,
        text=clean(document.text),
        messages=tuple({"role": m["role"], "content": clean(m["content"]).strip()} for m in document.messages),
        chosen=clean(document.chosen).strip(),
        rejected=clean(document.rejected).strip(),
    )


def unusable(document: Document, content: str) -> str | None:
    """What no model can be trained on, whatever the preset: emptiness, conversations that cannot be encoded."""
    if not content.strip():
        return "empty"
    if document.kind == "text":
        return None
    roles = [m["role"] for m in document.messages]
    known = all(r in ("user", "assistant") for r in roles[1:]) and roles[:1] in (["system"], ["user"], ["assistant"])
    if not known or "user" not in roles:
        return "structure"
    if document.kind == "preference":
        if roles[-1] != "user" or not document.chosen or not document.rejected:
            return "structure"
        if document.chosen == document.rejected:
            return "equal replies"
    return None


def characters(least: int, most: int) -> Rule:
    """From ``least`` to ``most`` characters, both included."""

    def rule(document: Document, content: str) -> str | None:
        return "too short" if len(content) < least else "too long" if len(content) > most else None

    return rule


def words(least: int) -> Rule:
    """At least this many words between white space."""

    def rule(document: Document, content: str) -> str | None:
        return "few words" if len(content.split(maxsplit=least)) < least else None

    return rule


def alphanumeric(more_than: float, spaces: bool = False) -> Rule:
    """More than this share of the characters are letters or digits (or, with ``spaces``, white space)."""

    def rule(document: Document, content: str) -> str | None:
        count = sum(map(str.isalnum, content)) + (sum(map(str.isspace, content)) if spaces else 0)
        return None if count > more_than * len(content) else "few letters"

    return rule


def punctuated(document: Document, content: str) -> str | None:
    """Somewhere a sentence ends."""
    return None if any(mark in content for mark in ".!?") else "no punctuation"


def without_addresses(document: Document, content: str) -> str | None:
    """No web addresses."""
    return "URL" if _URL.search(content) else None


def alternating(document: Document, content: str) -> str | None:
    """User and assistant take turns after at most one system message, the assistant is last, nothing is empty."""
    if document.kind == "text":
        return None
    turns = [*document.messages, *([{"role": "assistant", "content": "-"}] if document.kind == "preference" else [])]
    if turns and turns[0]["role"] == "system":
        turns = turns[1:]
    expected = ("user", "assistant") * (len(turns) // 2)
    good = tuple(t["role"] for t in turns) == expected and bool(turns) and all(t["content"].strip() for t in turns)
    return None if good else "structure"


def readable(document: Document, content: str) -> str | None:
    """Not binary data, mis-decoded text, minified code or a list of one line again and again.

    At most 0.1 % replacement characters, 25 characters a word on average, and in ten lines or more, at most half of
    the non-empty ones repeat another (loosened from Rae et al. 2021, Gopher, table A1, to let code pass).
    """
    if content.count("\ufffd") * 1000 > len(content):
        return "unreadable characters"
    found = content.split()
    if sum(map(len, found)) > 25 * len(found):
        return "long words"
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if len(lines) >= 10 and 2 * len(set(lines)) < len(lines):
        return "repeated lines"
    return None


def plain_texts(*rules: Rule) -> Rule:
    """These rules for plain texts only: a short turn of a conversation is no bad page."""

    def rule(document: Document, content: str) -> str | None:
        if document.kind != "text":
            return None
        return next((reason for reason in (r(document, content) for r in rules) if reason), None)

    return rule


def ends_properly(text: str) -> bool:
    """Whether a reply ends with punctuation (a quote, bracket or emphasis may follow it) or a code fence."""
    text = text.rstrip()
    return text.endswith("```") or text.rstrip(_CLOSERS).endswith(_ENDS)


def repeats_four_words(text: str, times: int) -> bool:
    """Whether any four words in a row occur more than this many times."""
    found = text.lower().split()
    counts = Counter(zip(found, found[1:], found[2:], found[3:], strict=False))
    return bool(counts) and max(counts.values()) > times


def short_chat(
    reply_characters: tuple[int, int] = (2, 1200), repeats: int = 2, ascii_share: float = 0.95, exchanges: int = 6
) -> Rule:
    """Conversations a small model can learn to speak from; every reply (of a pair: the chosen one) must do.

    Replies of so many characters, that end properly, are almost ASCII, and repeat no four words more than ``repeats``
    times; at most ``exchanges`` questions and answers.
    """

    def rule(document: Document, content: str) -> str | None:
        if document.kind == "text":
            return None
        replies = [m["content"] for m in document.messages if m["role"] == "assistant"]
        if document.kind == "preference":
            replies = [document.chosen]
        if sum(m["role"] == "user" for m in document.messages) > exchanges:
            return "many turns"
        for reply in replies:
            if not reply_characters[0] <= len(reply) <= reply_characters[1]:
                return "reply too short" if len(reply) < reply_characters[0] else "reply too long"
            if not ends_properly(reply):
                return "reply ends badly"
            if repeats_four_words(reply, repeats):
                return "reply repeats itself"
            if sum(map(str.isascii, reply)) < ascii_share * len(reply):
                return "reply not ASCII"
        return None

    return rule


@dataclass(frozen=True)
class Preset:
    """Rules under a name. ``distinct``: exact duplicates go even with --keep-duplicates; ``most``: documents kept."""

    rules: tuple[Rule, ...]
    distinct: bool = False
    most: int = 0


PRESETS = {
    "none": Preset(()),
    "default": Preset((alternating, readable, plain_texts(characters(40, 10**9), words(6), alphanumeric(0.5, True)))),
    # rlm-90m's card
    "90m": Preset((characters(80, 6000), words(15), alphanumeric(0.65), punctuated, alternating)),
    # mor's card
    "mor": Preset((characters(50, 400), words(8), without_addresses), distinct=True, most=50_000),
    "chat-short": Preset((alternating, short_chat())),
}


def preset(names: str) -> Preset:
    """The presets of a comma-separated list, one after another; UsageError for an unknown name."""
    found = []
    for name in names.split(","):
        if name not in PRESETS:
            raise UsageError(f"unknown filter {name!r}; there are {', '.join(PRESETS)}")
        found.append(PRESETS[name])
    limits = [p.most for p in found if p.most]
    rules = tuple(rule for p in found for rule in p.rules)
    return Preset(rules, any(p.distinct for p in found), min(limits, default=0))


def judge(document: Document, rules: tuple[Rule, ...]) -> str | None:
    """Why a document must go, or None; what is unusable goes always."""
    content = document.content()
    return next((reason for reason in (rule(document, content) for rule in (unusable, *rules)) if reason), None)
