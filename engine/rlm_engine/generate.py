"""The model as a program uses it: load, generate, chat, score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlm_engine.backends.choose import count_parameters, open_backend
from rlm_engine.batch import Completion, Job, run_jobs
from rlm_engine.chat import fit_conversation, stop_ids_and_texts
from rlm_engine.checkpoint import read_own_config
from rlm_engine.config import ActConfig, BlendConfig, ModelConfig, RoutedConfig
from rlm_engine.decoding.interface import Backend, Decoder, Depth
from rlm_engine.errors import InputError, ModelError, UsageError
from rlm_engine.generation import Generation, Speculation
from rlm_engine.reply import Ending, Reply
from rlm_engine.sampling import Sampling, log_softmax, top_alternatives
from rlm_engine.tokenizer import Tokenizer, load_tokenizer
from rlm_engine.trace import Alternative

if TYPE_CHECKING:
    from collections.abc import Mapping

SCORE_CHUNK = 256  # tokens whose logits are held at once
BUNDLED = Path(__file__).parent / "assets" / "models"


@dataclass(frozen=True)
class Scored:
    """Teacher-forced scores of a text: logprobs[i] (nats) and depths[i] belong to predicting ids[i + 1]."""

    ids: list[int]
    logprobs: list[float]
    depths: list[float]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a text of one token."""
        return float(np.exp(-np.mean(self.logprobs))) if self.logprobs else float("nan")


@dataclass(frozen=True)
class LensStep:
    """What the model would answer if the last token were given at most ``depth`` recurrences."""

    depth: int
    halting: float | None
    top: tuple[Alternative, ...]


