"""Train a lossless tokenizer for technical text: byte-level BPE with the published special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_engine.errors import InputError, UsageError
from rlm_engine.tokenizer.technical import SPECIAL_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Role marks in training text are special tokens in the model's input; no merge should be spent on spelling them.
_MARKS = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, "<|system|>", "<|user|>", "<|assistant|>"))))


def train_technical(files: Iterable[Path], vocab_size: int = 32_000, min_frequency: int = 2) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) over .txt files and .jsonl files with "text" or "messages" per line.

    Ids 0..13 are the published tokenizer's special tokens, then the 256 bytes, then merges seen at least
    ``min_frequency`` times; digits stand alone, so that numbers are read digit by digit. Every text survives encoding.
    Save it with ``.save("tokenizer.json")`` and load it as `"tokenizer": "file"`.

    UsageError for sizes that cannot be, InputError naming file and line for what cannot be read or holds no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UsageError(f"a vocabulary needs at least {smallest} tokens (special tokens and bytes), got {vocab_size}")
    if min_frequency < 1:
        raise UsageError(f"min_frequency must be at least 1, got {min_frequency}")
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Read ahead of the trainer: an exception inside its iterator would reach the person as a Rust error.
    texts = [text for path in files for text in _texts(Path(path)) if text.strip()]
    if not texts:
        raise InputError("the training files hold no text")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(path: Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: only .txt and .jsonl files can be read")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, line in enumerate(lines, start=1):
                for text in [line] if path.suffix == ".txt" else _messages(line, f"{path}, line {number}"):
                    yield from _MARKS.split(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def _messages(line: str, where: str) -> list[str]:
    if not line.strip():
        return []
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    found: list[Any] = []
    if isinstance(data, dict) and "text" in data:
        found = [data["text"]]
    elif isinstance(data, dict) and isinstance(data.get("messages"), list):
        found = [m.get("content") if isinstance(m, dict) else None for m in data["messages"]]
    if not found or not all(isinstance(text, str) for text in found):
        raise InputError(f'{where}: needs a "text", or "messages" with a "content" each')
    return found
