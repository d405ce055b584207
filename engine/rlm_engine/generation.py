"""Generating one reply token by token."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np

from rlm_engine.decoding.interface import Decoder, Depth
from rlm_engine.errors import UsageError
from rlm_engine.reply import Reply
from rlm_engine.trace import Token, TokenTrace


@dataclass(frozen=True)
class Summary:
    """How a generation went.

    ``stop_reason``: "end_of_turn" (the model ended by itself), "stop_string", "max_tokens" or "cancelled".
    ``dropped_tokens``: tokens of the conversation the model no longer saw at the end, whether whole messages were left
    out beforehand or the window moved on. ``accepted``: share of drafted tokens that were right, None without
    speculation.
    """

    stop_reason: str
    prompt_tokens: int
    new_tokens: int
    dropped_tokens: int
    prefill_s: float
    decode_s: float
    mean_depth: float
    seed: int | None
    accepted: float | None = None


class Generation:
    """The tokens of one reply, one by one; `summary` is complete once it has ended.

    `depth` may be set while it runs and applies from the next token on. Closing it early counts as "cancelled".
    """

    def __init__(
        self, decoder: Decoder, prompt: list[int], reply: Reply, dropped: int, speculation: Speculation | None
    ):
        self._decoder, self._prompt, self._reply, self._left_out = decoder, prompt, reply, dropped
        self._speculation = speculation
        self._depth = decoder.depth
        self._drafted = self._accepted = 0
        self._prefill_s = self._decode_s = 0.0
        self._tokens = self._run()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """Stop generating."""
        self._tokens.close()

    @property
    def depth(self) -> Depth:
        """The depth budget of the tokens to come."""
        return self._depth

    @depth.setter
    def depth(self, depth: Depth) -> None:
        self._depth = depth

    @property
    def summary(self) -> Summary:
        """How it went so far."""
        reply = self._reply
        return Summary(
            stop_reason=reply.reason,
            prompt_tokens=len(self._prompt),
            new_tokens=reply.new_tokens,
            dropped_tokens=self._left_out + self._decoder.dropped(0),
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            mean_depth=reply.depths / reply.new_tokens if reply.new_tokens else 0.0,
            seed=None if reply.sampling.is_greedy else reply.sampler.seed,
            accepted=self._accepted / self._drafted if self._drafted else None,
        )

    def _run(self) -> Generator[Token, None, None]:
        if self._reply.ended:
            return
        started = time.perf_counter()
        result = self._decoder.feed([self._prompt])
        self._prefill_s = time.perf_counter() - started
        logits, trace, replacement = result.logits[-1], result.traces[-1], None
        while True:
            started = time.perf_counter()
            chosen = self._reply.choose(logits) if replacement is None else replacement
            tokens = self._reply.add(chosen, logits, trace)
            self._decode_s += time.perf_counter() - started
            yield from tokens
            if self._reply.ended:
                return
            started = time.perf_counter()
            self._decoder.depth = self._depth
            tokens, logits, trace, replacement = self._advance(chosen)
            self._decode_s += time.perf_counter() - started
            yield from tokens
            if self._reply.ended:
                return

    def _advance(self, chosen: int) -> tuple[list[Token], np.ndarray, TokenTrace, int | None]:
        """Feed the chosen token. Returns tokens that a draft had right, the next logits and trace, and the token that
        replaces the first wrong draft, if there was one."""
        speculation, decoder, reply = self._speculation, self._decoder, self._reply
        start = decoder.length(0)
        if speculation is None or start + 1 + speculation.tokens > speculation.limit:
            result = decoder.feed([[chosen]])
            return [], result.logits[-1], result.traces[-1], None
        draft = speculation.draft(decoder, chosen, reply)
        result = decoder.feed([[chosen, *(token for token, _ in draft)]], report="all")
        self._drafted += len(draft)
        shown: list[Token] = []
        right, replacement = 0, None
        for token, guessed in draft:
            true = reply.sampler.probabilities(result.logits[right], reply.history)
            replacement = reply.sampler.verify(token, true, guessed)
            if replacement is not None:
                break
            shown += reply.add(token, result.logits[right], result.traces[right])
            right += 1
            if reply.ended:
                break
        self._accepted += right
        decoder.truncate(0, start + 1 + right)
        return shown, result.logits[right], result.traces[right], replacement


@dataclass(frozen=True)
class Speculation:
    """Depth speculation: the same weights at a shallow depth draft a few tokens, one full-depth pass verifies them.

    Speculative sampling (Leviathan et al. 2023; Chen et al. 2023) with the model as its own drafter: greedy output is
    the same, sampled output has the same distribution. ``limit``: no draft when the sequence would outgrow this many
    tokens, where forgetting a wrong draft is no longer exact.
    """

    depth: int
    tokens: int = 3
    limit: int = 1 << 30

    def __post_init__(self) -> None:
        if self.depth < 1 or self.tokens < 1:
            raise UsageError("speculation needs a draft depth and a number of drafted tokens of at least 1")

    def draft(self, decoder: Decoder, chosen: int, reply: Reply) -> list[tuple[int, np.ndarray]]:
        """Tokens after `chosen` and the distributions [vocabulary] they were drawn from; the decoder is put back."""
        depth, start = decoder.depth, decoder.length(0)
        decoder.depth = replace(depth, max_steps=min(self.depth, depth.max_steps or self.depth))
        drafted: list[tuple[int, np.ndarray]] = []
        token, history = chosen, list(reply.history)
        for _ in range(self.tokens):
            logits = decoder.feed([[token]]).logits[-1]
            guessed = reply.sampler.probabilities(logits, history)
            token = reply.sampler.draw(guessed)
            drafted.append((token, guessed))
            history.append(token)
        decoder.truncate(0, start)
        decoder.depth = depth
        return drafted