class Model:
    """A loaded model. Get one from `load_model`."""

    def __init__(self, name: str, config: ModelConfig, backend: Backend, tokenizer: Tokenizer | None, parameters: int):
        self.name, self.config, self.backend, self.tokenizer = name, config, backend, tokenizer
        self.parameters = parameters
        self.window = "exact"  # past the context window, for the published designs: see `decoding.sequences`

    @property
    def backend_name(self) -> str:
        """ "torch" or "onnx"."""
        return self.backend.name

    @property
    def max_depth(self) -> int:
        """The most recurrences or passes a token can take."""
        return max(self.config.steps) if isinstance(self.config, RoutedConfig) else self.config.max_steps

    @property
    def can_chat(self) -> bool:
        """Whether the model was trained on a chat format."""
        return self.config.chat_format is not None and self.tokenizer is not None

    def new_decoder(self, depth: Depth | None = None, rows: int = 1) -> Decoder:
        """A fresh decoder of this model's architecture."""
        config = self.config
        if isinstance(config, ActConfig):
            from rlm_engine.decoding.act import ActDecoder

            return ActDecoder(self.backend, config, depth, rows)
        if isinstance(config, BlendConfig):
            from rlm_engine.decoding.blend import BlendDecoder

            return BlendDecoder(self.backend, config, depth, rows, window=self.window)
        if isinstance(config, RoutedConfig):
            from rlm_engine.decoding.routed import RoutedDecoder

            return RoutedDecoder(self.backend, config, depth, rows, window=self.window)
        from rlm_engine.decoding.mixture import MixtureDecoder

        return MixtureDecoder(self.backend, config, depth, rows, window=self.window)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        depth: Depth | None = None,
        *,
        alternatives: int = 0,
        speculation: Speculation | None = None,
    ) -> Generation:
        """Continue a text or token ids. ``alternatives``: how many of the likeliest tokens each token reports.

        A text is a text's beginning: the config's ``bos_token_id`` goes before it where there is one and room for it.
        Token ids are taken as they are.

        Raises InputError when the prompt is empty, longer than the context, or not encodable; UsageError when
        stop strings are asked of a model without tokenizer.
        """
        ids, ending = self._text(prompt)
        return self._generation(ids, self._reply(ids, sampling, ending, alternatives), depth, 0, speculation)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling | None = None,
        depth: Depth | None = None,
        *,
        alternatives: int = 0,
        speculation: Speculation | None = None,
    ) -> Generation:
        """Write the assistant's next turn; ends with the turn.

        When the conversation is longer than the context the oldest exchanges are left out (`Summary.dropped_tokens`).
        Raises ModelError when the model has no chat format, InputError when the newest message alone does not fit.
        """
        ids, left_out, ending = self._conversation(messages)
        reply = self._reply(ids, sampling, ending, alternatives)
        return self._generation(ids, reply, depth, left_out, speculation)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int] | Sequence[Mapping[str, str]]],
        sampling: Sampling | None = None,
        depth: Depth | None = None,
        *,
        rows: int = 8,
    ) -> Iterator[Completion]:
        """Answer many prompts, ``rows`` at a time; yields completions as they end.

        A prompt is a text or token ids to continue, or a list of messages to answer. Prompt i is sampled with
        seed + i. Errors as for `generate` and `chat`, raised before anything is computed.
        """
        sampling = sampling or Sampling()
        jobs = []
        for index, prompt in enumerate(prompts):
            mine = sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**63)
            if not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], int):
                ids, _, ending = self._conversation(prompt)  # type: ignore[arg-type]
            else:
                ids, ending = self._text(prompt)  # type: ignore[arg-type]
            jobs.append(Job(index, ids, self._reply(ids, mine, ending, 0)))
        if not jobs:
            return iter(())
        return run_jobs(self.new_decoder(depth, min(rows, len(jobs))), jobs)

    def score(self, text: str | Sequence[int], depth: Depth | None = None) -> Scored:
        """Log-probability and depth of every token given those before it (teacher-forced, routers see the prefix).

        A text longer than the window is scored with a rolling window by act; InputError for the other designs, and
        for an empty text.
        """
        ids = self.encode(text)
        if not isinstance(self.config, ActConfig):  # act's window rolls exactly and cheaply
            self._check_length(ids)
        decoder = self.new_decoder(depth)
        logprobs: list[float] = []
        depths: list[float] = []
        for start in range(0, len(ids) - 1, SCORE_CHUNK):
            part = ids[start : min(start + SCORE_CHUNK, len(ids) - 1)]
            result = decoder.feed([part], report="all")
            targets = ids[start + 1 : start + 1 + len(part)]
            logprobs += log_softmax(result.logits)[np.arange(len(part)), targets].tolist()
            depths += [trace.depth for trace in result.traces]
        return Scored(ids, logprobs, depths)

    def logits(self, ids: Sequence[int], depth: Depth | None = None) -> np.ndarray:
        """float32 [len(ids), vocabulary]: row i is the prediction after ids[:i + 1]."""
        checked = self.encode(ids)
        self._check_length(checked)
        return self.new_decoder(depth).feed([checked], report="all").logits.astype(np.float32, copy=False)

    def lens(self, ids: Sequence[int] | str, top: int = 5) -> list[LensStep]:
        """For every depth budget 1..max_depth of the last token: what the model would say next, and how it halted.

        The tokens before it keep their full depth. ``halting`` is act's halting probability at that recurrence, None
        for other designs and for recurrences the token does not reach.
        """
        checked = self.encode(ids)
        self._check_length(checked)
        decoder = self.new_decoder(Depth())
        trace = decoder.feed([checked]).traces[0]
        steps = []
        for budget in range(1, self.max_depth + 1):
            if not decoder.truncate(0, len(checked) - 1):
                raise ModelError("the last token cannot be computed again; this is a bug")
            decoder.depth = Depth(max_steps=budget)
            result = decoder.feed([checked[-1:]])
            reached = isinstance(self.config, ActConfig) and budget <= len(trace.halting)
            halting = result.traces[0].halting[budget - 1] if reached else None
            steps.append(LensStep(budget, halting, self.alternatives(result.logits[0], top)))
        return steps

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """Ids of a text (special tokens never), or checked ids. Raises InputError."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise InputError(f"model {self.name!r} has no tokenizer; give token ids")
            ids = self.tokenizer.encode(text)
        else:
            ids = [int(i) for i in text]
            wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
            if wrong is not None:
                raise InputError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        if not ids:
            raise InputError("the prompt is empty; give the model at least one token to continue")
        return ids

    def alternatives(self, logits: np.ndarray, count: int) -> tuple[Alternative, ...]:
        """The ``count`` most likely next tokens under the plain softmax."""
        if not count:
            return ()
        ids, logprobs = top_alternatives(logits, count)
        return tuple(Alternative(int(i), self.token_text(int(i)), float(p)) for i, p in zip(ids, logprobs, strict=True))

    def token_text(self, token: int) -> str:
        """A token on its own as text; incomplete characters become U+FFFD."""
        if self.tokenizer is None:
            return str(token)
        return self.tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def _check_length(self, ids: Sequence[int]) -> None:
        config = self.config
        # rlm-90m never crops and has no position table; the bound keeps its caches within reason
        unbounded = isinstance(config, RoutedConfig) and not config.rolling_window
        limit = config.context_length * (8 if unbounded else 1)
        if len(ids) > limit:
            raise InputError(f"the prompt has {len(ids)} tokens, the model's context holds {limit}; shorten it")

    def _text(self, prompt: str | Sequence[int]) -> tuple[list[int], Ending]:
        """Ids of a prompt to continue, and what ends its continuation."""
        config, ids = self.config, self.encode(prompt)
        self._check_length(ids)
        bos = config.bos_token_id if isinstance(config, ActConfig) else None
        if bos is not None and isinstance(prompt, str) and len(ids) < config.context_length:
            ids = [bos, *ids]
        return ids, Ending(frozenset({config.eos_token_id}))

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], int, Ending]:
        """Ids of what fits of a conversation, how many tokens were left out, and what ends the reply."""
        chat_format, tokenizer = self.config.chat_format, self.tokenizer
        if chat_format is None or tokenizer is None:
            raise ModelError(f"model {self.name!r} has no chat format; it can continue text (`rlm-chat complete`)")
        # leave the reply some room before the beginning of the conversation leaves the window
        room = max(16, self.config.context_length // 4)
        everything, _ = fit_conversation(messages, tokenizer, chat_format, 1 << 30)
        ids, _ = fit_conversation(messages, tokenizer, chat_format, max(1, self.config.context_length - room))
        stop_ids, texts = stop_ids_and_texts(tokenizer, chat_format)
        return ids, len(everything) - len(ids), Ending(stop_ids | {self.config.eos_token_id}, texts)

    def _reply(self, ids: list[int], sampling: Sampling | None, ending: Ending, alternatives: int) -> Reply:
        sampling = sampling or Sampling()
        if sampling.stop and self.tokenizer is None:
            raise UsageError(f"model {self.name!r} has no tokenizer, so stop strings cannot be found")
        return Reply(ids, sampling, ending, self.tokenizer, lambda logits: self.alternatives(logits, alternatives))

    def _generation(
        self, ids: list[int], reply: Reply, depth: Depth | None, dropped: int, speculation: Speculation | None
    ) -> Generation:
        if speculation is not None:
            speculation = replace(speculation, limit=min(speculation.limit, self.config.context_length))
        return Generation(self.new_decoder(depth), ids, reply, dropped, speculation)


def bundled_models() -> list[str]:
    """Names of the models that came with the program."""
    if not BUNDLED.is_dir():
        return []
    return sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())


def find_model(name: str) -> Path:
    """The directory of a bundled model's name or of a path. Raises ModelError when there is none."""
    if name in bundled_models():
        return BUNDLED / name
    path = Path(name).expanduser()
    if not path.is_dir():
        known = ", ".join(bundled_models()) or "none"
        raise ModelError(f"{name}: neither a bundled model ({known}) nor a model directory")
    return path


