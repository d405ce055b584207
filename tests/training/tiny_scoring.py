"""A byte-level tokenizer and tiny real models with it, for tests of evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny_models import tiny_act

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.config import BlendConfig, ChatFormat, MixtureConfig, RoutedConfig
from rlm_engine.generate import Model
from rlm_engine.models import build_model
from rlm_engine.models.act import ActModel
from rlm_training.scoring import Scorer

SPECIAL = {"<|endoftext|>": 256, "<|user|>": 257, "<|assistant|>": 258}
END, VOCABULARY = 256, 259
CHAT = ChatFormat(
    {"user": "<|user|>\n", "assistant": "<|assistant|>\n"},
    {"user": "\n", "assistant": "<|endoftext|>"},
    ("<|endoftext|>", "<|user|>"),
)


class ByteTokenizer:
    """Every byte is a token; three special tokens follow."""

    vocab_size = VOCABULARY
    special = SPECIAL

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return list(text.encode())
        parts = re.split("(" + "|".join(re.escape(s) for s in SPECIAL) + ")", text)
        return [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else part.encode())]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else next(t for t, i in SPECIAL.items() if i == token).encode()


def scorer_of(module: Any, tokenizer: Any = None, dense: bool = True) -> Scorer:
    """A scorer of a module; ``dense=False`` leaves only the decoder."""
    dtype = next(module.parameters()).dtype
    model = Model("tiny", module.config, TorchBackend(module.pieces(), dtype), tokenizer, 0)
    return Scorer(model, module if dense else None)


def byte_act(seed: int = 0, context: int = 24, chat: bool = True, **changes: Any) -> ActModel:
    """A tiny act model over bytes, float64."""
    return tiny_act(
        seed, vocab_size=VOCABULARY, eos_token_id=END, context_length=context, tokenizer="none",
        chat_format=CHAT if chat else None, **changes,
    )  # fmt: skip


def byte_scorer(seed: int = 0, dense: bool = True, **changes: Any) -> Scorer:
    """A scorer of `byte_act` with its tokenizer."""
    return scorer_of(byte_act(seed, **changes), ByteTokenizer(), dense)


def uniform_scorer(**changes: Any) -> Scorer:
    """A model that finds every token equally likely: its embedding table, also its head, is zero."""
    module = byte_act(**changes)
    with torch.no_grad():
        module.embedding.weight.zero_()
    return scorer_of(module, ByteTokenizer())


def byte_router(design: str, seed: int = 0) -> Any:
    """A tiny blend, routed or mixture module over bytes, float64, whose router varies."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 12, "n_heads": 2, "n_layers": 2, "tokenizer": "none"}
    sizes |= {"eos_token_id": END, "context_length": 16}
    configs = {
        "blend": lambda: BlendConfig(**sizes, max_steps=3),
        "routed": lambda: RoutedConfig(**sizes, ffn=20, pad_token_id=257),
        "mixture": lambda: MixtureConfig(**sizes, ffn=20, max_steps=3),
    }
    module = build_model(configs[design]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (4.0 if "router" in name else 1.5) / parameter.shape[-1] ** 0.5)
    return module.double().eval()


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    """Token ids, int64."""
    return np.random.default_rng(seed).integers(1, 256, count)
