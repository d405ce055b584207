"""Conversations as token ids, in the model's own chat format.

A turn is ``prefix[role]`` + content + ``suffix[role]``. The three are encoded separately and their ids joined: markers
may become special tokens, what a person or a model wrote never does, and no typed character can merge with a marker
into another token. Training uses the same functions, so the model meets exactly these ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlm_engine.config import ChatFormat
from rlm_engine.errors import InputError, ModelError
from rlm_engine.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, chat_format: ChatFormat, add_reply: bool = True
) -> list[int]:
    """Ids of a conversation; with ``add_reply`` they end where the assistant's answer begins.

    A system message may only come first; without a "system" prefix it is put in front of the first user turn, an
    empty line between them. Raises InputError naming the message for anything else than role and text, an empty
    conversation, one without user, or a reply asked for after an assistant turn.
    """
    return encode_chat_with_mask(messages, tokenizer, chat_format, add_reply)[0]


def encode_chat_with_mask(
    messages: Sequence[Message], tokenizer: Tokenizer, chat_format: ChatFormat, add_reply: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids as `encode_chat`, and for each whether the assistant wrote it: its contents and ends of turn.

    The mask is the supervised fine-tuning loss mask on *targets*: ids[i] is learned where mask[i].
    """
    system, turns = _checked(messages, add_reply)
    ids: list[int] = []
    mask: list[bool] = []
    for encoded, learned in _encode_all(system, turns, tokenizer, chat_format):
        ids += encoded
        mask += [False] * (len(encoded) - learned) + [True] * learned
    if add_reply:
        prefix = tokenizer.encode(chat_format.prefix["assistant"], allow_special=True)
        ids += prefix
        mask += [False] * len(prefix)
    return ids, mask


def fit_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, chat_format: ChatFormat, limit: int, add_reply: bool = True
) -> tuple[list[int], int]:
    """Ids of the newest part of a conversation that fits ``limit`` tokens, and how many messages were left out.

    The oldest exchanges (a user turn and what follows it) leave first; the system message and the newest user turn
    always stay. Raises InputError when those two alone are too long, and as `encode_chat`.
    """
    system, turns = _checked(messages, add_reply)
    # Every user turn that follows an answer (or begins the conversation) begins an exchange that may be the first.
    starts = [i for i, t in enumerate(turns) if t.role == "user" and (i == 0 or turns[i - 1].role == "assistant")]
    newest = max(i for i, t in enumerate(turns) if t.role == "user")
    starts = sorted({0, *starts, newest})
    reply = len(tokenizer.encode(chat_format.prefix["assistant"], allow_special=True)) if add_reply else 0
    # Turns are encoded once; only the first one kept changes, when a system message is put in front of it.
    lengths = [len(ids) for ids, _ in _encode_all(None, turns, tokenizer, chat_format)]
    needed = 0
    for start in starts:
        first_user = next(i for i in range(start, len(turns)) if turns[i].role == "user")
        head = _encode_all(system, turns[start : first_user + 1], tokenizer, chat_format)
        needed = sum(len(ids) for ids, _ in head) + sum(lengths[first_user + 1 :]) + reply
        if needed <= limit:
            kept = [*messages[: len(messages) - len(turns)], *messages[len(messages) - len(turns) + start :]]
            return encode_chat(kept, tokenizer, chat_format, add_reply), start
    raise InputError(
        f"the message is too long: {needed} tokens with the system text and markers, and the limit is {limit}; "
        "shorten it or send it in parts"
    )


def stop_ids_and_texts(tokenizer: Tokenizer, chat_format: ChatFormat) -> tuple[frozenset[int], tuple[str, ...]]:
    """What ends a reply: ids of special tokens, and plain strings for `StopStrings`.

    Raises ModelError for an entry that mixes the two, which nothing could ever match.
    """
    special = tokenizer.special
    ids = frozenset(special[s] for s in chat_format.stop if s in special)
    texts = tuple(s for s in chat_format.stop if s not in special)
    for text in texts:
        inside = next((s for s in special if s in text), None)
        if inside is not None:
            raise ModelError(
                f"config.json: chat_format.stop entry {text!r} mixes text with the special token {inside!r}"
            )
    return ids, texts


def _checked(messages: Sequence[Message], add_reply: bool) -> tuple[str | None, list[_Turn]]:
    """The system text and the other turns; InputError names what is wrong."""
    system: str | None = None
    turns: list[_Turn] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number} must be an object with role and content, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise InputError(f"message {number}: role must be system, user or assistant, got {role!r}")
        if not isinstance(content, str):
            raise InputError(f"message {number}: content must be a text, got {type(content).__name__}")
        if role == "system":
            if number > 1:
                raise InputError(f"message {number}: a system message must come first")
            system = content
        else:
            turns.append(_Turn(role, content))
    if not any(t.role == "user" for t in turns):
        raise InputError("the conversation has no user message")
    if add_reply and turns[-1].role == "assistant":
        raise InputError(f"message {len(messages)} is the assistant's; a reply needs a user message before it")
    return system, turns


def _encode_all(
    system: str | None, turns: Sequence[_Turn], tokenizer: Tokenizer, chat_format: ChatFormat
) -> list[tuple[list[int], int]]:
    """Each turn's ids and how many of them, at its end, the assistant wrote."""
    encoded: list[tuple[list[int], int]] = []
    if system is not None and "system" in chat_format.prefix:
        encoded.append(_encode_turn(_Turn("system", system), tokenizer, chat_format))
        system = None
    for turn in turns:
        if system is not None and turn.role == "user":
            turn, system = _Turn("user", f"{system}\n\n{turn.content}"), None
        encoded.append(_encode_turn(turn, tokenizer, chat_format))
    return encoded


def _encode_turn(turn: _Turn, tokenizer: Tokenizer, chat_format: ChatFormat) -> tuple[list[int], int]:
    prefix = tokenizer.encode(chat_format.prefix[turn.role], allow_special=True)
    content = tokenizer.encode(turn.content)
    suffix = tokenizer.encode(chat_format.suffix.get(turn.role, ""), allow_special=True)
    learned = len(content) + len(suffix) if turn.role == "assistant" else 0
    return prefix + content + suffix, learned
