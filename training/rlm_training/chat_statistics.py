"""How the model talks: replies to a fixed list of prompts, counted. No judgement of what the replies say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.config import ChatFormat
from rlm_engine.errors import InputError, ModelError
from rlm_engine.generate import Model
from rlm_engine.sampling import Sampling

MAX_TOKENS = 160
# Anything that looks like a role marker, and lines that begin with a speaker as plain-text dialogues do.
_MARKER = re.compile(r"<\|[^|>\s]{1,24}\|>|</?(?:user|assistant|system)>|\[/?INST\]")
_SPEAKER = re.compile(r"^\s*(?:user|assistant|human|system)\s*:", re.IGNORECASE | re.MULTILINE)
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Reply:
    """One answer. ``ended``: the model ended its turn by itself. ``leaked``: the format showed in it."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    leaked: bool
    mean_depth: float


def default_prompts() -> list[str]:
    """The 100 prompts that come with the program."""
    return _prompts(resources.files("rlm_training").joinpath("chat_prompts.txt").read_text(encoding="utf-8"))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, one a line; empty lines and lines beginning with # are left out. Raises InputError."""
    try:
        prompts = _prompts(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def reply_to(model: Model, prompt: str, sampling: Sampling) -> Reply:
    """The model's answer to one prompt, as the chat would show it."""
    assert model.tokenizer is not None and model.config.chat_format is not None
    special = set(model.tokenizer.special.values())
    generation = model.chat([{"role": "user", "content": prompt}], sampling)
    tokens = list(generation)
    summary = generation.summary
    text = "".join(token.text for token in tokens)
    # special tokens have no text of their own, so a role marker in mid-reply shows only in the ids
    leaked = any(token.id in special for token in tokens) or shows_format(text, model.config.chat_format)
    ended = summary.stop_reason in ("end_of_turn", "stop_string")
    return Reply(prompt, text, summary.new_tokens, ended, leaked, summary.mean_depth)


def chat_statistics(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int] = (1,),
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Statistics of greedy replies and of sampled ones (default sampling settings, one reply per prompt and seed).

    A prompt's seed is ``seed * 1000 + its number``, so that replies do not share their random numbers. Raises
    ModelError when the model has no chat format.
    """
    if not model.can_chat:
        raise ModelError(f"model {model.name!r} has no chat format; leave out the chat statistics")
    result: dict[str, Any] = {"prompts": len(prompts), "max_tokens": max_tokens, "seeds": list(seeds)}
    settings = Sampling()
    result["sampling"] = {"temperature": settings.temperature, "top_p": settings.top_p}
    greedy = []
    for number, prompt in enumerate(prompts):
        if progress:
            progress(f"greedy reply {number + 1} of {len(prompts)}")
        greedy.append(reply_to(model, prompt, Sampling(greedy=True, max_tokens=max_tokens)))
    result["greedy"] = reply_statistics(greedy)
    sampled = []
    for seed in seeds:
        for number, prompt in enumerate(prompts):
            if progress:
                progress(f"sampled reply {number + 1} of {len(prompts)}, seed {seed}")
            sampled.append(reply_to(model, prompt, Sampling(seed=seed * 1000 + number, max_tokens=max_tokens)))
    if sampled:
        result["sampled"] = reply_statistics(sampled)
    result["replies"] = [
        {"prompt": r.prompt, "mode": mode, "text": r.text, "ended": r.ended, "tokens": r.tokens}
        for mode, replies in (("greedy", greedy), ("sampled", sampled))
        for r in replies
    ]
    return result


def reply_statistics(replies: Sequence[Reply]) -> dict[str, Any]:
    """Shares (0 to 1) over replies, lengths in tokens, and n-gram statistics over words and punctuation marks.

    ``distinct_n``: different n-grams among all n-grams of all replies (Li et al. 2016).
    ``repetition_4``: share of 4-grams that occurred before in the same reply, all replies' 4-grams taken together (one
    long reply that loops weighs much); ``repetition_4_per_reply``: the mean over replies.
    """
    lengths = np.array([reply.tokens for reply in replies])
    words = [split_words(reply.text) for reply in replies]
    return {
        "replies": len(replies),
        "empty": _share([not reply.text.strip() for reply in replies]),
        "ends_by_itself": _share([reply.ended for reply in replies]),
        "format_leaks": _share([reply.leaked for reply in replies]),
        "tokens_mean": float(lengths.mean()),
        "tokens_median": float(np.median(lengths)),
        "tokens_max": int(lengths.max()),
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "repetition_4": repetition(words, 4),
        "repetition_4_per_reply": float(np.mean([repetition([one], 4) for one in words])),
        "different_replies": len({reply.text.strip() for reply in replies}),
        "mean_depth": float(np.mean([reply.mean_depth for reply in replies])),
    }


def shows_format(text: str, chat_format: ChatFormat) -> bool:
    """Whether a reply spells a role marker, the model's own or a usual one, or begins a line as another speaker."""
    own = {part.strip() for part in (*chat_format.prefix.values(), *chat_format.suffix.values(), *chat_format.stop)}
    return bool(_MARKER.search(text) or _SPEAKER.search(text)) or any(part in text for part in own if part)


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORD.findall(text.lower())


def distinct(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams over all n-grams; None when there is none."""
    grams = [gram for words in texts for gram in _ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[Sequence[str]], n: int) -> float:
    """Share of n-grams that occurred before in the same text; 0 when no text is that long."""
    total = repeated = 0
    for words in texts:
        grams = _ngrams(words, n)
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags))


def _prompts(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
