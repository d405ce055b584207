"""GPT-2's tokenizer: 50,257 byte-level tokens, bundled with the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from rlm_engine.errors import ModelError
from rlm_engine.tokenizer.byte_level import ByteLevelTokenizer

ASSET = Path(__file__).parent.parent / "assets" / "tokenizers" / "gpt2.json"
END_OF_TEXT = {"<|endoftext|>": 50256}
VOCAB_SIZE = 50257


class Gpt2Tokenizer(ByteLevelTokenizer):
    """GPT-2's vocabulary, ``<|endoftext|>`` (50256) and a model's own special tokens from 50257 on."""

    def __init__(self, added_tokens: Sequence[str] = ()):
        """``added_tokens``: texts of further special tokens, in the order of their ids. Takes about 0.1 s."""
        try:
            bpe = tokenizers.Tokenizer.from_file(str(ASSET))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{ASSET}: cannot be read ({error}); install rlm-chat again") from None
        super().__init__(bpe, VOCAB_SIZE, END_OF_TEXT, added_tokens, "config.json added_tokens")
