"""Documents to token ids and loss masks, with any of the engine's tokenizers and any chat format."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.config import ChatFormat, ModelConfig, config_from_dict
from rlm_engine.errors import UsageError
from rlm_engine.tokenizer import Tokenizer
from rlm_training.corpus import Document
from rlm_training.shards import CHAT_FORMAT, CHAT_TOKENS, token_dtype

FILES = {"file": ("tokenizer.json",), "technical": ("vocab.json", "merges.txt")}
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_MARK = re.compile(r"<\|?\w+\|?>")
_LONG_TEXT = 4_000_000  # characters; the tokenizers library needs about 50 bytes of memory for each
# Where a text may be cut without changing its tokens: after a line break alone between two other characters, no
# pre-tokenizer joins what is left and right of it.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Encoding:
    """A tokenizer and a chat format, as plain data: it travels to worker processes and into index.json."""

    tokenizer: str = "gpt2"  # "gpt2", "file" or "technical", as in a model's config.json
    directory: str = ""
    added_tokens: tuple[str, ...] = CHAT_TOKENS
    chat_format: dict[str, Any] = field(default_factory=CHAT_FORMAT.to_dict)
    end_of_text: int = 50_256
    vocab_size: int = 50_259

    def to_dict(self) -> dict[str, Any]:
        """For index.json; a model trained on the shards needs the same values in its config.json."""
        return {
            "tokenizer": self.tokenizer,
            "added_tokens": list(self.added_tokens),
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "chat_format": self.chat_format,
        }

    def open(self) -> Tokenizer:
        """The tokenizer itself; ModelError as `load_tokenizer`."""
        return _open(self.tokenizer, Path(self.directory), self.added_tokens)

    def copy_files(self, target: Path) -> None:
        """Put the tokenizer's files beside the shards."""
        for name in FILES.get(self.tokenizer, ()):
            if (Path(self.directory) / name).resolve() != (target / name).resolve():
                shutil.copyfile(Path(self.directory) / name, target / name)

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of the tokenizer's files by name; none for the bundled one."""
        folder = Path(self.directory)
        return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in FILES.get(self.tokenizer, ())}


def choose_encoding(tokenizer: Path | None = None, chat_format: str = "") -> Encoding:
    """The encoding for a tokenizer or model directory (None: GPT-2's) and a chat format.

    ``chat_format``: "ours" (default), "90m", "mor", or a model's config.json or directory; without it, a model
    directory given as tokenizer brings its own. Marks of the format that the tokenizer does not know are added to it.
    Raises UsageError when the two do not go together, ModelError for damaged files.
    """
    kind, directory = "gpt2", tokenizer or Path()
    added: tuple[str, ...] = ()
    form: ChatFormat | None = None
    end: int | None = None
    config = None if tokenizer is None else _model_config(tokenizer / "config.json")
    if config is not None and config.tokenizer != "none":
        kind, added, form, end = config.tokenizer, config.added_tokens, config.chat_format, config.eos_token_id
    elif tokenizer is not None:
        found = [k for k, names in FILES.items() if all((tokenizer / name).is_file() for name in names)]
        if not found:
            raise UsageError(
                f"{tokenizer}: neither tokenizer.json, nor vocab.json with merges.txt, nor a model is here"
            )
        kind = found[0]
    special = _open(kind, directory, added).special
    if chat_format or form is None:
        # Tokenizers of technical training have roles of their own.
        form = _chat_format(chat_format or ("mor" if {"<bos>", "<user>", "<assistant>"} <= set(special) else "ours"))
    marks = tuple(dict.fromkeys(m for text in _texts(form) for m in _MARK.findall(text) if m not in special))
    if marks and (config is not None or kind == "technical"):
        raise UsageError(f"{tokenizer}: the tokenizer lacks {', '.join(marks)} of the chat format; choose another one")
    # The order of CHAT_TOKENS is that of the ids in existing models.
    added += CHAT_TOKENS if set(marks) == set(CHAT_TOKENS) else marks
    opened = _open(kind, directory, added)
    if end is None:
        named = [text for text in _ENDS_OF_TEXT if text in opened.special]
        if not named:
            raise UsageError(f"{tokenizer}: no end-of-text token among {', '.join(_ENDS_OF_TEXT)}")
        end = opened.special[named[0]]
    text = str(directory.resolve()) if tokenizer is not None else ""
    return Encoding(kind, text, added, form.to_dict(), end, opened.vocab_size)


