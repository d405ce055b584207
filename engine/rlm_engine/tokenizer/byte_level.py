"""Byte-level byte-pair encoding (Radford et al. 2019, section 2.2), the part shared by every such vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tokenizers

from rlm_engine.errors import InputError, ModelError


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the characters from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(itself)]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = byte_characters()


class ByteLevelTokenizer:
    """A byte-level BPE plus special tokens that only trusted text can produce.

    ``bpe`` must know all 256 bytes; its own handling of special tokens is switched off and done here, so that typed
    text never becomes one, and a special token never swallows the spaces around it.
    Every text survives ``decode(encode(text))``.
    """

    def __init__(
        self, bpe: tokenizers.Tokenizer, vocab_size: int, own: dict[str, int], added: Sequence[str], where: str
    ):
        """``own``: special tokens below ``vocab_size``; ``added``: more of them, numbered from there on.

        Raises ModelError naming ``where`` for an added token that is empty or exists already.
        """
        bpe.encode_special_tokens = True  # "encode special tokens as text"
        self._bpe = bpe
        self._special = dict(own)
        self._vocab_size = vocab_size
        for text in added:
            if not text or text in self._special:
                raise ModelError(f"{where}: the special token {text!r} is empty or there twice")
            self._special[text] = self._vocab_size
            self._vocab_size += 1
        self._special_texts = {i: text for text, i in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._known: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """How many ids have a meaning, special tokens included."""
        return self._vocab_size

    @property
    def special(self) -> dict[str, int]:
        """Texts of the special tokens and their ids."""
        return dict(self._special)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text; see `Tokenizer.encode`. About 2 million characters a second."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start + 1} of the text is half a surrogate pair (U+{ord(text[error.start]):04X}), "
                "not text; remove it or read the file as UTF-8"
            ) from None
        if not allow_special or self._split is None:
            return self._plain(text)
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):
            ids.extend([self._special[part]] if i % 2 else self._plain(part))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of some ids; see `Tokenizer.decode`."""
        hidden = self._special_texts if skip_special else {}
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id; empty for ids outside the vocabulary."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _look_up(self, token: int) -> bytes:
        if token in self._special_texts:
            return self._special_texts[token].encode("utf-8")
        symbols = self._bpe.id_to_token(token) if 0 <= token < self._vocab_size else None
        return b"" if symbols is None else bytes(_BYTES[c] for c in symbols)
