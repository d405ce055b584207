"""Tokens to text while they arrive: never half a character, never one lost."""

from __future__ import annotations

import codecs

from rlm_engine.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text as they come.

    All texts returned, `flush` included, together equal ``tokenizer.decode(ids, skip_special)``: byte-level tokens may
    end inside a UTF-8 character, whose bytes then wait for the token that completes it. Bytes that are no UTF-8 become
    U+FFFD exactly as in ``bytes.decode(errors="replace")`` of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._hidden = frozenset(tokenizer.special.values()) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is complete now; empty for special tokens and inside a character."""
        if token in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The text ends here: U+FFFD for a character that was begun and never completed, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