def describe_model(directory: Path) -> dict[str, Any]:
    """Facts about a model directory without loading it. Raises ModelError when it is damaged."""
    config = read_own_config(directory)
    card = directory / "README.md"
    return {
        "name": directory.name,
        "architecture": config.architecture,
        "parameters": count_parameters(directory, config),
        "context_length": config.context_length,
        "max_depth": max(config.steps) if isinstance(config, RoutedConfig) else config.max_steps,
        "chat": config.chat_format is not None,
        "card": str(card) if card.is_file() else None,
    }


def load_model(
    name: str = "chat", backend: str = "auto", device: str = "auto", dtype: str = "auto", compiled: bool = False
) -> Model:
    """Load a bundled model by name, or a model directory (our layout or a published one).

    ``backend``: "auto", "onnx" or "torch"; ``device``: "auto", "cpu", "cuda", and with ONNX Runtime "directml" or
    "coreml"; ``dtype``: "auto", "float32" or "bfloat16", for PyTorch; ``compiled``: PyTorch's pieces go through
    torch.compile when they first run (seconds to a minute); see `backends.choose`. Raises ModelError when the model
    cannot be loaded, UsageError for an unknown backend, device or dtype.
    """
    directory = find_model(name)
    config, opened, parameters = open_backend(directory, backend, device, dtype, compiled)
    return Model(directory.name, config, opened, load_tokenizer(config, directory), parameters)
