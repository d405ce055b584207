"""Text to ids and back: what every tokenizer offers, and the one a model's configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlm_engine.config import ModelConfig
from rlm_engine.errors import ModelError


class Tokenizer(Protocol):
    """Text to ids and back. Ids beyond `vocab_size` (padded embedding tables) stand for no text at all."""

    @property
    def vocab_size(self) -> int:
        """How many ids have a meaning; they are 0..vocab_size-1."""

    @property
    def special(self) -> dict[str, int]:
        """Texts of the special tokens and their ids."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. Special tokens only when allowed; typed text must be encoded without.

        Raises InputError when the text cannot be UTF-8 (half of a surrogate pair).
        """

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id, possibly a part of a character; the text itself for special tokens."""


def load_tokenizer(config: ModelConfig, directory: Path) -> Tokenizer | None:
    """The tokenizer that ``config.tokenizer`` names, None for "none" (the model then takes ids only).

    "gpt2" is bundled; "technical" and "file" (tokenizer.json) are read from the model ``directory``.
    ``config.added_tokens`` follow the tokenizer's own vocabulary. Raises ModelError when a file is missing, damaged or
    hostile, or knows more tokens than the model.
    """
    tokenizer: Tokenizer
    if config.tokenizer == "none":
        return None
    if config.tokenizer == "gpt2":
        from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer

        tokenizer = Gpt2Tokenizer(config.added_tokens)
    elif config.tokenizer == "technical":
        if config.added_tokens:
            raise ModelError(f"{directory / 'config.json'}: the technical tokenizer takes no added_tokens")
        from rlm_engine.tokenizer.technical import TechnicalTokenizer

        tokenizer = TechnicalTokenizer.from_directory(directory)
    elif config.tokenizer == "file":
        from rlm_engine.tokenizer.file import FileTokenizer

        tokenizer = FileTokenizer.from_directory(directory, config.added_tokens)
    else:
        known = "gpt2, technical, file and none"
        raise ModelError(f"{directory / 'config.json'}: unknown tokenizer {config.tokenizer!r}; there are {known}")
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
            "tokenizer and config.json do not belong together"
        )
    return tokenizer