class Encoder:
    """Encodes documents; one per process."""

    def __init__(self, encoding: Encoding):
        self._tokenizer = encoding.open()
        self._format = ChatFormat.from_dict(encoding.chat_format, "chat format")
        self._end = encoding.end_of_text
        self._dtype = token_dtype(encoding.vocab_size)
        self._cuts = encoding.tokenizer != "technical"  # it reads code fences across lines

    def encode(self, document: Document) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids uint16 or uint32 [tokens] with mask uint8 [tokens]; two of them (chosen, rejected) for a preference pair.

        A document ends with end-of-text. The mask is 1 on the assistant's contents and ends of turn; in a pair only on
        the reply in question.
        """
        if document.kind == "text":
            ids = self._encode_text(document.text)
            return [self._ended(ids, [False] * len(ids))]
        if document.kind == "chat":
            return [self._ended(*encode_chat_with_mask(document.messages, self._tokenizer, self._format))]
        encoded = []
        prompt = encode_chat_with_mask(document.messages, self._tokenizer, self._format)[0]
        for reply in (document.chosen, document.rejected):
            turns = [*document.messages, {"role": "assistant", "content": reply}]
            ids, mask = encode_chat_with_mask(turns, self._tokenizer, self._format)
            encoded.append(self._ended(ids, [False] * len(prompt) + mask[len(prompt) :]))
        return encoded

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while self._cuts and len(text) - start > _LONG_TEXT and (cut := _CUT.search(text, start + _LONG_TEXT // 2)):
            ids += self._tokenizer.encode(text[start : cut.start()])
            start = cut.start()
        return ids + self._tokenizer.encode(text[start:])

    def _ended(self, ids: list[int], mask: list[bool]) -> tuple[np.ndarray, np.ndarray]:
        if not ids or ids[-1] != self._end:
            # In a conversation that the assistant closed, ending the text is the assistant's too.
            ids, mask = [*ids, self._end], [*mask, bool(mask and mask[-1])]
        return np.asarray(ids, dtype=self._dtype), np.asarray(mask, dtype=np.uint8)


def _open(kind: str, directory: Path, added: tuple[str, ...]) -> Tokenizer:
    if kind == "gpt2":
        return _bundled(added)
    if kind == "technical":
        from rlm_engine.tokenizer.technical import TechnicalTokenizer

        return TechnicalTokenizer.from_directory(directory)
    from rlm_engine.tokenizer.file import FileTokenizer

    return FileTokenizer.from_directory(directory, added)


@cache
def _bundled(added: tuple[str, ...]) -> Tokenizer:
    from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer

    return Gpt2Tokenizer(added)


def _chat_format(name: str) -> ChatFormat:
    if name == "ours":
        return CHAT_FORMAT
    if name == "90m":
        from rlm_engine.published.routed import CHAT_FORMAT as PUBLISHED

        return PUBLISHED
    if name == "mor":
        from rlm_engine.published.mixture import CHAT_FORMAT as MIXTURE

        return MIXTURE
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    config = _model_config(path)
    if config is None:
        raise UsageError(
            f"unknown chat format {name!r}; there are ours, 90m, mor, or a model's directory or config.json"
        )
    if config.chat_format is None:
        raise UsageError(f"{path}: this model has no chat_format")
    return config.chat_format


def _model_config(path: Path) -> ModelConfig | None:
    """None when there is no such file, or another program's: a tokenizer may come with that too."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise UsageError(f"{path}: not JSON") from None
    return config_from_dict(data, str(path)) if isinstance(data, dict) and "architecture" in data else None


def _texts(form: ChatFormat) -> list[str]:
    return [*form.prefix.values(), *form.suffix.values(), *form.stop]
