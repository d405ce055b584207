"""One reply being written: choosing tokens, finding its end, releasing text that is certain.

Single, batched and speculative generation differ in how logits are computed; what happens to them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlm_engine.detokenize import StreamDecoder
from rlm_engine.sampling import Sampler, Sampling, log_softmax
from rlm_engine.stopping import StopStrings
from rlm_engine.tokenizer import Tokenizer
from rlm_engine.trace import Alternative, Token, TokenTrace


@dataclass(frozen=True)
class Ending:
    """What ends a reply: ids (end of text, end of turn) and strings of the chat format."""

    ids: frozenset[int]
    texts: tuple[str, ...] = ()


class Reply:
    """The state of one reply. ``reason`` is "cancelled" until it has ended otherwise (see `Summary.stop_reason`)."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        ending: Ending,
        tokenizer: Tokenizer | None,
        alternatives: Callable[[np.ndarray], tuple[Alternative, ...]],
    ):
        self.sampling, self.sampler = sampling, Sampler(sampling)
        self.history = list(prompt)  # what the repetition penalty looks at: the prompt and everything chosen
        self.new_tokens, self.depths = 0, 0.0
        self.reason = "max_tokens" if sampling.max_tokens == 0 else "cancelled"
        self._stop_ids, self._alternatives = ending.ids, alternatives
        self._texts = StreamDecoder(tokenizer) if tokenizer is not None else None
        self._stops = StopStrings((*ending.texts, *sampling.stop))
        self._waiting: list[Token] = []  # their text is held back: half a character, perhaps a stop string

    @property
    def ended(self) -> bool:
        """Whether no further token is wanted."""
        return self.reason != "cancelled"

    def choose(self, logits: np.ndarray) -> int:
        """Draw the next token from logits [vocabulary]."""
        return self.sampler.choose(logits, self.history)

    def add(self, chosen: int, logits: np.ndarray, trace: TokenTrace) -> list[Token]:
        """Take a chosen token and the logits it came from; returns the tokens that may be shown now.

        Every token is released as soon as its text is certain; one whose text is held back waits for the next.
        """
        if chosen in self._stop_ids:
            self.reason = "end_of_turn"
            return self._finish()
        self.history.append(chosen)
        self.new_tokens += 1
        self.depths += trace.depth
        text, hit = self._stops.push(self._texts.push(chosen) if self._texts else f"{chosen} ")
        logprob = float(log_softmax(logits)[chosen])
        token = Token(chosen, text, logprob, trace.depth, trace.halting, self._alternatives(logits), trace)
        if hit:
            self.reason = "stop_string"
            return [*self._release(), token]
        released = [*self._release(), token] if text else []
        if not text:
            self._waiting.append(token)
        if self.new_tokens == self.sampling.max_tokens:
            self.reason = "max_tokens"
            released += self._finish()
        return released

    def _release(self) -> list[Token]:
        released, self._waiting = self._waiting, []
        return released

    def _finish(self) -> list[Token]:
        """The text ends here: what was held back belongs to the last token that waits."""
        text, hit = self._stops.push(self._texts.flush() if self._texts else "")
        if not hit:
            text += self._stops.flush()
        if self._stops.hit:
            self.reason = "stop_string"
        if self._waiting and text:
            self._waiting[-1] = replace(self._waiting[-1], text=text)
        return self._release()
