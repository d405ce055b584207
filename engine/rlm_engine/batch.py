"""Many replies at once: the rows of one decoder, refilled as replies end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rlm_engine.decoding.interface import Decoder
from rlm_engine.errors import ModelError
from rlm_engine.reply import Reply
from rlm_engine.trace import Token


@dataclass(frozen=True)
class Job:
    """One prompt [ids] and the reply to be written to it; ``index`` is its place in the input."""

    index: int
    prompt: list[int]
    reply: Reply


@dataclass(frozen=True)
class Completion:
    """A finished reply. ``stop_reason`` and ``seed`` as in `Summary`."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    stop_reason: str
    seed: int | None


def run_jobs(decoder: Decoder, jobs: Iterable[Job]) -> Iterator[Completion]:
    """Write all replies, at most `decoder.rows` at a time; yields each as it ends, whatever its place.

    Rows share the matrix products but not their results: a token that halts early leaves the batch, and what a row
    gets does not depend on its neighbours beyond rounding.
    """
    waiting = deque(jobs)
    running: dict[int, tuple[Job, list[Token]]] = {}
    feed: list[list[int]] = [[] for _ in range(decoder.rows)]
    while waiting or running:
        for row in range(decoder.rows):
            while row not in running and waiting:
                job = waiting.popleft()
                if job.reply.ended:  # max_tokens 0
                    yield _completion(job, [])
                    continue
                if not decoder.truncate(row, 0):
                    raise ModelError("a finished row could not be emptied; this is a bug")
                running[row], feed[row] = (job, []), job.prompt
        if not running:
            return
        result = decoder.feed(feed)
        feed = [[] for _ in range(decoder.rows)]
        for row, logits, trace in zip(result.rows.tolist(), result.logits, result.traces, strict=True):
            job, tokens = running[row]
            chosen = job.reply.choose(logits)
            tokens += job.reply.add(chosen, logits, trace)
            if job.reply.ended:
                del running[row]
                yield _completion(job, tokens)
            else:
                feed[row] = [chosen]


def _completion(job: Job, tokens: list[Token]) -> Completion:
    reply = job.reply
    seed = None if reply.sampling.is_greedy else reply.sampler.seed
    text = "".join(token.text for token in tokens)
    return Completion(job.index, text, tuple(tokens), len(job.prompt), reply.reason, seed)
